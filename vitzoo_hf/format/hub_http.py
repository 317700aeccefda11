"""HTTP as the installed `huggingface_hub` speaks it, the one place that knows with which library it does.

`huggingface_hub` calls `requests` before its version 1, `httpx` in version 1 and `httpx2` from version 2 on. Errors
and answers of all three have `response.status_code` and `headers`; what differs is here.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

CLIENTS = ("requests", "httpx", "httpx2")
CHUNK = 1 << 16


def http_client() -> ModuleType:
    """The HTTP library that the installed `huggingface_hub` calls.

    Raises:
        RuntimeError: if it is none of those known here.
    """
    from huggingface_hub.utils import get_session

    # the session may be a subclass made by huggingface_hub or by the user
    names = [base.__module__.partition(".")[0] for base in type(get_session()).__mro__]
    name = next((name for name in names if name in CLIENTS), None)
    if name is None:
        raise RuntimeError(f"huggingface_hub calls {names[0]}; expected one of {', '.join(CLIENTS)}: install another")
    return importlib.import_module(name)


def http_errors() -> tuple[type[Exception], ...]:
    """What the library raises for any request that failed."""
    client = http_client()
    return (client.RequestException,) if client.__name__ == "requests" else (client.HTTPError,)


def connection_errors() -> tuple[type[Exception], ...]:
    """What the library raises for a connection that could not be made, broke or took too long."""
    client = http_client()
    if client.__name__ == "requests":
        from urllib3.exceptions import HTTPError  # of a body that is read as it comes

        return (client.ConnectionError, client.Timeout, client.exceptions.ChunkedEncodingError, HTTPError)
    return (client.TransportError,)


def status_code(error: BaseException) -> int | None:
    """The status the Hub refused a request with; None if it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    # before version 1, `LocalEntryNotFoundError` is one of these errors without an answer
    answer = error.response if isinstance(error, HfHubHTTPError) else None
    return None if answer is None else int(answer.status_code)


def refused_repository(error: Any) -> str:
    """The `owner/name` that a `GatedRepoError` is about; before version 1 only the address tells it."""
    named = getattr(error, "repo_id", None)
    if named:
        return str(named)
    parts = urlsplit(str(error.response.url)).path.strip("/").split("/")
    # addresses of files lack /api, those of models lack /models
    parts = parts[1:] if parts[0] == "api" else parts
    parts = parts[1:] if parts[0] in ("datasets", "models") else parts
    return "/".join(parts[:2])


@contextmanager
def streamed(url: str, headers: dict[str, str], timeout: float) -> Iterator[tuple[Any, Iterator[bytes]]]:
    """The answer to a GET request, redirects followed, and the chunks of its body, read as they are taken."""
    from huggingface_hub.utils import get_session

    session: Any = get_session()
    if http_client().__name__ == "requests":
        # without stream=True the whole body would be in memory before the first chunk
        with session.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            yield answer, _as_they_come(answer.raw)
    else:
        with session.stream("GET", url, headers=headers, follow_redirects=True, timeout=timeout) as answer:
            # raw, as a range of a file must not be decompressed
            yield answer, answer.iter_raw()


def _as_they_come(body: Any) -> Iterator[bytes]:
    """Chunks of a body read by `urllib3`; those that came before a connection broke are not lost."""
    read = getattr(body, "read1", body.read)  # `urllib3` 1 has only `read`, which gives them too
    while chunk := read(CHUNK, decode_content=False):
        yield chunk


def moved_to(answer: Any) -> str | None:
    """The address on another host that a request was redirected to; None if it stayed where it was."""
    addresses = [str(step.url) for step in (*answer.history, answer)]
    return addresses[-1] if urlsplit(addresses[0])[:2] != urlsplit(addresses[-1])[:2] else None
