"""A stream loses and repeats no row, whatever drives it, wherever it ends, and whoever continues it."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from stream_loop import Loop, played, read

from vitzoo_hf.zoo import Zoo

ENDINGS, RESUMED = ("end", "break", "kill"), ("same", "other")


def cells():
    loaders = [("plain", 0, "fork", False)]
    for driver in ("DataLoader", "StatefulDataLoader"):
        loaders.append((driver, 0, "fork", False))
        loaders += [(driver, 2, *rest) for rest in itertools.product(("fork", "spawn"), (False, True))]
    return [(*loader, *rest) for loader in loaders for rest in itertools.product(ENDINGS, RESUMED, (1, 3))]


QUICK = {
    ("plain", 0, "fork", False, "kill", "other", 3),
    ("plain", 0, "fork", False, "break", "same", 1),
    ("DataLoader", 0, "fork", False, "end", "other", 3),
    ("DataLoader", 2, "fork", False, "kill", "other", 3),
    ("DataLoader", 2, "fork", True, "break", "same", 3),
    ("DataLoader", 2, "fork", True, "kill", "other", 1),
    ("DataLoader", 2, "fork", False, "end", "same", 1),
    ("StatefulDataLoader", 0, "fork", False, "kill", "other", 3),
    ("StatefulDataLoader", 0, "fork", False, "break", "same", 1),
    ("StatefulDataLoader", 2, "fork", True, "kill", "same", 3),
    ("StatefulDataLoader", 2, "fork", False, "end", "same", 1),
    ("StatefulDataLoader", 2, "fork", True, "break", "other", 3),
}


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=[] if cell in QUICK else [pytest.mark.slow], id=str(cell)) for cell in cells()],
)
def test_no_row_is_lost_or_repeated(cell, tiny_zoo, tmp_path):
    driver, workers, start, persistent, ending, resumed, layouts = cell
    loop = Loop(str(tiny_zoo), layouts, driver, workers, start, persistent)
    other = replace(loop, world_size=3, workers=1 if workers else 0) if resumed == "other" else loop
    logs = played(loop, tmp_path, ending, other)
    rows = Zoo(tiny_zoo)
    ids = [row.model_id for row in rows.rows() if layouts > 1 or row.layout == rows.row(rows.model_ids[-1]).layout]
    first, second = logs[: loop.world_size], logs[loop.world_size :]
    for part in (first, second):
        counts = [Counter(epoch for epoch, *_ in read(log)) for log in part]
        assert all(count == counts[0] for count in counts), "ranks have unequal numbers of batches"
    seen = {}
    for log in logs:
        for epoch, names, repeated in read(log):
            if not (ending == "break" and epoch == 1 and log in second) and not repeated:
                seen.setdefault(epoch, []).extend(names)
    expected = range(2) if ending == "break" else range(3)
    assert {epoch: sorted(names) for epoch, names in seen.items()} == {epoch: sorted(ids) for epoch in expected}
