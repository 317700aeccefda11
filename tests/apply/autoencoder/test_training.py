"""Views, recipes and training of the weight autoencoder."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from places import TESTS
from small_autoencoder import SMALL

from vitzoo_hf.apply.autoencoder import training
from vitzoo_hf.apply.autoencoder.metrics import Networks
from vitzoo_hf.apply.autoencoder.recipe import ARMS, AutoencoderRecipe
from vitzoo_hf.apply.autoencoder.tokens import check_finite, vectors_of
from vitzoo_hf.apply.autoencoder.trained import load_autoencoder
from vitzoo_hf.apply.autoencoder.training import query_images, random_views, train_autoencoder
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.zoo import Zoo


@pytest.fixture(scope="module")
def zoo(tiny_zoo) -> Zoo:
    return Zoo(tiny_zoo).filter(stage="finetune", head="mlp")


def test_views_compute_the_same_function_with_other_weights(zoo):
    rows = list(zoo.filter(is_final=True).rows())
    networks = Networks.like(rows[0])
    vectors = torch.stack([torch.from_numpy(row["weights"]) for row in rows])
    before = vectors.clone()
    patches = networks.patches(zoo.probes(rows[0]["dataset"])[0][:20])
    original = networks.logits(vectors, patches)
    for families in (("mlp",), ("heads",), ("mlp", "heads")):
        generator = torch.Generator().manual_seed(3)
        views = random_views(vectors, networks.layout, networks.vit, families, generator)
        assert (views != vectors).any()
        torch.testing.assert_close(views.sort(1).values, vectors.sort(1).values, rtol=0, atol=0)
        torch.testing.assert_close(networks.logits(views, patches), original, rtol=1e-5, atol=1e-5)
        again = random_views(vectors, networks.layout, networks.vit, families, torch.Generator().manual_seed(3))
        assert torch.equal(views, again)
    assert torch.equal(vectors, before)
    assert random_views(vectors, networks.layout, networks.vit, (), torch.Generator()) is vectors


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains_and_begins_at_scale_one(zoo, arm):
    losses = []
    trained = train_autoencoder(zoo, SMALL.arm(arm), on_step=lambda step, values: losses.append(values))
    assert trained.step == 6
    assert losses[0]["loss"] == pytest.approx(1, abs=1e-6)
    shares = {name for name, share in trained.loss.shares.items() if share}
    assert set(trained.loss.scales) == shares
    assert all(value["gradient"] > 0 for value in losses)


def test_training_lowers_the_loss_and_decoded_models_come_nearer(zoo):
    losses = []
    recipe = replace(SMALL.arm("S"), steps=150, scaling="layer", views=())
    trained = train_autoencoder(zoo, recipe, on_step=lambda step, values: losses.append(values["structure"]))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    vectors = torch.stack([torch.from_numpy(row["weights"]) for row in zoo.filter(split="train").rows()])
    with torch.no_grad():
        latents = trained.encode(vectors)
        decoded = trained.decode(latents)
    assert latents.shape == (len(vectors), trained.tokenizer.num_tokens, 4)
    assert (decoded - vectors).norm() < (vectors - trained.scaling.mean).norm()


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(zoo, monkeypatch):
    calls, told, real = [], {}, training.structural_loss

    def broken(*arguments, **options):
        calls.append(1)
        return real(*arguments, **options) * (torch.nan if len(calls) == 3 else 1)

    def keep(step, losses):
        told[step] = losses

    monkeypatch.setattr(training, "structural_loss", broken)
    trained = train_autoencoder(zoo, SMALL.arm("S"), on_step=keep)
    assert [told[step]["skipped"] for step in range(1, 7)] == [0, 0, 1, 0, 0, 0]
    assert sum(entry["skipped"] for entry in trained.history) == 1
    assert all(value.isfinite().all() for value in trained.model.state_dict().values())


class StopError(Exception):
    """Stands for a kill."""


def test_interrupted_training_ends_in_the_same_weights(zoo, tmp_path, monkeypatch):
    monkeypatch.setattr("vitzoo_hf.apply.autoencoder.training.SAVE_EVERY", 2)
    recipe = SMALL.arm("C+S+B")
    whole = train_autoencoder(zoo, recipe, tmp_path / "whole")

    def stop(step, losses):
        if step == 5:
            raise StopError

    with pytest.raises(StopError):
        train_autoencoder(zoo, recipe, tmp_path / "cut", on_step=stop)
    steps = []
    resumed = train_autoencoder(zoo, recipe, tmp_path / "cut", on_step=lambda step, losses: steps.append(step))
    assert steps == [5, 6]
    assert resumed.loss.scales == whole.loss.scales
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    assert resumed.history == whole.history
    steps.clear()
    train_autoencoder(zoo, recipe, tmp_path / "cut", on_step=lambda step, losses: steps.append(step))
    assert steps == []


def test_another_recipe_and_a_damaged_checkpoint_are_refused(zoo, tmp_path):
    train_autoencoder(zoo, SMALL.arm("S"), tmp_path)
    with pytest.raises(ZooError, match="holds an autoencoder of another recipe"):
        train_autoencoder(zoo, SMALL.arm("S+B"), tmp_path)
    (tmp_path / "autoencoder.safetensors").write_bytes(b"short")
    with pytest.raises(ZooError, match="is damaged: delete it, and train again"):
        train_autoencoder(zoo, SMALL.arm("S"), tmp_path)


def test_models_that_cannot_be_taken_together_are_refused(tiny_zoo, zoo):
    with pytest.raises(ZooError, match="2 layouts; an autoencoder takes one: filter by `head`"):
        train_autoencoder(Zoo(tiny_zoo).filter(stage="finetune"), SMALL)
    with pytest.raises(ZooError, match="no training models among those chosen"):
        train_autoencoder(zoo.filter(split="test"), SMALL)


def test_warmup_is_structure_alone(zoo):
    values = {}
    recipe = replace(SMALL.arm("S+B"), warmup=0.5, steps=6)
    train_autoencoder(zoo, recipe, on_step=lambda step, losses: values.setdefault(step, losses))
    scale = values[1]["structure"]
    for step in (1, 2, 3):
        assert values[step]["loss"] == pytest.approx(values[step]["structure"] / scale, rel=1e-5)
    assert values[4]["loss"] != pytest.approx(values[4]["structure"] / scale, rel=1e-3)


def test_recipes_are_read_with_the_line_of_a_mistake(tmp_path):
    file = tmp_path / "ae.yaml"
    file.write_text("steps: 50\nviews: [mlp]\nlr: 1e-3\nsizes: {width: 32, heads: 4}\n")
    recipe = AutoencoderRecipe.load(file)
    assert (recipe.steps, recipe.views, recipe.lr, recipe.sizes.width) == (50, ("mlp",), 1e-3, 32)
    assert recipe.fingerprint != AutoencoderRecipe().fingerprint
    for text, message in (
        ("stepss: 3\n", r"ae\.yaml, line 1: unknown key 'stepss'.*did you mean 'steps'"),
        ("steps: 3\nlr: fast\n", r"ae\.yaml, line 2: lr"),
        ("sizes: {width: 10, heads: 4}\n", r"line 1: width 10 of the autoencoder does not divide into 4 heads"),
        ("scaling: rows\n", r"unknown scaling 'rows'"),
        ("views: [units]\n", r"unknown family of views 'units'"),
        ("contrast: 0.1\n", r"contrast needs two different views"),
        ("steps: 0\n", r"steps of the autoencoder is 0; it must be positive"),
    ):
        file.write_text(text)
        with pytest.raises(ZooError, match=message):
            AutoencoderRecipe.load(file)
    with pytest.raises(ZooError, match=r"unknown arm 'SB'"):
        AutoencoderRecipe().arm("SB")


COMPILED = """
import sys
from dataclasses import replace
import torch
sys.path.append(sys.argv[2])
from small_autoencoder import SMALL
from vitzoo_hf.apply.autoencoder.model import WeightAutoencoder
from vitzoo_hf.apply.autoencoder.training import train_autoencoder
from vitzoo_hf.zoo import Zoo

graphs = []
def traced(graph, inputs):
    graphs.append(graph)
    return graph.forward
def compiled(self):
    self._compiled_call_impl = torch.compile(self._call_impl, fullgraph=True, backend=traced)
WeightAutoencoder.compile = compiled
zoo = Zoo(sys.argv[1]).filter(stage="finetune", head="mlp")
recipe = SMALL.arm("C+S+B")
plain, found = (train_autoencoder(zoo, replace(recipe, compile=choice)) for choice in (False, True))
assert len(graphs) == 1, len(graphs)
for name, value in plain.model.state_dict().items():
    torch.testing.assert_close(found.model.state_dict()[name], value, atol=1e-5, rtol=1e-4)
"""


def test_the_model_is_one_graph_for_the_compiler(tiny_zoo):
    """In a process of its own, because the compiler does not see through the checks of shapes that tests add."""
    subprocess.run([sys.executable, "-c", COMPILED, str(tiny_zoo), str(TESTS)], check=True)


def test_bfloat16_trains_every_part_of_the_loss(zoo):
    """Latents are bfloat16 under autocast, and each loss must take them."""
    plain, rounded = (
        train_autoencoder(zoo, replace(SMALL, precision=precision, steps=2).arm("C+S+B"))
        for precision in ("float32", "bfloat16")
    )
    for one, other in zip(plain.history, rounded.history, strict=True):
        assert other["contrast"] == pytest.approx(one["contrast"], rel=0.05)
        assert other["loss"] == pytest.approx(one["loss"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"precision": "bfloat16", "compile": True}])
def test_training_on_a_gpu_goes_as_on_the_cpu(zoo, tmp_path, changes):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ours = train_autoencoder(zoo, SMALL.arm("C+S+B"))
    theirs = train_autoencoder(zoo, replace(SMALL, **changes).arm("C+S+B"), tmp_path, device="cuda")
    assert theirs.model.index_table.is_cuda
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=0.05 if changes else 1e-3)
    with torch.no_grad():
        vectors = torch.stack([torch.from_numpy(row["weights"]) for row in zoo.rows()]).cuda()
        assert theirs.decode(theirs.encode(vectors)).isfinite().all()


def test_queries_are_selection_images_shifted_ones_or_noise(zoo):
    dataset = zoo.index["dataset"][0]
    selection = zoo.probes(dataset, "selection")[0]
    few = replace(SMALL, pool=12, seed=3)

    def drawn(kind):
        return query_images(zoo, dataset, replace(few, query_images=kind))

    plain, soft, noise = drawn("data"), drawn("contrast:5"), drawn("noise")
    assert plain.shape == soft.shape == noise.shape == (12, *selection.shape[1:])
    assert torch.cdist(plain.flatten(1), selection.flatten(1)).min(1).values.max() < 0.01
    assert torch.cdist(noise.flatten(1), selection.flatten(1)).min() > 1
    assert 0.1 < (soft.std() / plain.std()) < 0.3
    assert noise.min() >= plain.min()
    assert noise.max() <= plain.max()
    assert torch.equal(drawn("gaussian_noise:2"), drawn("gaussian_noise:2"))
    with pytest.raises(ZooError, match="unknown corruption 'datta'"):
        replace(few, query_images="datta")
    with pytest.raises(ZooError, match="severity '9' of contrast"):
        replace(few, query_images="contrast:9")


def test_contrast_of_long_sequences_compares_windows(zoo):
    sizes = replace(SMALL.sizes, window=8, halo=1)
    trained = train_autoencoder(zoo, replace(SMALL, sizes=sizes).arm("C+S"))
    assert trained.step == SMALL.steps
    assert trained.model.window_tokens == 8 < trained.tokenizer.num_tokens


def test_batches_of_one_model_are_left_out_of_contrast(zoo):
    models = zoo.filter(split="train").model_ids
    three = zoo.filter(model_id=models[:3])
    assert train_autoencoder(three, replace(SMALL, batch_size=2).arm("C+S")).step == SMALL.steps
    with pytest.raises(ZooError, match="one training model"):
        train_autoencoder(zoo.filter(model_id=models[:1]), SMALL.arm("C+S"))
    with pytest.raises(ZooError, match="set batch_size to 2"):
        replace(SMALL, batch_size=1).arm("C+S")


def test_what_leaves_nothing_to_learn_is_refused_before_any_step(zoo):
    wide = replace(SMALL, sizes=replace(SMALL.sizes, latent=99))
    with pytest.raises(ZooError, match="99 latent numbers for tokens of"):
        train_autoencoder(zoo, wide)
    one = zoo.filter(model_id=zoo.filter(split="train").model_ids[:1])
    with pytest.raises(ZooError, match="1 training models do not differ"):
        train_autoencoder(one, SMALL)


def test_a_weight_that_is_not_finite_is_refused_by_the_name_of_its_model():
    vectors = torch.zeros(3, 4)
    vectors[1, 2] = float("inf")
    with pytest.raises(ZooError, match="b has weights that are NaN or infinite"):
        check_finite(vectors, ["a", "b", "c"])
    with pytest.raises(ZooError, match="no model among those chosen"):
        vectors_of([])


def test_a_folder_is_written_before_the_first_step(zoo, tmp_path):
    def stop(step, losses):
        raise StopError

    with pytest.raises(StopError):
        train_autoencoder(zoo, SMALL, tmp_path / "a", on_step=stop)
    assert load_autoencoder(tmp_path / "a").step == 0
    (tmp_path / "file").write_text("no folder")
    steps = []
    with pytest.raises(OSError, match="file"):
        train_autoencoder(zoo, SMALL, tmp_path / "file" / "b", on_step=lambda step, losses: steps.append(step))
    assert steps == []


def test_a_checkpoint_says_what_is_otherwise(zoo, tmp_path):
    train_autoencoder(zoo, SMALL, tmp_path)
    with pytest.raises(ZooError, match=r"another recipe \(lr, seed\)"):
        train_autoencoder(zoo, replace(SMALL, lr=0.5, seed=9), tmp_path)
    fewer = zoo.filter(model_id=zoo.model_ids[:-1])
    with pytest.raises(ZooError, match="was trained on other models"):
        train_autoencoder(fewer, SMALL, tmp_path)


def test_a_changed_bit_of_a_tensor_is_noticed(zoo, tmp_path):
    train_autoencoder(zoo, SMALL, tmp_path)
    file = tmp_path / "autoencoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 16
    file.write_bytes(content)
    with pytest.raises(ZooError, match="its tensors are not those that were written"):
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": float("nan")}, "lr of the autoencoder is nan"),
        ({"noise": float("nan")}, "noise of the autoencoder is nan"),
        ({"seed": 2**70}, "it must be at most"),
    ],
)
def test_settings_that_cannot_be_are_one_line(changes, message):
    with pytest.raises(ZooError, match=message):
        AutoencoderRecipe(**changes)
