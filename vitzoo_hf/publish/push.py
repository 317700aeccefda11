"""Push a zoo's folder to a dataset on the Hub: only changed files are uploaded; readers see all of them or none.

The folder is checked first, then compared with the dataset by size and hash. Contents are uploaded before any commit
refers to them, so the next push continues an interrupted one. Then one commit puts them in place, and tags are set.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Union

from vitzoo_hf.format import schema
from vitzoo_hf.format.hub_errors import hub_failure, retried
from vitzoo_hf.format.hub_http import http_errors, status_code
from vitzoo_hf.format.messages import REPAIR
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.publish.push_contents import CARD, UNLISTED, Contents, LocalFile, read_contents

if TYPE_CHECKING:
    import huggingface_hub

Item = TypeVar("Item")
Operation = Union["huggingface_hub.CommitOperationAdd", "huggingface_hub.CommitOperationDelete"]

COMMIT_OPERATIONS = 100
"""Largest number of changes in a commit, as the Hub advises. With more there are several: shards first; card and
manifest last."""
# a group is hashed, then uploaded: hashing every shard first would delay the first byte
UPLOAD_FILES = 50
# readers open a zoo by these two: until they are replaced, the earlier zoo stays the visible one
LAST = (CARD, schema.MANIFEST)

OWN_FILES = re.compile(rf"({'|'.join(schema.CONFIGS)})/[a-z]+-\d{{5}}-of-\d{{5}}\.parquet")
OWN_NAMES = (schema.MANIFEST, schema.LAYOUTS, schema.SHARDS, "blueprint.yaml")
"""Files that an earlier zoo may have left in a dataset; a push deletes those that the new zoo lacks."""


@dataclass(frozen=True)
class Push:
    """The changes that a push made, or in a dry run would make.

    Attributes:
        repository: the dataset's id.
        url: address of the dataset's page.
        commit: the commit that now holds the zoo; None in a dry run.
        uploaded: `(path, bytes)` of new and changed files.
        unchanged: number of files that the dataset had already.
        deleted: files of an earlier zoo that the new one lacks.
        tags: tags that now point to the commit.
        left_out: files of the folder that are not part of the zoo, and are not uploaded.
    """

    repository: str
    url: str
    commit: str | None
    uploaded: list[tuple[str, int]]
    unchanged: int
    deleted: list[str]
    tags: list[str]
    left_out: list[str]

    @property
    def uploaded_bytes(self) -> int:
        """Size of the new and changed files."""
        return sum(size for _, size in self.uploaded)


def push(
    folder: str | Path,
    repository: str,
    *,
    private: bool = False,
    dry_run: bool = False,
    tag: str | None = None,
    token: str | None = None,
    message: str | None = None,
    progress: bool = True,
) -> Push:
    """Publish a zoo as a dataset on the Hub, or bring a published one up to date.

    Uploaded are `zoo.json`, the card, and the files they list; hidden, temporary and other files are not. Files of an
    earlier zoo that this one lacks are deleted from the dataset; its other files stay. The tag `format-N` of the
    zoo's format moves to the new commit.

    Args:
        folder: the zoo.
        repository: a dataset id such as `ModelZoos/vit-zoo`; the dataset is created if it does not exist.
        private: create a private dataset; an existing public one is refused.
        dry_run: report the changes without making them.
        tag: a name for this version, which never moves.
        token: access token of the Hub; by default HF_TOKEN or the login of `hf auth login`.
        message: title of the commit.
        progress: show bars.

    Raises:
        ZooError: if the folder is no complete zoo, the dataset holds something else, the tag is on another version,
            or the Hub refuses.

    Example:
        >>> push("zoo", "no-organisation")
        Traceback (most recent call last):
        vitzoo_hf.format.schema.ZooError: 'no-organisation' is no dataset id: expected ORG/NAME, of letters, ...
    """
    _check_id(repository)
    _check_tag(tag)
    local = read_contents(Path(folder), repository)
    with _explained(repository), _bars(shown=progress):
        api = _client(token, needs_login=not dry_run)
        remote = _read_remote(api, repository)
        _check_remote(repository, remote, private=private)
        change = _Change.between(local, remote)
        _check_tag_is_free(repository, tag, remote, change)
        commit = None
        if not dry_run:
            if not remote.exists:
                remote = _create(api, repository, private=private)
            commit = _publish(api, repository, local, remote, message or f"Publish the zoo {local.name}")
            _set_tags(api, repository, commit, remote.tags, moving=local.format_tag, fixed=tag)
    return Push(
        repository=repository,
        url=f"{api.endpoint}/datasets/{repository}",
        commit=commit,
        uploaded=[(path, local.files[path].size) for path in change.changed],
        unchanged=len(local.files) - len(change.changed),
        deleted=change.deleted,
        tags=[local.format_tag, *([tag] if tag else [])],
        left_out=local.left_out,
    )


@dataclass(frozen=True)
class _Remote:
    """State of a dataset on the Hub.

    Attributes:
        exists: whether there is such a dataset.
        head: the last commit.
        private: whether only its owners see it.
        files: path -> size, and SHA-256 of a large or git's id of a small file.
        tags: tag -> commit.
    """

    exists: bool = False
    head: str | None = None
    private: bool = False
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Change:
    """Paths that differ between a folder and a dataset, in the order of their upload."""

    changed: list[str]
    deleted: list[str]

    @classmethod
    def between(cls, local: Contents, remote: _Remote) -> "_Change":
        changed = [path for path, file in local.files.items() if not _is_same(file, remote.files.get(path))]
        # other files in the dataset may be the owner's, and are never deleted
        zoo_files = [path for path in remote.files if path in OWN_NAMES or OWN_FILES.fullmatch(path)]
        # shards first, card and manifest last: nothing refers to a file that is not there yet
        changed.sort(key=lambda path: (path in LAST, not path.startswith("weights/")))
        return cls(changed, sorted(path for path in zoo_files if path not in local.files))


def _is_same(file: LocalFile, remote: tuple[int, str] | None) -> bool:
    """Return whether the dataset has this very content."""
    if remote is None or remote[0] != file.size:
        return False
    # the Hub keeps large files under their SHA-256 (64 digits), small ones under git's SHA-1
    return remote[1] == (file.sha256 if len(remote[1]) == 64 else file.git_id())


def _check_id(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        valid = repository.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise ZooError(f"{repository!r} is no dataset id: expected ORG/NAME, of letters, digits, -, _, .")


def _check_tag(tag: str | None) -> None:
    if tag is None:
        return
    if not re.fullmatch(r"(?!.*(\.\.|\.lock$|\.$))[A-Za-z0-9][A-Za-z0-9._-]*", tag):
        raise ZooError(f"{tag!r} cannot be a tag: expected letters, digits, ., _ and -, such as v1.0")
    # names of the branch, of the moving tag and of commits
    if re.fullmatch(r"main|format-\d+|[0-9a-f]{40}", tag):
        raise ZooError(f"{tag!r} cannot be a tag: it means something else already; choose one such as v1.0")


def _check_tag_is_free(repository: str, tag: str | None, remote: _Remote, change: _Change) -> None:
    tagged_commit = remote.tags.get(tag) if tag else None
    if tagged_commit and (tagged_commit != remote.head or change.changed or change.deleted):
        raise ZooError(f"{repository} has a tag {tag!r} on another version: tags do not move, choose a new one")


def _check_remote(repository: str, remote: _Remote, *, private: bool) -> None:
    # the visibility of a public dataset is its owner's to change
    if private and remote.exists and not remote.private:
        raise ZooError(f"{repository} is public already, nothing was uploaded: make it private in its settings first")
    script = f"{repository.split('/')[1]}.py"
    # `datasets` takes a file with the name of the dataset for its loading script, and refuses those
    if script in remote.files:
        raise ZooError(f"{repository} holds {script}, which keeps everybody from loading it: delete that file first")
    foreign = [path for path in remote.files if path not in (*UNLISTED, *OWN_NAMES) and not OWN_FILES.fullmatch(path)]
    if foreign and schema.MANIFEST not in remote.files:
        raise ZooError(f"{repository} holds {foreign[0]} and is no zoo: choose another name, or empty it yourself")


def _client(token: str | None, *, needs_login: bool) -> "huggingface_hub.HfApi":
    from huggingface_hub import HfApi
    from huggingface_hub.utils import get_token

    if needs_login and not (token or get_token()):
        raise ZooError("not logged in to the Hub: run `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token, library_name="vitzoo-hf", library_version=schema.VERSION)


def _create(api: "huggingface_hub.HfApi", repository: str, *, private: bool) -> _Remote:
    """Create a dataset; without `private`, its visibility is the default of the organisation."""
    retried(lambda: api.create_repo(repository, private=private or None, repo_type="dataset", exist_ok=True))
    remote = _read_remote(api, repository)
    _check_remote(repository, remote, private=private)
    return remote


def _read_remote(api: "huggingface_hub.HfApi", repository: str) -> _Remote:
    """Ask the Hub for the state of a dataset, which need not exist."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    try:
        info = retried(lambda: api.dataset_info(repository))
        refs = retried(lambda: api.list_repo_refs(repository, repo_type="dataset"))
        entries = retried(
            lambda: list(api.list_repo_tree(repository, repo_type="dataset", recursive=True, revision=info.sha))
        )
    except RepositoryNotFoundError:
        return _Remote()
    files = {
        entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    }
    return _Remote(True, info.sha, bool(info.private), files, {tag.name: tag.target_commit for tag in refs.tags})


def _publish(
    api: "huggingface_hub.HfApi", repository: str, local: Contents, remote: _Remote, message: str
) -> str | None:
    """Upload and commit the files that differ; return the commit that holds the zoo."""
    from huggingface_hub import CommitOperationDelete

    change = _Change.between(local, remote)
    deletions = [CommitOperationDelete(path, is_folder=False) for path in change.deleted]
    last = [path for path in change.changed if path in LAST]
    early: list[str | CommitOperationDelete] = [*(path for path in change.changed if path not in LAST), *deletions]
    # room for card and manifest, which go with the last group
    *groups, end = list(_batches(early, COMMIT_OPERATIONS - len(LAST))) or [[]]
    groups += [[*end, *last]] if end or last else []
    head = remote.head
    for number, group in enumerate(groups, 1):
        operations: list[Operation] = []
        for part in _batches(group, UPLOAD_FILES):
            prepared: list[Operation] = [
                _addition(item, local.files[item]) if isinstance(item, str) else item for item in part
            ]
            additions = [operation for operation in prepared if not isinstance(operation, CommitOperationDelete)]
            if additions:
                api.preupload_lfs_files(repository, additions, repo_type="dataset", free_memory=False)
            operations += prepared
        title = message if len(groups) == 1 else f"{message} ({number} of {len(groups)})"
        head = _commit(api, repository, operations, title, head)
    # read back: the Hub drops paths of a .gitignore without an error
    remainder = _Change.between(local, _read_remote(api, repository)) if groups else change
    if differing := remainder.changed + remainder.deleted:
        raise ZooError(
            f"{repository} does not hold what was pushed: {differing[0]} differs; somebody else"
            " pushed at the same time, or a .gitignore there leaves it out: look, and push again"
        )
    return head


def _addition(path: str, file: LocalFile) -> "huggingface_hub.CommitOperationAdd":
    """Prepare the upload of a file after comparing its content with its hash."""
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path, file.source if file.content is None else file.content)
    # computed by the client while it reads the file: no second reading for the check
    if addition.upload_info.sha256.hex() != file.sha256:
        raise ZooError(f"{file.source} does not match its hash: it is damaged; {REPAIR}")
    return addition


def _commit(
    api: "huggingface_hub.HfApi", repository: str, operations: "list[Operation]", message: str, head: str | None
) -> str | None:
    """Commit on top of `head`; safe to repeat, as the Hub refuses it if `head` is no longer the last commit."""
    from huggingface_hub.errors import HfHubHTTPError

    tries = itertools.count(1)

    def attempt() -> str | None:
        first = next(tries) == 1
        try:
            return api.create_commit(
                repository, operations, commit_message=message, repo_type="dataset", parent_commit=head
            ).oid
        except HfHubHTTPError as error:
            # 412: `parent_commit` is no longer the last commit
            if status_code(error) != 412:
                raise
            if first:
                raise ZooError(f"somebody else has just pushed to {repository}: look what, and push again") from None
            # the answer to an earlier attempt was lost; whether that commit was ours is checked after the push
            return api.dataset_info(repository).sha

    return retried(attempt)


def _set_tags(
    api: "huggingface_hub.HfApi",
    repository: str,
    commit: str | None,
    tags: Mapping[str, str],
    *,
    moving: str,
    fixed: str | None,
) -> None:
    """Move the tag `moving` to a commit, and set the tag `fixed` there."""
    if tags.get(moving) not in (None, commit):
        # the Hub cannot move a tag
        retried(lambda: _delete_tag(api, repository, moving))
    for tag in (moving, fixed):
        if tag is not None and tags.get(tag) != commit:
            retried(
                lambda tag=tag: api.create_tag(  # type: ignore[misc]
                    repository, tag=tag, revision=commit, repo_type="dataset", exist_ok=True
                )
            )


def _delete_tag(api: "huggingface_hub.HfApi", repository: str, tag: str) -> None:
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        api.delete_tag(repository, tag=tag, repo_type="dataset")
    except RevisionNotFoundError:
        return


def _batches(items: list[Item], size: int) -> Iterator[list[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def _explained(repository: str) -> Iterator[None]:
    """Turn every failure of the Hub's client into a `ZooError` of one line."""
    failures: tuple[type[Exception], ...] = (*http_errors(), OSError, ValueError, RuntimeError)
    try:
        yield
    except ZooError:
        raise
    except failures as error:
        raise hub_failure(error, f"cannot push to {repository!r}") from None


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
