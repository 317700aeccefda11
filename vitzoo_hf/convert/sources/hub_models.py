"""Plan the conversion of models on the Hugging Face Hub, each pinned to its commit at that time.

Planning costs one request a model; files are downloaded, one at a time, during the conversion. A model that cannot
be read is refused with the reason; if the Hub itself cannot be reached, nothing is refused.
"""

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from vitzoo_hf.convert.factor_table import Table, read_table
from vitzoo_hf.convert.names import to_timm
from vitzoo_hf.convert.pickles import MAX_FILE_BYTES, read_state_dict
from vitzoo_hf.convert.rows import Found, LoadedModel, SourceError, SourcePlan, planned_rows, unless_refused
from vitzoo_hf.convert.sources.checkpoints import CONFIG, INDEXES, MAX_CONFIG_BYTES, SMALLEST, read_config
from vitzoo_hf.format.hub_errors import cause_of, hub_failure, is_transient, retried
from vitzoo_hf.format.hub_http import refused_repository, status_code
from vitzoo_hf.format.messages import one_line
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.read_ahead import mapped_ahead

REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/[\w.-]+)(?:@([\w./-]+))?", re.ASCII)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ASKED_AT_ONCE = 4
LOGIN = "run `hf auth login`, or set HF_TOKEN"

Answer = TypeVar("Answer")


def read_list(file: Path) -> list[str]:
    """Read a list of models from a text file: `ORG/NAME` or `ORG/NAME@REVISION` a line, `#` before comments.

    Raises:
        ZooError: if the file cannot be read, a line is no such name, or there is none.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"the list {file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name = line.partition("#")[0].strip()
        if not name:
            continue
        if not REPOSITORY.fullmatch(name):
            raise ZooError(f"{file.name} line {number}: {name!r} is no model; expected ORG/NAME or ORG/NAME@REVISION")
        if name in lines:
            raise ZooError(f"{file.name} line {number}: {name!r} is also in line {lines[name]}: keep one")
        lines[name] = number
    if not lines:
        raise ZooError(f"{file} lists no model: write ORG/NAME or ORG/NAME@REVISION, one a line")
    return list(lines)


def plan_hub_models(
    repositories: Sequence[str],
    *,
    table: Path | None = None,
    architecture: str | None = None,
    architecture_args: Mapping[str, object] | None = None,
    name: str = "hub-models",
) -> SourcePlan:
    """Plan models of the Hub, each with model.safetensors or pytorch_model.bin, and maybe a config.json.

    Args:
        repositories: `ORG/NAME` or `ORG/NAME@REVISION` of each model.
        table: CSV with the names in the column `repo`, and ids and factors like a table for checkpoint files.
        architecture: timm name, where no config.json and no column names it.
        architecture_args: arguments of `timm.create_model` that do not follow from the shapes.
        name: name of the zoo.

    Raises:
        ZooError: if a name cannot be a model's, is given twice, or the table has a mistake in its header.
        SourceError: if the Hub cannot be reached.
    """
    for number, repository in enumerate(repositories):
        if not REPOSITORY.fullmatch(repository):
            raise ZooError(f"{repository!r} is no model of the Hub; expected ORG/NAME or ORG/NAME@REVISION")
        if repository in repositories[:number]:
            raise ZooError(f"{repository!r} is given twice: keep one")
    factors = None if table is None else _matched(read_table(table, "repo"), repositories)
    refused: dict[str, str] = {}
    checkpoints: list[Found] = []
    find = partial(unless_refused, partial(_find, downloads=threading.Lock()))
    answers = mapped_ahead(find, repositories, threads=ASKED_AT_ONCE, ahead=ASKED_AT_ONCE)
    for repository, answer in zip(repositories, answers, strict=True):
        if isinstance(answer, ZooError):
            refused[repository] = str(answer)
        else:
            checkpoints.append(answer)
    planned = planned_rows(checkpoints, factors, architecture=architecture, architecture_args=architecture_args)
    types, notes = ({}, []) if factors is None else (factors.factor_types, factors.notes)
    return SourcePlan(name, planned.rows, types, refused=planned.refused | refused, notes=planned.notes + notes)


def _matched(table: Table, repositories: Sequence[str]) -> Table:
    refused = {
        repository: f"{line.where}: {repository!r} is not among the models to convert"
        for repository, line in table.lines.items()
        if repository not in repositories
    }
    return replace(table, refused=table.refused | refused)


@dataclass(frozen=True)
class _HubModel:
    """A model repository at one commit; the lock `downloads` allows one download at a time."""

    source: str
    repository: str
    commit: str
    weights: str
    has_config: bool
    downloads: threading.Lock = field(compare=False)

    def load(self, architecture: str | None, architecture_args: Mapping[str, object] | None) -> LoadedModel:
        """Download and read the model."""
        config = read_config(self._file(CONFIG), self.source) if self.has_config else None
        tensors = read_state_dict(self._file(self.weights), self.source)
        return to_timm(
            tensors,
            name=self.source,
            architecture=architecture,
            architecture_args=architecture_args,
            config=config,
        )

    def _file(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self.downloads:
            download = partial(hf_hub_download, self.repository, name, revision=self.commit)
            return Path(_answered(download, f"cannot get {name} of {self.source}"))


def _find(source: str, downloads: threading.Lock) -> Found:
    """Ask for the files of a model repository at its present commit.

    Raises:
        ZooError: if the repository is not accessible, or has no weights in a known form.
        SourceError: if the Hub cannot be reached.
    """
    from huggingface_hub import HfApi

    repository, _, revision = source.partition("@")
    ask = partial(HfApi().model_info, repository, revision=revision or None, files_metadata=True)
    info = _answered(ask, f"cannot find {source}")
    sizes = {file.rfilename: file.size for file in info.siblings or ()}
    weights = next((name for name in WEIGHTS if name in sizes), None)
    if weights is None:
        if any(index in sizes for index in INDEXES):
            raise ZooError("its weights are in several files: download it, and convert its folder")
        raise ZooError(f"it has neither {' nor '.join(WEIGHTS)}")
    size = sizes[weights]
    if size is not None and size > MAX_FILE_BYTES:
        raise ZooError(
            f"its {weights} has {size / 1e9:.3g} GB; files of up to {MAX_FILE_BYTES / 1e9:.0f} GB are read"
        )
    if (sizes.get(CONFIG) or 0) > MAX_CONFIG_BYTES:
        raise ZooError(f"its {CONFIG} has {sizes[CONFIG]} bytes: it is no description of a model")
    model = _HubModel(source, repository, str(info.sha), weights, CONFIG in sizes, downloads)
    provenance = {"kind": "hub model", "repository": repository, "commit": model.commit, "file": weights}
    licence = getattr(info.card_data, "license", None)
    if isinstance(licence, str):
        provenance["licence"] = licence
    return Found(source, model.load, provenance, size if size is not None and size >= SMALLEST else None)


def _answered(ask: Callable[[], Answer], what: str) -> Answer:
    """Make a request to the Hub, repeated while the connection breaks or the server is busy.

    Raises:
        ZooError: if this repository or file is not accessible.
        SourceError: if the Hub cannot be reached, or nothing can be stored.
    """

    def request() -> Answer:
        try:
            return ask()
        except Exception as error:
            # `retried` repeats what the server or the connection raised, not the client's "it is not in the cache"
            raise cause_of(error) from None

    try:
        return retried(request)
    except Exception as error:
        raise _failure(error, what) from None


def _failure(error: BaseException, what: str) -> ZooError:
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    status = status_code(error)
    unreachable = isinstance(error, hub.LocalEntryNotFoundError) or status is None or is_transient(error)
    if isinstance(error, hub.OfflineModeIsEnabled):
        return SourceError(f"{what}: HF_HUB_OFFLINE forbids to ask the Hub: unset it")
    if isinstance(error, hub.GatedRepoError):
        page = f"{constants.ENDPOINT}/{refused_repository(error)}"
        return ZooError(f"{what}: its owner grants access: ask at {page}, then {LOGIN}")
    if isinstance(error, hub.RepositoryNotFoundError):
        return ZooError(f"{what}: no model on the Hub that you can see: check the name; for a private one {LOGIN}")
    if isinstance(error, hub.RevisionNotFoundError):
        return ZooError(f"{what}: it has no such branch, tag or commit")
    if isinstance(error, hub.EntryNotFoundError) and not unreachable:
        return ZooError(f"{what}: the model has no such file")
    if isinstance(error, hub.DisabledRepoError) or (status == 403):
        return ZooError(f"{what}: the Hub does not allow it ({one_line(error)})")
    if unreachable or status == 401:
        return SourceError(f"{hub_failure(error, what)}; the same command continues later")
    return hub_failure(error, what)
