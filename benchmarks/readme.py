"""Put the figures of results/*.csv into the table of README.md.

python benchmarks/readme.py
"""

import csv
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

LINES = (
    ("size of 88 MB rows in Parquet, over raw", "storage", "ViT-S, 22.05M", "ours, float32", "size_over_raw_float32", "{:.4f} ×"),
    ("writing 88 MB rows, over `Dataset.to_parquet` of a list column", "storage", "ViT-S, 22.05M", "ours, float32", "times_to_parquet_on_list", "{:.0f} × as fast"),
    ("streaming 88 MB rows into reused memory, over `pyarrow.read_row_group`", "stream", "88 MB", "pyarrow.read_row_group", "ours_over_it_wall", "{:.2f} ×"),
    ("the same over `load_dataset(streaming=True)`, list column, format torch", "stream", "88 MB", "load_dataset(streaming=True).with_format('torch'), list column", "ours_over_it_wall", "{:.0f} ×"),
    ("streaming 108 kB rows in batches of 50, over format torch by row, streamed", "stream", "108 kB", "load_dataset(streaming=True).with_format('torch'), by row", "ours_over_it_wall", "{:.0f} ×"),
    ("the same, hashing every row for the first time", "stream", "108 kB", "zoo.stream(batch_size=50), hashing every row", "rows_per_s", "{:.0f} rows/s"),
    ("rebuilding a ViT-S from a row in memory, over `create_model` + `load_state_dict`", "reconstruct", None, "reconstruct(verify=False), second of its architecture on", "times_faster", "{:.0f} × as fast"),
    ("the same, first of its architecture", "reconstruct", None, "reconstruct(verify=False), first of its architecture", "times_faster", "{:.0f} ×"),
)  # fmt: skip


def table() -> str:
    """The lines of the table, with machine, versions and commit of the results."""
    lines = ["| data path, side by side in one process | measured |", "|---|---|"]
    for label, name, row, way, column, form in LINES:
        found = next(line for line in read(name) if line["way"] == way and line.get("row", line.get("rows")) == row)
        lines.append(f"| {label} | {form.format(float(found[column]))} |")
    about = read("stream")[0]
    lines.append(
        f"\nMedians on {about['cores']} cores that others share, torch {about['torch']}, commit {about['commit']}."
    )
    return "\n".join(lines)


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def fill(readme: Path) -> None:
    """Rewrite the table between its marks."""
    marks = r"(<!-- data path: [^\n]*-->\n).*?(<!-- end of data path -->)"
    text = readme.read_text(encoding="utf-8")
    readme.write_text(
        re.sub(marks, lambda match: f"{match[1]}{table()}\n{match[2]}", text, flags=re.DOTALL), encoding="utf-8"
    )


if __name__ == "__main__":
    fill(REPOSITORY / "README.md")
