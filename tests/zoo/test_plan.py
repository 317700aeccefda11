import itertools

import numpy as np
import pytest

from vitzoo_hf.zoo import plan
from vitzoo_hf.zoo.plan import Plan, PlannedRows


def some_rows(seed, count, groups, shapes):
    generator = np.random.default_rng(seed)
    return PlannedRows(
        np.sort(generator.integers(0, max(1, groups), count)),
        generator.integers(1, 100, count),
        generator.integers(0, shapes, count),
    )


def oracle(rows, batch_size, *, only_full, shuffle, seed, epoch, window):
    """Row by row, as the rule reads."""
    groups = [list(part) for _, part in itertools.groupby(range(len(rows.groups)), lambda row: rows.groups[row])]
    windows = groups
    if shuffle:
        generator = np.random.default_rng([seed, epoch])
        windows, size = [], window
        for group in [groups[number] for number in generator.permutation(len(groups))]:
            group_bytes = sum(rows.row_bytes[row] for row in group)
            if size + group_bytes > window:
                windows.append([])
                size = 0
            windows[-1] += group
            size += group_bytes
        windows = [[part[number] for number in generator.permutation(len(part))] for part in windows]
    unfilled, batches = {}, []
    for row in itertools.chain(*windows):
        unfilled.setdefault(rows.shapes[row], []).append(row)
        if len(unfilled[rows.shapes[row]]) == batch_size:
            batches.append(unfilled.pop(rows.shapes[row]))
    return batches if only_full else batches + list(unfilled.values())


@pytest.mark.parametrize("only_full", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize(
    ("count", "groups", "shapes"), [(0, 1, 1), (1, 1, 1), (50, 7, 1), (50, 50, 3), (97, 20, 4), (12, 1, 12)]
)
@pytest.mark.parametrize("window", [1, 300, 10**9])
def test_a_plan_is_that_of_its_rule(only_full, shuffle, count, groups, shapes, window, monkeypatch):
    monkeypatch.setattr(plan, "WINDOW_BYTES", window)
    for seed, batch_size in itertools.product((0, 3), (1, 4, 100)):
        rows = some_rows(seed, count, groups, shapes)
        how = {"only_full": only_full, "shuffle": shuffle, "seed": seed, "epoch": 2}
        found = Plan.of(rows, batch_size, **how)
        batches = [found.batch(number).tolist() for number in range(len(found))]
        assert batches == oracle(rows, batch_size, window=window, **how)
        assert rows.num_batches(batch_size, only_full=only_full) == len(batches)


def test_a_fingerprint_tells_apart_what_changes_a_plan():
    rows = some_rows(0, 20, 5, 2)
    same = PlannedRows(rows.groups + 7, rows.row_bytes, rows.shapes)
    others = [
        PlannedRows(np.arange(20), rows.row_bytes, rows.shapes),
        PlannedRows(rows.groups, rows.row_bytes + 1, rows.shapes),
        PlannedRows(rows.groups, rows.row_bytes, 1 - rows.shapes),
    ]
    known = rows.fingerprint(b"a\nb", [1])
    assert same.fingerprint(b"a\nb", [1]) == known
    found = [other.fingerprint(b"a\nb", [1]) for other in others] + [
        rows.fingerprint(b"ab", [1]), rows.fingerprint(b"a\nb", [2])
    ]  # fmt: skip
    assert len({known, *found}) == 6
