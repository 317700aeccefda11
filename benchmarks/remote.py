"""From a Hub on this machine: two of eight models of 88 MB, the index of a zoo of 1.1 TB, all rows of two zoos.

LitData takes part where it is installed; see `stream.py`.

python benchmarks/remote.py [--smoke] [--json FILE]
"""

import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import side_by_side

sys.path.insert(0, str(side_by_side.REPOSITORY / "tests"))

import paper_zoo
from local_hub import LocalHub

MODELS = 8
CHOSEN = [1, 6]  # in two shards
ROUNDS = 3
STORED = side_by_side.VIT_S
SMALL_ROWS = 500
SMOKE = {"ROUNDS": 1, "STORED": side_by_side.MICRO, "SMALL_ROWS": 40}
NAME, LARGE, SMALL = "ModelZoos/eight", "ModelZoos/paper", "ModelZoos/small"

TIMED = """
import json, time
{imports}
start = time.perf_counter()
{work}
print(json.dumps([time.perf_counter() - start, result]))
"""
OURS = f"""
chosen = vz.Zoo({NAME!r}).filter(factor_seed={CHOSEN})
"""
COUNT = "result = sum(row['weights'].size for row in chosen.rows({options}))"
WAYS = {
    "vz.Zoo(id).filter(…).rows()": (
        "import datasets\nimport vitzoo_hf as vz; vz.Zoo",
        OURS + COUNT.format(options=""),
    ),
    "vz.Zoo(id).filter(…).rows(verify=False)": (
        "import datasets\nimport vitzoo_hf as vz; vz.Zoo",
        OURS + COUNT.format(options="verify=False"),
    ),
    "vz.Zoo(id).filter(…).stream(tensors=['blocks.*.attn.qkv.weight'], verify=False)": (
        "import datasets\nimport vitzoo_hf as vz; vz.Zoo",
        OURS
        + "batches = chosen.stream(tensors=['blocks.*.attn.qkv.weight'], verify=False)\n"
        + "result = sum(batch['weights'].numel() for batch in batches)",
    ),
    "load_dataset(id, 'weights', streaming=True, filters=…)": (
        "from datasets import load_dataset\nfrom vitzoo_hf.models.rebuild import weights_of",
        f"""
rows = load_dataset({NAME!r}, "weights", split="train", streaming=True, filters=[("factor_seed", "in", {CHOSEN})])
result = sum(weights_of(row).size for row in rows)
""",
    ),
    "hf_hub_download of the 2 shards, then pyarrow": (
        "from huggingface_hub import hf_hub_download\nimport pyarrow.parquet as pq",
        f"""
names = SHARDS
files = [hf_hub_download({NAME!r}, name, repo_type="dataset") for name in names]
tables = [pq.read_table(file, filters=[("factor_seed", "in", {CHOSEN})]) for file in files]
result = sum(len(value.as_buffer()) // 4 for table in tables for value in table["weights"])
""",
    ),
}
INDEX = {
    "vz.Zoo(id).filter(…)": (
        "import datasets\nimport vitzoo_hf as vz; vz.Zoo",
        f"result = len(vz.Zoo({LARGE!r}).filter(**{paper_zoo.WHERE!r}))",
    ),
    "load_dataset(id, 'index').to_pandas()": (
        "from datasets import load_dataset",
        f"result = sum(len(rows.to_pandas()) for rows in load_dataset({LARGE!r}, 'index').values())",
    ),
}
STREAMED = {
    "vz.Zoo(id).stream(batch_size=1)": (
        "import datasets\nimport vitzoo_hf as vz; vz.Zoo",
        "result = sum(len(batch['weights']) for batch in vz.Zoo(ID).stream(batch_size=1))",
    ),
    "load_dataset(id, 'weights', streaming=True), weights_of": (
        "from datasets import load_dataset\nfrom vitzoo_hf.models.rebuild import weights_of",
        "rows = load_dataset(ID, 'weights', split='train', streaming=True).with_format('arrow')\n"
        "result = sum(weights_of(row).ndim for row in rows)",
    ),
    "litdata.StreamingDataset('hf://…'), weights alone": (
        "from litdata import StreamingDataset, index_parquet_dataset\n"
        "from litdata.streaming.item_loader import ParquetLoader\nimport os, torch",
        "place = f'hf://datasets/{ID}/weights'\nindex = os.path.join(os.environ['HOME'], 'index')\n"
        "os.makedirs(index)\nindex_parquet_dataset(place, index)\n"
        "rows = StreamingDataset(place, item_loader=ParquetLoader(columns=['weights']), index_path=index)\n"
        "result = sum(len(row['weights']) > 0 for row in rows)",
    ),
}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    with tempfile.TemporaryDirectory() as folder, LocalHub(Path(folder) / "hub") as hub:
        place = side_by_side.random_zoo(Path(folder) / "eight", STORED, MODELS)
        hub.publish(NAME, place)
        (Path(folder) / "paper").mkdir()
        paper_zoo.write_light_files(Path(folder) / "paper")
        hub.publish(LARGE, Path(folder) / "paper")
        shards = [f"weights/{file.name}" for file in sorted((place / "weights").iterdir())]
        ways = {way: (imports, work.replace("SHARDS", repr(shards))) for way, (imports, work) in WAYS.items()}
        rows = figures(hub, Path(folder), f"2 of {MODELS} models of 88 MB", ways)
        rows += figures(hub, Path(folder), "index of 12,900 models, 1.1 TB", INDEX)
        hub.publish(SMALL, side_by_side.random_zoo(Path(folder) / "small", side_by_side.NANO, SMALL_ROWS))
        for what, name in (
            (f"all of {SMALL_ROWS} models of 108 kB", SMALL),
            (f"all of {MODELS} models of 88 MB", NAME),
        ):
            ways = {way: (imports, f"ID = {name!r}\n{work}") for way, (imports, work) in STREAMED.items()}
            if find_spec("litdata") is None:
                ways.popitem()
            rows += figures(hub, Path(folder), what, ways)
    side_by_side.report("remote", rows, given)


def figures(hub: LocalHub, folder: Path, what: str, ways: dict[str, tuple[str, str]]) -> list[dict]:
    """Bytes and median seconds of each way, every time in a new process with an empty cache."""
    taken: dict[str, list[tuple[float, int, int]]] = {way: [] for way in ways}
    for _ in range(ROUNDS):
        for way, (imports, work) in ways.items():
            before, requests = hub.bytes_served, len(hub.requests)
            with tempfile.TemporaryDirectory(dir=folder) as home:
                seconds, result = hub.run(TIMED.format(imports=imports, work=work), Path(home))
            taken[way].append((seconds, hub.bytes_served - before, len(hub.requests) - requests))
            print(f"{way}: {result}, {seconds:.2f} s", file=sys.stderr)
    base = max(size for _, size, _ in taken[next(iter(ways))])
    return [
        {
            "what": what,
            "way": way,
            "mb_moved": max(size for _, size, _ in rounds) / 1e6,
            "times_ours": max(size for _, size, _ in rounds) / base,
            "requests": max(count for _, _, count in rounds),
            "seconds": statistics.median(seconds for seconds, _, _ in rounds),
        }
        for way, rounds in taken.items()
    ]


if __name__ == "__main__":
    main()
