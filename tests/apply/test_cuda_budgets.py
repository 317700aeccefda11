"""Applications on a CUDA device give the CPU's results."""

import pytest
import torch
from same_results import assert_same

from vitzoo_hf.apply.candidates import candidate_logits, candidate_scores
from vitzoo_hf.apply.interpolation import path_scores
from vitzoo_hf.apply.paths.landscape import landscape_slice
from vitzoo_hf.apply.paths.paths import train_bezier
from vitzoo_hf.apply.properties.features import flat_features, norm_features, spectra_features, statistics_features
from vitzoo_hf.apply.properties.probing import measured_features, probing_features
from vitzoo_hf.apply.rebasin.barriers import LADDER, pair_barriers
from vitzoo_hf.apply.rebasin.rebasin import rebasin
from vitzoo_hf.apply.soup.averaging import greedy_soup, single_accuracies, uniform_soup, weighted_sums
from vitzoo_hf.apply.soup.comparison import compare_soups
from vitzoo_hf.apply.soup.learned import learned_soup
from vitzoo_hf.zoo import Zoo


class Material:
    """Models of one architecture, and images."""

    def __init__(self) -> None:
        self.zoo = Zoo.sample().filter(stage="finetune", head="linear")
        self.rows = list(self.zoo.rows())
        self.three = [*self.rows, self.rows[0]][:3]
        images, labels = self.zoo.probes("digits")
        self.images, self.labels = images[:20], labels[:20]
        self.batch = (self.images, self.labels)
        self.vectors = torch.stack([torch.from_numpy(row["weights"]) for row in self.rows])


@pytest.fixture(scope="module")
def material():
    return Material()


def ends(given):
    return given.vectors[0], given.vectors[1], given.rows[0]


def trained_path(given, on):
    """Its loss: gradients of key biases are rounding, of which Adam makes steps of full length."""
    middle = train_bezier(*ends(given), *given.batch, steps=2, batch_size=8, **on)
    return candidate_scores(middle[None].cpu(), given.rows[0], *given.batch)


APPLICATIONS = {
    "candidate_logits": lambda given, on: candidate_logits(given.vectors, given.rows[0], given.images, **on),
    "candidate_scores": lambda given, on: candidate_scores(given.vectors, given.rows[0], *given.batch, **on),
    "path_scores": lambda given, on: path_scores(*ends(given), *given.batch, points=3, **on),
    "train_bezier": lambda given, on: trained_path(given, on),
    "landscape_slice": lambda given, on: landscape_slice(given.three, *given.batch, resolution=3, **on),
    "weighted_sums": lambda given, on: weighted_sums(given.zoo, {name: [0.5] for name in given.zoo.model_ids}, **on),
    "uniform_soup": lambda given, on: uniform_soup(given.zoo, **on),
    "greedy_soup": lambda given, on: greedy_soup(given.zoo, *given.batch, **on),
    "single_accuracies": lambda given, on: single_accuracies(given.zoo, *given.batch, **on),
    "learned_soup": lambda given, on: learned_soup(given.zoo, *given.batch, epochs=1, batch_size=10, **on),
    "compare_soups": lambda given, on: compare_soups(
        given.zoo, by=("head",), methods=("uniform", "greedy"), progress=False, **on
    ),
    "rebasin": lambda given, on: rebasin(*given.rows[:2], sweeps=2, **on),
    "rebasin by activations": lambda given, on: rebasin(*given.rows[:2], by="activations", images=given.images, **on),
    "pair_barriers": lambda given, on: pair_barriers(
        given.zoo, [tuple(given.zoo.model_ids[:2])], LADDER[:2], points=3, num_images=20, progress=False, **on
    ),
    "statistics_features": lambda given, on: statistics_features(given.zoo, **on),
    "spectra_features": lambda given, on: spectra_features(given.zoo, **on),
    "norm_features": lambda given, on: norm_features(given.zoo, **on),
    "flat_features": lambda given, on: flat_features(given.zoo, components=1, **on),
    "probing_features": lambda given, on: probing_features(given.zoo, "digits", num_images=8, **on),
    "measured_features": lambda given, on: measured_features(given.zoo, "digits", num_images=8, **on),
}


@pytest.mark.parametrize("application", APPLICATIONS.values(), ids=APPLICATIONS)
def test_results_are_those_of_the_cpu(simulated_cuda, material, application):
    expected = application(material, {})
    simulated_cuda.reset()
    result = application(material, {"device": "cuda"})
    assert simulated_cuda.kernels > 0
    assert_same(result, expected)
