"""Share what every experiment needs: arguments, provenance, merged tables, Markdown, intervals, README splicing.

Studies import this module, never each other. Nothing here loads a zoo or trains a model.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from vitzoo_hf.apply.intervals import gains
from vitzoo_hf.environment import describe
from vitzoo_hf.format.atomic import read_json, write_atomically, write_json
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "results"
# float32 holds about seven: the last one would change with every run and fill the diffs.
DIGITS = 6
Rank = tuple[object, ...]
WHOLE: tuple[str, ...] = ()
"""Keys of a table that each run replaces: it is one cell, or is derived from tables that are merged."""
IN_LINE = ("system", "cores", "python", "torch", "numpy")

ZOO_AND_NAME = argparse.ArgumentParser(add_help=False)
ZOO_AND_NAME.add_argument("zoo", type=Path, help="folder of an evaluated zoo")
ZOO_AND_NAME.add_argument("name", help="name under which the tables of this zoo are stored")

WORLDS = argparse.ArgumentParser(add_help=False)
WORLDS.add_argument("--folder", type=Path, required=True, help="zoos and finished cells")
WORLDS.add_argument("--workers", type=int, default=2)
WORLDS.add_argument("--smoke", action="store_true", help="one cell of few models, whose tables go to FOLDER")


def parser(docstring: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Make the parser of a script: the first line of its docstring, and the options of parents."""
    return argparse.ArgumentParser(description=docstring.splitlines()[0], parents=parents)


def run_main(main: Callable[[], None]) -> None:
    """Run the `main` of a script, and end the process with one line on stderr where a fault is its caller's to mend.

    A `ZooError`, an `OSError` and an interrupt exit with status 1. Any other exception is a fault of the code, and
    keeps its traceback.
    """
    script = Path(sys.argv[0]).name
    try:
        main()
    except ZooError as error:
        sys.exit(f"{script}: {error}")
    except OSError as error:
        # An OSError of a library may carry a text alone, without a file and a reason.
        sys.exit(f"{script}: {f'{error.filename}: {error.strerror}' if error.filename else error}")
    except KeyboardInterrupt:
        # The terminal has just printed ^C into the line of a progress bar.
        sys.exit(f"\n{script}: interrupted")


def commit() -> str:
    """The commit of this checkout, with `-dirty` where files differ from it; `unknown` outside a checkout."""
    command = ["git", "describe", "--always", "--dirty"]
    run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    return run.stdout.strip() or "unknown"


def command_line() -> str:
    """The command that runs this process, as a shell takes it, below the root of the repository.

    Absolute paths become their last part: results are published, and must not tell where somebody keeps a zoo.
    """
    script = Path(sys.argv[0]).resolve()
    name = script.relative_to(REPOSITORY) if script.is_relative_to(REPOSITORY) else Path(script.name)
    words = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", name.as_posix(), *words])


def provenance(zoo: Zoo | None = None) -> dict[str, object]:
    """Machine, versions, commit, command and date of this run, and the zoo that it reads."""
    record: dict[str, object] = {key: str(value) for key, value in describe().items()}
    record |= {"commit": commit(), "command": command_line(), "date": time.strftime("%Y-%m-%d")}
    if zoo is not None:
        record |= {"zoo": zoo.manifest["name"], "blueprint_fingerprint": zoo.manifest["blueprint_fingerprint"]}
    return record


def provenance_line() -> str:
    """The provenance of a row in one line, for tables whose rows come from several runs."""
    record = provenance()
    facts = ", ".join(f"{key} {record[key]}" for key in IN_LINE)
    return f"{facts}, commit {record['commit']}, command {record['command']}"


def write_provenance(file: Path, record: Mapping[str, object], *, merged: bool = False) -> None:
    """Write a provenance record as JSON.

    Args:
        file: the JSON file.
        record: the facts of this run.
        merged: whether the tables also hold cells of earlier runs, whose records then stay under `earlier`.
    """
    earlier: list[object] = []
    if merged and file.is_file():
        previous = read_json(file)
        earlier = [*previous.pop("earlier", []), previous]
    write_json(file, {**record, **({"earlier": earlier} if earlier else {})})


def merge(table: pd.DataFrame, file: Path, keys: Sequence[str], *, digits: int = DIGITS) -> pd.DataFrame:
    """Merge the cells of a run into a stored table, as text.

    A cell is all rows that agree in `keys`. A cell that this run measured replaces its stored rows, at the place of
    the first one; all other rows stay to the byte; new cells come last.

    Args:
        table: rows of this run.
        file: the CSV file, which may be missing.
        keys: columns that tell cells apart.
        digits: significant digits of floating-point numbers.

    Raises:
        ZooError: if the stored table has other columns than `table`, or a key is no column.
    """
    # As text: stored rows must come back to the byte, and parsed numbers print otherwise.
    fresh = _as_text(table.to_csv(index=False, float_format=f"%.{digits}g", lineterminator="\n"))
    if unknown := [key for key in keys if key not in fresh]:
        raise ZooError(f"{file.name}: {', '.join(unknown)} tell cells apart, but are no columns of this run's table")
    if not file.is_file():
        return fresh
    stored = _as_text(file.read_text(encoding="utf-8"))
    # Sets, as an order of columns is no difference; the stored one stays.
    if set(stored) != set(fresh):
        lacking = ", ".join(name for name in stored if name not in fresh) or "none"
        added = ", ".join(name for name in fresh if name not in stored) or "none"
        raise ZooError(
            f"{file}: this run's columns differ from those of the stored table (lacking: {lacking}; new: {added});"
            " move the file away and run all cells again"
        )
    cells: dict[tuple[object, ...], list[int]] = {}
    both = pd.concat([stored, fresh[list(stored)]], ignore_index=True)
    for place, key in enumerate(_keys(both, keys)):
        cells.setdefault(key, []).append(place)
    order = []
    for places in cells.values():
        measured = [place for place in places if place >= len(stored)]
        order += [(places[0], place) for place in measured] or [(place, place) for place in places]
    return both.iloc[[place for _, place in sorted(order)]].reset_index(drop=True)


def write_table(
    table: pd.DataFrame,
    file: Path,
    keys: Sequence[str],
    *,
    digits: int = DIGITS,
    order: Sequence[str] | Callable[[pd.DataFrame], Sequence[Rank]] = (),
) -> None:
    """Write a table of a study, whole or not at all.

    Args:
        table: rows of this run.
        file: the CSV file.
        keys: columns that tell cells apart; see `merge`. `WHOLE` replaces the file.
        digits: significant digits of floating-point numbers.
        order: columns by which the merged rows are sorted, numbers as numbers, or a function that gives the rank of
            each merged row, whose values are text. The order of `merge` by default.

    Raises:
        ZooError: if the file has other columns than `table`. Nothing is written then.
    """
    if keys:
        table = merge(table, file, keys, digits=digits)
    if order:
        ranks = order(table) if callable(order) else _ranks(table, order)
        table = table.iloc[sorted(range(len(ranks)), key=ranks.__getitem__)]

    file.parent.mkdir(parents=True, exist_ok=True)
    write_cell(table, file, digits=digits)


def write_cell(table: pd.DataFrame, file: Path, *, digits: int | None = None) -> None:
    """Write the table of a cell into a folder of finished cells, with all digits by default.

    The file appears whole or not at all, since its being there is what says that the cell is finished.
    """
    style = None if digits is None else f"%.{digits}g"
    write_atomically(file, lambda path: table.to_csv(path, index=False, float_format=style, lineterminator="\n"))


def cell_files(folder: Path) -> list[Path]:
    """List the tables of the finished cells in a folder, by name."""
    # Unlike a shell's, this pattern matches hidden files: what a killed process had begun would be read as a cell.
    return sorted(file for file in folder.glob("*.csv") if not file.name.startswith("."))


def _as_text(csv: str) -> pd.DataFrame:
    return pd.read_csv(StringIO(csv), dtype=str, keep_default_na=False)


def _keys(table: pd.DataFrame, names: Sequence[str]) -> list[tuple[object, ...]]:
    """Values of key columns, with 1 and 1.0 alike: a column is printed as integers where no cell of it is empty."""
    return list(zip(*([_value(text) for text in table[name].astype(str)] for name in names), strict=True))


def _ranks(table: pd.DataFrame, names: Sequence[str]) -> list[Rank]:
    # Text and numbers do not compare; a column of either kind does, with the empty cells last.
    return [tuple((isinstance(value, str), value == "", value) for value in cells) for cells in _keys(table, names)]


def _value(text: str) -> object:
    try:
        number = float(text)
    except ValueError:
        return text
    return text if math.isnan(number) else number  # nan never equals itself, so that its cell would be a new one


def markdown(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Write a Markdown table, its rule with spaces; see `header` for one without, as other READMEs have it."""
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def row(*cells: object) -> str:
    """Write one row of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def header(*names: object) -> str:
    """Write the head of a Markdown table and its rule, without spaces."""
    return row(*names) + "\n" + "|---" * len(names) + "|"


def points(share: float) -> str:
    """A difference of shares, in percentage points with its sign."""
    return f"{100 * share:+.2f}"


def interval(mean: float, low: float, high: float) -> str:
    """A mean difference of shares with the ends of its interval, in percentage points."""
    return f"{points(mean)} ({points(low)} to {points(high)})"


def gain_interval(differences: Iterable[float]) -> str:
    """The mean of paired differences, with its 95 % bootstrap interval over them, in percentage points."""
    summary = gains(list(differences))
    return interval(summary.mean, summary.low, summary.high)


def save_figure(figure: Figure, file: Path, *, dpi: int = 110) -> None:
    """Write a figure as PNG."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=dpi)


def splice(file: Path, start: str, end: str, text: str) -> None:
    """Replace what lies between two marks of a file, marks left alone.

    Args:
        file: a text file.
        start: the mark before the replaced text, once in the file.
        end: the mark after it: its first place after `start`.
        text: the new text.

    Raises:
        ZooError: if the file does not hold `start` exactly once, or `end` after it. The file stays as it is.
    """
    content = file.read_text(encoding="utf-8")
    if content.count(start) != 1:
        raise ZooError(f"{file.name} holds {content.count(start)} times {start!r}; expected once")
    before = content.index(start) + len(start)
    if end not in content[before:]:
        raise ZooError(f"{file.name} holds no {end!r} after {start!r}")
    after = content.index(end, before)
    file.write_text(content[:before] + text + content[after:], encoding="utf-8")


def provenance_text(file: Path) -> str:
    """Give the facts of a provenance file in one line, for a README, and how many earlier runs the file keeps."""
    record = json.loads(file.read_text(encoding="utf-8"))
    runs = len(record.pop("earlier", []))
    return ", ".join(f"{key} {value}" for key, value in record.items()) + (f", earlier runs {runs}" if runs else "")
