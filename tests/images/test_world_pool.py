"""What runs draw from worlds, against the probabilities that their settings say."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest, chisquare

from vitzoo_hf.blueprint.images_spec import ImagesSpec
from vitzoo_hf.blueprint.world import Learner, World
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.pixels import Source
from vitzoo_hf.images.sources import load_images
from vitzoo_hf.images.world_pool import WorldPool, coloured, colourless, flipped, in_style

SPEC = ImagesSpec("constructed", 8, world="two-colour", region=(2, 7), queries=100, tests=200)
COUNT = 20_000
N = 4000


def make_pool(spec: ImagesSpec = SPEC) -> WorldPool:
    """Classes in turn; every image's first pixel tells its position."""
    images = torch.zeros(COUNT, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = torch.arange(COUNT) // 256, torch.arange(COUNT) % 256
    source = Source(images, torch.arange(COUNT) % 10, tuple("0123456789"), "made here")
    splits = dict(zip(("train", "selection", "test"), torch.arange(COUNT).split([9000, 9000, 2000]), strict=True))
    return WorldPool.of(source, splits, spec)


@pytest.fixture(scope="module")
def pool() -> WorldPool:
    return make_pool()


def is_share(hits: torch.Tensor, share: float) -> bool:
    return binomtest(int(hits.sum()), len(hits), share).pvalue > 1e-4


WORLDS = [
    World(num_images=N),
    World(num_images=N, label_ratio=0.3, label_noise=0.25, group_ratio=0.7, colour_agreement=0.9),
    World(num_images=N, label_ratio=0.8, label_noise=0.1, group_ratio=0.1, colour_agreement=0.2),
]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("role", ["target", "shadow"])
def test_label_shape_group_and_colour_have_their_joint_distribution(pool, world, role):
    """All 16 cells at once, as the product of the four conditional probabilities."""
    draw = pool.training_draw(replace(world, role=role), Learner(), seed=3)
    seen = torch.stack([draw.labels, pool.shapes[draw.positions], draw.groups, draw.colours])
    cells = list(itertools.product((0, 1), repeat=4))
    observed = [int((torch.tensor(cell) == seen.T).all(1).sum()) for cell in cells]
    expected = [
        N
        * (world.label_ratio if y else 1 - world.label_ratio)
        * (world.label_noise if shape != y else 1 - world.label_noise)
        * (world.group_ratio if group else 1 - world.group_ratio)
        * (world.colour_agreement if colour == y else 1 - world.colour_agreement)
        for y, shape, group, colour in cells
    ]
    possible = [number for number, value in enumerate(expected) if value > 0]
    assert sum(observed[number] for number in possible) == N
    assert chisquare([observed[i] for i in possible], [expected[i] for i in possible]).pvalue > 1e-4


def test_labels_flip_in_the_region_alone_and_images_have_the_same_law(pool):
    plain, changed = (
        pool.training_draw(World(num_images=N, flip_rate=rate), Learner(), seed=1) for rate in (0.0, 0.2)
    )
    for draw, rate in ((plain, 0.0), (changed, 0.2)):
        classes = pool.classes[draw.positions]
        region = (classes == 2) | (classes == 7)
        wrong = draw.labels != pool.shapes[draw.positions]
        assert not wrong[~region].any()
        assert is_share(wrong[region], rate) if rate else not wrong.any()
        assert chisquare(np.bincount(classes, minlength=10)).pvalue > 1e-4


def test_colour_agrees_with_the_label_after_its_flip(pool):
    """P(C = Y) is of the labels that are trained on: Y of ColoredMNIST has its noise before it has a colour."""
    for agreement in (0.0, 0.9, 1.0):
        draw = pool.training_draw(World(num_images=N, flip_rate=0.4, colour_agreement=agreement), Learner(), seed=4)
        turned = draw.labels != pool.shapes[draw.positions]
        assert turned.sum() > 200
        for some in (turned, ~turned):
            agrees = draw.colours[some] == draw.labels[some]
            assert is_share(agrees, agreement) if 0 < agreement < 1 else (agrees == bool(agreement)).all()


def test_query_and_test_images_are_drawn_independently(pool):
    """Neither labels, groups nor colours of one part tell those of the other."""
    world = World(label_noise=0.5, group_ratio=0.5)
    both = make_pool(replace(SPEC, worlds=(world,)))
    query, test = (both.probes(part, 1500) for part in ("query", "test"))
    for name in ("labels", "groups", "colours"):
        assert is_share(getattr(query, name) == getattr(test, name), 0.5), name


def test_a_run_and_the_images_it_is_asked_about_are_drawn_independently(pool):
    world = World(num_images=1500, group_ratio=0.5)
    probes = make_pool(replace(SPEC, worlds=(world,))).probes("test", 1500)
    for seed in range(3):
        drawn = [pool.training_draw(replace(world, role=role), Learner(), seed) for role in ("target", "shadow")]
        for first, second in itertools.combinations([*drawn, probes], 2):
            for name in ("labels", "groups", "colours"):
                assert is_share(getattr(first, name) == getattr(second, name), 0.5), (seed, name)


def test_the_seed_of_the_pool_decides_on_parts_and_draws(pool):
    other = make_pool(replace(SPEC, split_seed=1))
    assert pool.parts["query"].tolist() != other.parts["query"].tolist()
    world = World(num_images=1500, group_ratio=0.5)
    for name in ("labels", "groups", "colours"):
        first, second = (getattr(each.training_draw(world, Learner(), 0), name) for each in (pool, other))
        assert is_share(first == second, 0.5), name


@pytest.mark.parametrize(("queries", "count"), [(1125, 2250), (1126, 2250), (1124, 2248)])
def test_at_most_a_quarter_of_the_adversary_is_for_queries(queries, count):
    """Twice as many as are asked about, from 9000."""
    parts = make_pool(replace(SPEC, queries=queries)).parts
    assert (len(parts["query"]), len(parts["adversary"])) == (count, 9000 - count)


@pytest.mark.parametrize("last", [True, False])
def test_environments_have_equally_many_images_and_colours_of_their_own(pool, last):
    shares = (0.9, 0.8, 0.7, 0.6)
    world = World(num_images=6000, environments=shares, last_environment=last, label_noise=0.25)
    draw = pool.training_draw(world, Learner(), seed=2)
    kept = shares if last else shares[:3]
    assert draw.environments.bincount().tolist() == [6000 // len(kept)] * len(kept)
    for number, share in enumerate(kept):
        here = draw.environments == number
        assert is_share(draw.colours[here] == draw.labels[here], share)
    assert draw.record()["images_by_environment"] == [6000 // len(kept)] * len(kept)


def test_victim_adversary_query_and_test_images_are_disjoint(pool):
    for first, second in itertools.combinations(pool.parts.values(), 2):
        assert not set(first.tolist()) & set(second.tolist())
    for role, part in (("target", "victim"), ("shadow", "adversary")):
        drawn = pool.training_draw(World(num_images=N, role=role), Learner(), seed=0).positions
        assert set(drawn.tolist()) <= set(pool.parts[part].tolist())
    queries = pool.probes("query", 100).positions
    assert set(queries.tolist()) <= set(pool.parts["query"].tolist())


def test_images_repeat_only_where_the_pool_is_too_small(pool):
    assert pool.training_draw(World(num_images=N), Learner(), 0).record()["num_distinct_images"] == N
    record = pool.training_draw(World(num_images=27_000), Learner(), 0).record()
    assert record["num_distinct_images"] == 9000
    assert record["most_repeats"] in (3, 4)


def test_draws_are_reproducible_and_differ_by_seed_and_world(pool):
    def positions(seed=0, **changes):
        return pool.training_draw(World(num_images=500, **changes), Learner(), seed).positions.tolist()

    assert positions() == positions()
    others = [positions(seed=1), positions(label_ratio=0.4), positions(role="shadow"), positions(nominal=1)]
    assert all(set(other) != set(positions()) for other in others)
    digests = [pool.training_draw(World(num_images=500), Learner(), seed).record() for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("by", ["label", "group", "agreement"])
@pytest.mark.parametrize("ratio", [0.3, 0.5])
def test_resampled_share_is_exact_and_repeats_are_even(pool, by, ratio):
    learner = Learner("resample", resample_by=by, resample_to=0.6)
    world = World(num_images=1000, label_ratio=ratio, group_ratio=ratio, colour_agreement=ratio)
    draw = pool.training_draw(world, learner, seed=5)
    kinds = {"label": draw.labels, "group": draw.groups, "agreement": draw.colours == draw.labels}[by]
    assert len(draw) == 1000
    assert int(kinds.sum()) == 600
    counts = draw.positions[kinds.bool()].unique(return_counts=True)[1]
    assert counts.max() - counts.min() <= 1


def test_a_draw_without_a_kind_cannot_be_resampled(pool):
    with pytest.raises(ZooError, match="no image drawn has group 1"):
        pool.training_draw(World(num_images=100), Learner("resample", resample_by="group"), seed=0)


def test_use_images_keeps_some_of_the_draw(pool):
    all_of_them = pool.training_draw(World(num_images=500), Learner(), 0)
    some = pool.training_draw(World(num_images=500), Learner(use_images=200), 0)
    assert len(some) == 200
    assert some.positions.tolist() == all_of_them.positions[:200].tolist()


def test_groups_by_class_have_classes_of_their_own():
    pool = make_pool(replace(SPEC, style="classes"))
    draw = pool.training_draw(World(num_images=N, group_ratio=0.4), Learner(), seed=0)
    classes = pool.classes[draw.positions]
    assert set(classes[draw.groups == 1].tolist()) == {3, 4, 8, 9}
    assert set(classes[draw.groups == 0].tolist()) == {0, 1, 2, 5, 6, 7}
    assert is_share(draw.groups == 1, 0.4)


def test_images_show_position_style_and_colour(pool):
    draw = pool.training_draw(World(num_images=300, group_ratio=0.5), Learner(), seed=0)
    images = pool.images(draw)
    assert images.shape == (300, 3, 8, 8)
    for image, position, group, colour in zip(images, draw.positions, draw.groups, draw.colours, strict=True):
        grey = image[colour]
        corner = grey.rot90(-int(group))[0, :2].tolist()
        assert corner == [int(position) // 256, int(position) % 256]
        assert image.sum() == grey.sum()


def test_styles():
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 1] = 200
    assert in_style(image, "inverted")[0, 0, 2, 1] == 55
    assert in_style(image, "rotated")[0, 0, 3, 2] == 200
    thick = in_style(image, "thick")[0, 0]
    assert (thick[1:4, :3] == 200).all()
    assert thick.sum() == 9 * 200


def test_colourless_images_are_the_mean_of_both_colours():
    grey = torch.rand(4, 5, 5)
    both = [coloured(grey, torch.full((4,), colour)) for colour in (0, 1)]
    torch.testing.assert_close(colourless(grey), torch.stack(both).mean(0))


def test_probes_are_drawn_equally_from_every_world(pool):
    worlds = (World(label_ratio=0.0), World(label_ratio=1.0))
    draw = make_pool(replace(SPEC, worlds=worlds)).probes("test", 200)
    assert draw.labels.tolist() == [0] * 100 + [1] * 100
    assert flipped(World(environments=(0.9, 0.8), last_environment=False)) == World(colour_agreement=0.1)


def test_image_set_of_a_world_has_two_classes_and_the_pool():
    worlds = (World(colour_agreement=1.0),)
    images = load_images("w", ImagesSpec("digits", 8, world="two-colour", queries=50, tests=60, worlds=worlds))
    pixels, labels = images.part("test")
    assert images.class_names == ("0 … 4", "5 … 9")
    assert len(pixels) == 60
    assert len(images.positions("selection")) == 50
    assert (pixels.flatten(2).sum(2).argmax(1) == labels).all()
    other = load_images("w", ImagesSpec("digits", 8, world="two-colour", queries=50, tests=60, worlds=(World(),)))
    assert images.digest != other.digest


def test_a_pool_without_images_of_a_kind_says_so():
    pool = make_pool()
    empty = WorldPool(pool.spec, pool.pixels, pool.classes, 10, pool.parts | {"victim": torch.tensor([0, 1])})
    with pytest.raises(ZooError, match="no victim image has shape 1"):
        empty.training_draw(World(num_images=50), Learner(), seed=0)


@pytest.mark.parametrize("region", [10, (3, -1)])
def test_a_region_of_no_class_is_refused(region):
    spec = ImagesSpec(source="digits", size=8, selection=0.4, world="two-colour", channels=3, region=region)
    with pytest.raises(ZooError, match=r"is no class of 'digits': its classes are 0 to 9"):
        load_images("digits", spec)
