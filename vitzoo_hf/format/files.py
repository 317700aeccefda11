"""Where the files of a published zoo are read from: a folder, or one commit of a dataset on the Hub.

Both give a whole file as a local path, or a range of its bytes straight into the caller's buffer. A dataset is pinned
to the commit of the first file that was read from it, so a push in mid-read never mixes two versions.
"""

import io
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from vitzoo_hf.format import schema
from vitzoo_hf.format.gate.paths import inside
from vitzoo_hf.format.hub_errors import ATTEMPTS, hub_failure, is_transient, pause, retried
from vitzoo_hf.format.hub_http import moved_to, streamed
from vitzoo_hf.format.messages import REPAIR
from vitzoo_hf.format.schema import ZooError


class FolderFiles:
    """The files of a zoo in a folder.

    Args:
        folder: the zoo.
    """

    is_remote = False

    def __init__(self, folder: Path) -> None:
        # worker processes may start in another directory
        self.folder = folder.absolute()
        self.name = str(folder)

    @property
    def source(self) -> tuple[str, None]:
        """What opens this zoo in another process, whatever directory that works in."""
        return str(self.folder), None

    def repair(self, name: str) -> str:
        """What to do about a damaged file."""
        return f"{name} of {self.name} is damaged; {REPAIR}"

    def path(self, name: str) -> Path:
        """The file.

        Raises:
            ZooError: if it is missing.
        """
        file = self.local(name)
        if file is None:
            raise ZooError(f"{name} of {self.name} is missing; {REPAIR}")
        return file

    def local(self, name: str, sha256: str | None = None) -> Path | None:
        """The file; None if it is missing. Whether its content has this hash is for the reader to see."""
        file = inside(self.folder, name)
        return file if file.is_file() else None

    def exists(self, name: str) -> bool:
        """Whether the file is there."""
        return self.local(name) is not None

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a file from position `start`.

        Raises:
            ZooError: if the file is missing or too short.
        """
        read_file_into(self.path(name), start, out, f"{name} of {self.name}")


class HubFiles:
    """The files of a dataset on the Hub, at one commit: whole ones through the Hub's cache, ranges without it.

    It can be shared between threads, and pickled into other processes, which then read the same commit.

    Args:
        repository: a dataset id such as `ModelZoos/vit-zoo`.
        revision: branch, tag or commit; the head of `main` if None.
        pinned: `revision` is a whole commit hash, known to be there.
    """

    is_remote = True
    attempts = ATTEMPTS
    """How often a request without any progress is made before it counts as failed."""

    def __init__(self, repository: str, revision: str | None = None, *, pinned: bool = False) -> None:
        self.name = self.repository = repository
        self.revision = revision
        self._commit: str | None = revision if pinned else None
        self._links: dict[str, str] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        # `self.commit` asks the Hub if nobody has: a copy must read the same commit, and locks do not pickle
        pinned: dict[str, object] = {"_commit": self.commit, "_links": {}, "_lock": None}
        return self.__dict__ | pinned

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__ = state | {"_lock": threading.Lock()}

    def repair(self, name: str) -> str:
        """What to do about a damaged file: `hf` replaces a cached copy, too."""
        command = f"hf download {self.repository} {name} --repo-type dataset --revision {self.commit}"
        return f"{name} of {self.name!r} is damaged; get it again by `{command} --force-download`"

    @property
    def source(self) -> tuple[str, str]:
        """What opens this zoo in another process: its id and the commit that is read."""
        return self.repository, self.commit

    @property
    def commit(self) -> str:
        """The commit all files are read at; that of the zoo's manifest if no file was read yet.

        Raises:
            ZooError: if it cannot be found out.
        """
        if self._commit is None:
            self.path(schema.MANIFEST)
        assert self._commit is not None
        return self._commit

    def path(self, name: str) -> Path:
        """A local copy of the whole file, downloaded into the Hub's cache if it is not there.

        Raises:
            ZooError: if there is no such dataset, revision or file, or it cannot be fetched.
        """
        if self._commit is None:
            # the first file decides on the commit: two threads must not pin two of them
            with self._lock:
                file = self._download(name, self._commit or self.revision)
                # .../snapshots/COMMIT/NAME
                self._commit = file.parents[len(PurePosixPath(name).parts) - 1].name
                return file
        return self._download(name, self._commit)

    def local(self, name: str, sha256: str | None = None) -> Path | None:
        """The file if the Hub's cache holds all of it at this commit, or its content at another one.

        Args:
            name: path in the dataset.
            sha256: hash of the content, by which the cache names large files.
        """
        from huggingface_hub import try_to_load_from_cache

        # asks no server, so an offline machine reads what it has
        held = try_to_load_from_cache(self.repository, name, revision=self.commit, repo_type="dataset")
        if isinstance(held, str):
            return Path(held)
        # the hash becomes a file name: one with a slash or dots must not leave the folder
        if sha256 is None or not sha256.isalnum():
            return None
        # .../snapshots/COMMIT/zoo.json beside .../blobs/SHA256
        content = self.path(schema.MANIFEST).parents[2] / "blobs" / sha256
        return content if content.is_file() else None

    def exists(self, name: str) -> bool:
        """Whether the dataset has the file at this commit; offline, whether the cache holds it.

        Raises:
            ZooError: if the Hub cannot be asked.
        """
        from huggingface_hub import get_hf_file_metadata
        from huggingface_hub.errors import EntryNotFoundError, OfflineModeIsEnabled

        # first, as it needs no request
        if self.local(name) is not None:
            return True
        try:
            retried(lambda: get_hf_file_metadata(self._url(name)), self.attempts)
        except (EntryNotFoundError, OfflineModeIsEnabled):
            return False
        except Exception as error:
            raise self._failure(name, error) from None
        return True

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a file from position `start`: one request for exactly these bytes.

        A connection that breaks is taken up where it broke; a busy or failing server is asked again, after a while.

        Raises:
            ZooError: if the file is missing, too short or not accessible, or the server keeps failing.
        """
        held = self.local(name)
        if held is not None:
            read_file_into(held, start, out, f"{name} of {self.name}")
            return
        target = out.cast("B")
        done, failures = 0, 0
        while done < len(target):
            try:
                progress = done
                for chunk in self._range(name, start + done, start + len(target)):
                    # a server that ignores the end of the range must not write beyond the buffer
                    if len(chunk) > len(target) - done:
                        raise ZooError(
                            f"cannot read {name} of {self.name!r}: the server sends more than was asked for"
                        )
                    target[done : done + len(chunk)] = chunk
                    done += len(chunk)
                if done < len(target):
                    # clients differ in whether a short body is an error; here it always is
                    raise ConnectionError("the answer ended early")
            except ZooError:
                raise
            except Exception as error:
                # counted since the last byte that came: a slow but steady connection never gives up
                failures = 1 if done > progress else failures + 1
                if not is_transient(error) or failures >= self.attempts:
                    raise self._failure(name, error) from None
                pause(failures, error)

    def _range(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Chunks of the bytes from `start` to `stop`; raises if the answer is for anything else."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

        link = self._links.get(name)
        url = self._url(name)
        headers = build_hf_headers(library_name="vitzoo-hf", library_version=schema.VERSION)
        # a compressed answer would make positions in the file meaningless
        headers |= {"Accept-Encoding": "identity", "Range": f"bytes={start}-{stop - 1}"}
        if link is not None:
            # a signed address on another host needs no token, and must not be told it
            headers.pop("authorization", None)
        with streamed(link or url, headers, constants.HF_HUB_DOWNLOAD_TIMEOUT) as (answer, chunks):
            # signed addresses expire; storage services answer an old one with any of these
            if link is not None and answer.status_code in (400, 401, 403, 404, 410):
                self._links.pop(name, None)
                raise ConnectionError("the address has expired")
            hf_raise_for_status(answer)
            self._check_range(name, answer, start, stop)
            signed = moved_to(answer)
            if signed is not None:
                # saves the redirect: one request a range instead of two
                self._links[name] = signed
            yield from chunks

    def _check_range(self, name: str, answer: Any, start: int, stop: int) -> None:
        told = answer.headers.get("content-range", "")
        # 200 means the whole file, perhaps terabytes, from its beginning
        if answer.status_code != 206 or answer.headers.get("content-encoding", "identity") != "identity":
            host = urlsplit(str(answer.url)).hostname
            raise ZooError(
                f"cannot read a part of {name} of {self.name!r}: {host} sends whole files only;"
                " read from the Hub itself, or download the zoo first"
            )
        if not told.startswith(f"bytes {start}-{stop - 1}/"):
            raise ZooError(
                f"{name} of {self.name!r} is not what the zoo says: bytes {start} to {stop - 1} were asked for,"
                f" {told.removeprefix('bytes ') or 'unnamed ones'} came; {REPAIR}"
            )

    def _download(self, name: str, revision: str | None) -> Path:
        from huggingface_hub import hf_hub_download

        try:
            download = partial(hf_hub_download, self.repository, name, repo_type="dataset", revision=revision)
            return Path(retried(download, self.attempts))
        except Exception as error:
            raise self._failure(name, error) from None

    def _url(self, name: str) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repository, name, repo_type="dataset", revision=self.commit)

    def _failure(self, name: str, error: Exception) -> ZooError:
        return hub_failure(error, f"cannot get {name} of {self.repository!r}", self.revision)


def read_file_into(file: Path, start: int, out: memoryview, what: str) -> None:
    """Fill `out` with the bytes of a local file from position `start`.

    Raises:
        ZooError: if the file cannot be read or ends before, naming it as `what`.
    """
    target = out.cast("B")
    done = 0
    try:
        with io.FileIO(file) as opened:
            opened.seek(start)
            while done < len(target):
                # one call reads at most 2 GB on Linux, and may read less
                count = opened.readinto(target[done:])
                if not count:
                    raise ZooError(f"{what} has fewer than {start + len(target)} bytes: it was cut; {REPAIR}")
                done += count
    except OSError as error:
        raise ZooError(f"{what} cannot be read ({error.strerror}); {REPAIR}") from None
