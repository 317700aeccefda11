"""Put the figures of results/*.csv into the tables of README.md.

python benchmarks/readme.py [README]
"""

import csv
import re
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

PAIR_MB = 2 * 88.202656

LINES = (
    ("size of 88 MB rows in Parquet, over raw", "storage", "ViT-S, 22.05M", "ours, float32", "size_over_raw_float32", "{:.4f} ×"),
    ("writing 88 MB rows, over `Dataset.to_parquet` of a list column", "storage", "ViT-S, 22.05M", "ours, float32", "times_to_parquet_on_list", "{:.0f} × as fast"),
    ("streaming 88 MB rows into reused memory, rows verified before, over `pyarrow.read_row_group`", "stream", "88 MB", "pyarrow.read_row_group", "ours_over_it_wall", "{:.2f} ×"),
    ("the same in the first epoch, which hashes every row (2 workers)", "stream", "88 MB", "zoo.stream(reuse=True, num_workers=2), hashing every row", "over_pyarrow", "{:.2f} ×"),
    ("map-style from the cache of `datasets` by `weights_of`, over `safetensors.load_file`", "stream", "88 MB", "map-style from the Arrow cache, weights_of", "over_safetensors", "{:.2f} ×"),
    ("streaming 88 MB rows over `load_dataset(streaming=True)`, list column, format torch", "stream", "88 MB", "load_dataset(streaming=True).with_format('torch'), list column", "ours_over_it_wall", "{:.0f} ×"),
    ("streaming 108 kB rows in batches of 50, over format torch by row, streamed", "stream", "108 kB", "load_dataset(streaming=True).with_format('torch'), by row", "ours_over_it_wall", "{:.0f} ×"),
    ("the same, hashing every row for the first time", "stream", "108 kB", "zoo.stream(batch_size=50), hashing every row", "rows_per_s", "{:.0f} rows/s"),
    ("streaming 88 MB rows over LitData, which reads the weights alone of the same Parquet", "stream", "88 MB", "litdata.StreamingDataset, weights alone", "ours_over_it_wall", "{:.1f} ×"),
    ("streaming 108 kB rows in batches of 50 over LitData, row by row, weights alone", "stream", "108 kB", "litdata.StreamingDataset, weights alone", "ours_over_it_wall", "{:.0f} ×"),
    ("opening a zoo of a million rows", "many_rows", "1000000", "open, s", "ours", "{:.1f} s"),
    ("its memory, of which `pandas.read_parquet` takes more", "many_rows", "1000000", "open, GB more", "ours", "{:.2f} GB"),
    ("a row of a million by its id", "many_rows", "1000000", "row by id, ms", "ours", "{:.2f} ms"),
    ("a pickled stream of 100 of a million rows", "many_rows", "1000000", "pickled stream of 100 rows, kB", "ours", "{:.0f} kB"),
    ("bytes moved for 2 of 8 models of 88 MB on a Hub, over the two models", "remote", "2 of 8 models of 88 MB", "vz.Zoo(id).filter(…).rows()", "ratio", "{:.3f} ×"),
    ("bytes moved to open and filter the index of 12,900 ViT-S (1.1 TB)", "remote", "index of 12,900 models, 1.1 TB", "vz.Zoo(id).filter(…)", "mb_moved", "{:.2f} MB"),
    ("rebuilding a ViT-S from a row in memory, over `create_model` + `load_state_dict`", "reconstruct", None, "reconstruct(verify=False), second of its architecture on", "times_faster", "{:.0f} × as fast"),
    ("the same, first of its architecture", "reconstruct", None, "reconstruct(verify=False), first of its architecture", "times_faster", "{:.0f} ×"),
)  # fmt: skip


def table() -> str:
    """The lines of the table, with machine, versions and commit of the results."""
    lines = ["| data path, side by side in one process | measured |", "|---|---|"]
    for label, name, row, way, column, form in LINES:
        found = next(
            line
            for line in read(name)
            if line["way"] == way and line.get("row", line.get("rows", line.get("what"))) == row
        )
        value = derived(found, column)
        lines.append(f"| {label} | {form.format(value)} |")
    about = read("stream")[0]
    lines.append(
        f"\nMedians on {about['cores']} cores that others share, torch {about['torch']}, commit {about['commit']}."
    )
    return "\n".join(lines)


MEASURES = (
    ("agreement of 250 models on 10,000 images of 100 classes, over a loop of `np.count_nonzero(a == b)` on uint8", "agreement", {"task": "agreement", "way": "np.count_nonzero(a == b) of uint8, loop over pairs"}, "times_ours", "{:.0f} ×"),
    ("the same over a float32 one-hot product", "agreement", {"task": "agreement", "way": "one-hot GEMM, float32"}, "times_ours", "{:.0f} ×"),
    ("the same over `torchmetrics` per pair", "agreement", {"task": "agreement", "way": "torchmetrics multiclass_accuracy"}, "times_ours", "{:.0f} ×"),
    ("debiased CKA of 50 models, 2048 images, 192 features, over `pytorch-cka`", "cka_pairs", {"way": "pytorch-cka cka_from_features"}, "times_cka", "{:.1f} ×"),
    ("the same over `ckatorch`", "cka_pairs", {"way": "ckatorch cka_base, unbiased"}, "times_cka", "{:.0f} ×"),
    ("memory for CKA of 250 models, 10,000 images, 384 features, from files", "cka_from_files", {}, "peak_memory_mb", "{:.0f} MB"),
    ("L2 of 250 × 1M weights that lie 1e-4 apart, over accurate `torch.cdist`", "distances", {"what": "250 x 1M, models 0.0001 apart, in memory", "way": "torch.cdist, donot_use_mm_for_euclid_dist"}, "over_ours_cpu", "{:.0f} ×"),
    ("the same over `torch.cdist` as it is, which is wrong there", "distances", {"what": "250 x 1M, models 0.0001 apart, in memory", "way": "torch.cdist, default (matrix products, wrong: see errors)"}, "over_ours_cpu", "{:.1f} ×"),
    ("distances of 40 ViT-S out of core, of the stream's own rate, cached", "distances", {"what": "40 ViT-S, 3.53 GB, from page cache", "way": "distances"}, "of_the_stream_wall", "{:.2f}"),
    ("the same from disk", "distances", {"what": "40 ViT-S, 3.53 GB, from disk", "way": "distances"}, "of_the_stream_wall", "{:.2f}"),
)  # fmt: skip


def measures() -> str:
    """The lines of the table of metrics, and the slowest case of the population's forward."""
    lines = ["| measured, one thread, processor time where not said otherwise | |", "|---|---|"]
    for label, name, where, column, form in MEASURES:
        found = next(line for line in read(name) if all(line[key] == value for key, value in where.items()))
        lines.append(f"| {label} | {form.format(float(found[column]))} |")
    forward = [line for line in read("population_forward") if line["way"] == "ours" and line["threads"] == "1"]
    ratios = [float(line["ours_over_best_other"]) for line in forward]
    lines.append(
        "| forward of 16 models, three sizes, 1 to 512 images: time over the best of loop, vmap and bmm, worst and best"
        f" case | {max(ratios):.2f} and {min(ratios):.2f} |"
    )
    return "\n".join(lines) + "\n"


def derived(found: dict[str, str], column: str) -> float:
    """A column, or a ratio of two lines of the results."""
    if column == "ratio":
        return float(found["mb_moved"]) / PAIR_MB
    peers = {"over_pyarrow": "pyarrow.read_row_group", "over_safetensors": "safetensors.load_file"}
    if column in peers:
        peer = next(line for line in read("stream") if line["way"] == peers[column])
        return float(found["rows_per_s"]) / float(peer["rows_per_s"])
    return float(found[column])


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def fill(readme: Path) -> None:
    """Rewrite the table between its marks."""
    marks = r"(<!-- data path: [^\n]*-->\n).*?(<!-- end of data path -->)"
    text = re.sub(
        marks,
        lambda match: f"{match[1]}{table()}\n{match[2]}",
        readme.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    marks = r"(<!-- measures: [^\n]*-->\n).*?(<!-- end of measures -->)"
    text = re.sub(marks, lambda match: f"{match[1]}{measures()}{match[2]}", text, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    fill(Path(sys.argv[1]) if len(sys.argv) > 1 else REPOSITORY / "README.md")
