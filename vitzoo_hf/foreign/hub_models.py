"""Models on the Hub as a source: each is pinned to a commit when it is planned, and fetched when it is loaded."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vitzoo_hf.foreign.checkpoints import read_config
from vitzoo_hf.foreign.files import read_state_dict
from vitzoo_hf.foreign.names import to_timm
from vitzoo_hf.foreign.plan import LoadedModel, SourceError, SourcePlan
from vitzoo_hf.foreign.planned_rows import Found, planned_rows
from vitzoo_hf.foreign.table import read_table
from vitzoo_hf.hub_files import ATTEMPTS, hub_failure, is_transient, pause
from vitzoo_hf.schema import ZooError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
CONFIG = "config.json"
REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?", re.ASCII)


def read_list(file: Path) -> list[str]:
    """The ids in a text file, one `ORG/NAME` or `ORG/NAME@REVISION` a line; what follows a # is left out.

    Raises:
        ZooError: if the file cannot be read, holds none, or a line is no id.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"{file} cannot be read as a list of models: {error}") from None
    found = []
    for number, line in enumerate(lines, start=1):
        told = line.split("#")[0].strip()
        if told and not REPOSITORY.fullmatch(told):
            raise ZooError(f"{file}:{number}: {told!r} is no model id: expected ORG/NAME or ORG/NAME@REVISION")
        found += [told] if told else []
    if not found:
        raise ZooError(f"{file} lists no model: expected one ORG/NAME a line")
    return found


def plan_hub_models(
    repositories: Sequence[str], *, table: Path | None = None, name: str = "hub-models"
) -> SourcePlan:
    """Plan models of the Hub; private ones as `hf` reads them.

    Args:
        repositories: `ORG/NAME`, or `ORG/NAME@REVISION`.
        table: CSV with a column `repo` that says of each which run and epoch it is, and its factors.
        name: of the zoo.

    Raises:
        ZooError: for what is no id, or a mistake in the table.
        SourceError: if the Hub does not answer.
    """
    found, refused = [], {}
    for told in dict.fromkeys(repositories):
        if not REPOSITORY.fullmatch(told):
            raise ZooError(f"{told!r} is no model id: expected ORG/NAME or ORG/NAME@REVISION")
        repository, _, revision = told.partition("@")
        try:
            found.append(_found(repository, revision or None))
        except SourceError:
            raise
        except ZooError as error:
            refused[repository] = str(error)
    lines = None if table is None else read_table(table, "repo")
    planned = planned_rows(found, lines, fallback=name)
    return SourcePlan(
        name=name,
        rows=planned.rows,
        factor_types={} if lines is None else lines.factor_types,
        refused=planned.refused | refused,
        notes=[] if lines is None else lines.notes,
    )


def _found(repository: str, revision: str | None) -> Found:
    from huggingface_hub import HfApi

    what = f"cannot get the model {repository}"
    told = _asked(lambda: HfApi().model_info(repository, revision=revision, files_metadata=True), what, revision)
    sizes = {file.rfilename: file.size for file in told.siblings or ()}
    weights = next((file for file in WEIGHTS if file in sizes), None)
    if weights is None:
        raise ZooError(f"it has neither {' nor '.join(WEIGHTS)}")
    load = partial(_load, repository, told.sha, weights, has_config=CONFIG in sizes)
    provenance = {"repository": repository, "commit": told.sha, "file": weights}
    return Found(repository, load, provenance, sizes[weights])


def _load(
    repository: str,
    commit: str,
    weights: str,
    architecture: str | None,
    architecture_args: dict[str, Any] | None,
    *,
    has_config: bool,
) -> LoadedModel:
    from huggingface_hub import hf_hub_download

    def fetch(file: str) -> Path:
        what = f"cannot get {file} of the model {repository}"
        return Path(_asked(lambda: hf_hub_download(repository, file, revision=commit), what, commit))

    config = read_config(fetch(CONFIG), f"{repository}/{CONFIG}") if has_config else None
    tensors = read_state_dict(fetch(weights), f"{repository}/{weights}")
    return to_timm(
        tensors, name=repository, architecture=architecture, architecture_args=architecture_args, config=config
    )


def _asked(request: Callable[[], Any], what: str, revision: str | None) -> Any:
    """The answer of the Hub, asked again while it is busy.

    Raises:
        ZooError: for this model alone.
        SourceError: if the Hub does not answer at all.
    """
    for failures in range(1, ATTEMPTS + 1):
        try:
            return request()
        except Exception as error:
            failure = str(hub_failure(error, what, revision)).replace("no dataset", "no model")
            if not is_transient(error):
                raise ZooError(failure) from None
            if failures == ATTEMPTS:
                raise SourceError(failure) from None
            pause(failures, error)
    raise AssertionError("unreachable")
