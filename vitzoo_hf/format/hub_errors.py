"""Failures of the Hub: which to retry, and what to tell the user."""

import re
import time
from collections.abc import Callable
from typing import TypeVar

from vitzoo_hf.format.hub_http import connection_errors, refused_repository, status_code
from vitzoo_hf.format.messages import REPAIR, one_line
from vitzoo_hf.format.schema import MissingFileError, ZooError

Answer = TypeVar("Answer")
ATTEMPTS = 6
"""How often a request is made before it counts as failed."""
TRANSIENT = (408, 429, 500, 502, 503, 504)
"""Status codes after which a request is worth repeating."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0
"""Seconds before the second attempt, which double up to the longest."""


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: a broken connection, a busy or failing server."""
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    # both are connection errors by class, yet no second attempt can change them
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        return False
    if isinstance(error, HfHubHTTPError):
        return status_code(error) in TRANSIENT
    return isinstance(error, (*connection_errors(), ConnectionError, TimeoutError))


def retried(request: Callable[[], Answer], attempts: int = ATTEMPTS) -> Answer:
    """Make a request; repeat it while the connection breaks or the server is busy or failing.

    Args:
        request: makes the request, and raises where it fails.
        attempts: number of requests after which the last error is raised.
    """
    failures = 0
    while True:
        try:
            return request()
        except Exception as error:
            failures += 1
            if not is_transient(error) or failures >= attempts:
                raise
            pause(failures, error)


def pause(failures: int, error: BaseException) -> None:
    """Wait before a request is repeated: longer after each failure, and as long as the server asks."""
    time.sleep(max(min(FIRST_WAIT * 2 ** (failures - 1), LONGEST_WAIT), seconds_asked_for(error)))


def seconds_asked_for(error: BaseException) -> float:
    """How long a busy server asks to be left alone, at most two minutes."""
    status = status_code(error)
    if status is None:
        return 0.0
    headers = error.response.headers  # type: ignore[attr-defined]
    # as the Hub writes it: ratelimit: "api";r=0;t=55
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("ratelimit", ""))
    if status == 429 and limit is not None:
        # the header gives whole seconds: one more, so that the window is surely over
        return min(int(limit[1]) + 1.0, 120.0)
    asked = headers.get("retry-after", "")
    return min(float(asked), 120.0) if asked.isdigit() else 0.0


def cause_of(error: BaseException) -> BaseException:
    """The failed request behind an error of the Hub's client, which may only say that a file is not in its cache."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    while isinstance(error, LocalEntryNotFoundError | RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def hub_failure(error: BaseException, what: str, revision: str | None = None) -> ZooError:
    """One line for a request to the Hub that failed: what was tried, why it failed, what to do.

    Args:
        error: what the Hub's client raised.
        what: what was tried, such as "cannot get zoo.json of 'ORG/NAME'".
        revision: what was asked for, if anything.
    """
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    error = cause_of(error)
    status = status_code(error)
    login = "run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, hub.OfflineModeIsEnabled):
        reason = (
            "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset it, or download the zoo before"
        )
    # before RepositoryNotFoundError, of which it is a subclass
    elif isinstance(error, hub.GatedRepoError):
        page = f"{constants.ENDPOINT}/datasets/{refused_repository(error)}"
        reason = f"its owner grants access: ask at {page}, then {login}"
    elif isinstance(error, hub.RepositoryNotFoundError):
        reason = (
            f"no folder here, and no dataset on the Hub that you can see: check the name; for a private one {login}"
        )
    elif isinstance(error, hub.RevisionNotFoundError):
        reason = f"it has no branch, tag or commit {revision!r}: check `revision`"
    elif isinstance(error, hub.EntryNotFoundError):
        where = f" at {revision!r}" if revision else ""
        return MissingFileError(f"{what}: the dataset has no such file{where}: it is no zoo, or not all of one")
    elif status == 416:
        reason = f"the file ends before what was asked for: it is not what the zoo says; {REPAIR}"
    elif status == 401:
        reason = f"the Hub refuses your token, or you have none: {login}"
    elif status == 403:
        reason = f"your token does not allow it: {login} with one that does ({one_line(error)})"
    elif status is None and is_transient(error):
        reason = f"no connection to {constants.ENDPOINT} ({one_line(error)}): try again later"
    else:
        reason = one_line(error)
    return ZooError(f"{what}: {reason}")
