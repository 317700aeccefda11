"""A zoo of a million rows: opening it, one row by id, the start of a stream, a pickled stream; light tables are real.

The shards are files of zeros without blocks on the disk, and nothing is compared with its hash. Beside ours, in a
process of its own too, lies the simplest alternative: `pandas.read_parquet` of the index, and a search in it.

python benchmarks/many_rows.py [--smoke] [--json FILE]
"""

import hashlib
import json
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import side_by_side

from vitzoo_hf.format import schema
from vitzoo_hf.zoo import Zoo

COUNTS = (10_000, 100_000, 1_000_000)
GROUP_ROWS, SHARD_ROWS = 37, 4625
SMOKE = {"COUNTS": (1_000,)}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    rows = []
    for count in COUNTS:
        with tempfile.TemporaryDirectory() as folder:
            zoo = large_zoo(Path(folder) / "zoo", count)
            ours, theirs = (measured(way, zoo) for way in ("ours", "pandas"))
        for case, found in ours.items():
            alternative = theirs.get(case)
            ratio = None if alternative is None else round(found / alternative, 3)
            rows.append({"rows": f"{count}", "way": case, "ours": found, "pandas": alternative, "ratio": ratio})
    side_by_side.report("many_rows", rows, given)


def measured(way: str, zoo: Path) -> dict:
    """Results of one way in a fresh process."""
    output = subprocess.run([sys.executable, __file__, way, zoo], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(output.stdout.splitlines()[-1])


def large_zoo(folder: Path, count: int) -> Path:
    """A zoo whose index repeats the rows of the sample with ids, runs, parents and hashes of their own."""
    sample = Zoo.sample()
    size = 4 * sample.row(sample.model_ids[0]).num_parameters
    real = sample._tables.read("index", "train")
    real = real.filter(pc.equal(real["num_parameters"], size // 4))
    table = real.take(pa.array(np.arange(count) % len(real)))
    numbers = pc.cast(pa.array(np.arange(count)), pa.string())
    digits = pc.utf8_lpad(numbers, 64, "a")
    for name, values in {
        "model_id": pc.binary_join_element_wise("run", numbers, "@9", ""),
        "run_id": pc.binary_join_element_wise("run", numbers, ""),
        "weights_sha256": digits,
        "factor_seed": pa.array(np.arange(count)),
    }.items():
        place = table.column_names.index(name)
        table = table.set_column(place, table.schema.field(place), values.cast(table.schema.field(place).type))
    for part in ("index", "weights"):
        (folder / part).mkdir(parents=True)
    index = folder / "index" / "train-00000-of-00001.parquet"
    pq.write_table(table, index, compression="zstd")
    shards = {}
    number_of_shards = -(-count // SHARD_ROWS)
    for number in range(number_of_shards):
        held = min(SHARD_ROWS, count - number * SHARD_ROWS)
        name = f"weights/train-{number:05d}-of-{number_of_shards:05d}.parquet"
        groups, end = [], 4
        for start in range(0, held, GROUP_ROWS):
            rows = min(GROUP_ROWS, held - start)
            end += size * rows + 5_000
            groups.append([rows, end])
        with (folder / name).open("wb") as file:
            file.truncate(end + 1_000)
        shards[name] = {"rows": held, "bytes": end + 1_000, "sha256": "0" * 64, "gap": 0, "groups": groups}
    (folder / schema.SHARDS).write_text(json.dumps(shards))
    (folder / schema.LAYOUTS).write_text(json.dumps({k: v.to_json() for k, v in sample.layouts.items()}))
    (folder / "blueprint.yaml").write_text(sample.blueprint_text)
    listed = [index, folder / schema.SHARDS, folder / schema.LAYOUTS, folder / "blueprint.yaml"]
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in listed
    }
    (folder / schema.MANIFEST).write_text(json.dumps({**sample.manifest, "files": files}))
    return folder


def memory() -> float:
    """Largest memory of this program so far, GB; getrusage would count that of the process that started it."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e6


def ours(place: str) -> dict:
    """Zoo."""
    Zoo.sample().stream()  # what the first use imports
    before, start = memory(), time.perf_counter()
    zoo = Zoo(place)
    found = {"open, s": time.perf_counter() - start, "open, GB more": memory() - before}
    ids = zoo.model_ids[:: max(1, len(zoo) // 200)]
    start = time.perf_counter()
    zoo.row(ids[1])
    found["first row by id, ms"] = 1e3 * (time.perf_counter() - start)
    times = []
    for model_id in ids:
        start = time.perf_counter()
        zoo.row(model_id)
        times.append(1e3 * (time.perf_counter() - start))
    found["row by id, ms"] = statistics.median(times)
    before, start = memory(), time.perf_counter()
    next(iter(zoo.stream(batch_size=16, shuffle=True, verify=False, num_workers=0)))
    found |= {"start of a stream, s": time.perf_counter() - start, "start of a stream, GB more": memory() - before}
    few = zoo.filter(model_id=ids[:100])
    found["pickled stream of 100 rows, kB"] = len(pickle.dumps(few.stream())) / 1e3
    return found


def pandas(place: str) -> dict:
    """`pandas.read_parquet`, and `frame[frame.model_id == id]`."""
    import pandas as pd

    pd.read_parquet(next((Path(Zoo.sample().source[0]) / "index").glob("train-*")))
    before, start = memory(), time.perf_counter()
    frame = pd.read_parquet(next(Path(place).glob("index/*")))
    found = {"open, s": time.perf_counter() - start, "open, GB more": memory() - before}
    times = []
    for model_id in frame["model_id"][:: max(1, len(frame) // 20)]:
        start = time.perf_counter()
        frame[frame["model_id"] == model_id].to_dict("records")
        times.append(1e3 * (time.perf_counter() - start))
    found["row by id, ms"] = statistics.median(times)
    return found


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["pandas"]):
        print(json.dumps({"ours": ours, "pandas": pandas}[sys.argv[1]](sys.argv[2])))
    else:
        main()
