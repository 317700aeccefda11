"""Rebuilding a ViT-S from a row in memory: ours beside create_model + load_state_dict.

python benchmarks/reconstruct.py [--smoke] [--json FILE]
"""

import json
import statistics
import time

import side_by_side
import torch

from vitzoo_hf.format.layout import Layout, unflatten
from vitzoo_hf.models.rebuild import reconstruct
from vitzoo_hf.models.vit import create, skeleton_and_layout
from vitzoo_hf.timm_import import import_timm

ROUNDS = 15
FIRST = 5
REBUILT = side_by_side.VIT_S
SMOKE = {"ROUNDS": 1, "FIRST": 1, "REBUILT": side_by_side.MICRO}


def main() -> None:
    given = side_by_side.parsed(side_by_side.parser(__doc__), globals(), SMOKE)
    torch.set_num_threads(1)
    timm = import_timm()
    name, args, _, _ = REBUILT
    (row,) = side_by_side.random_rows(REBUILT, 1)
    create(name, args)  # both ways start with timm imported and its registry filled

    first = []
    for _ in range(FIRST):
        skeleton_and_layout.cache_clear()
        start = time.process_time()
        reconstruct(row, verify=False)
        first.append(time.process_time() - start)

    def by_timm() -> torch.nn.Module:
        model = timm.create_model(row["architecture"], **json.loads(row["architecture_args"]))
        state = unflatten(torch.from_numpy(row["weights"]), Layout.of(model.state_dict()))
        model.load_state_dict(state)
        return model.eval()

    ours = reconstruct(row, verify=False)
    storages = {parameter.untyped_storage().data_ptr() for parameter in ours.parameters()}
    copies = int(storages != {torch.from_numpy(row["weights"]).untyped_storage().data_ptr()})
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), by_timm().parameters(), strict=True))

    ways = {
        "create_model + load_state_dict": by_timm,
        "reconstruct(verify=False), second of its architecture on": lambda: reconstruct(row, verify=False),
        "reconstruct, hash and finiteness checked": lambda: reconstruct(row),
        "reconstruct(verify=False, copy=True)": lambda: reconstruct(row, verify=False, copy=True),
    }
    taken = side_by_side.interleaved(ways, ROUNDS)
    base = taken["create_model + load_state_dict"]["cpu_s"]
    fresh = statistics.median(first)
    rows = [
        {
            "way": "reconstruct(verify=False), first of its architecture",
            "cpu_ms": 1e3 * fresh,
            "times_faster": base / fresh,
        }
    ]
    rows += [{"way": way, "cpu_ms": 1e3 * t["cpu_s"], "times_faster": base / t["cpu_s"]} for way, t in taken.items()]
    rows = [
        row | {"second_copies_of_the_weights": copies if "reconstruct(verify=False), " in row["way"] else ""}
        for row in rows
    ]
    side_by_side.report("reconstruct", rows, given)


if __name__ == "__main__":
    main()
