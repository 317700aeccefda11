"""One model in training on a world by differentially private SGD: gradients of single images clipped, noise added.

Clipping, noise and accounting are opacus's (`pip install 'vitzoo-hf[privacy]'`); batches are Poisson samples, as
its accountant assumes. Noise comes from a seeded generator, so that runs can be repeated: this measures what noise
does to leakage, and gives no guarantee for data that are secret.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vitzoo_hf.blueprint.blueprint import Run
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.training.checkpoint import Results
from vitzoo_hf.training.feed import Draws, FedBatch, Positions
from vitzoo_hf.training.seeds import derive_seed
from vitzoo_hf.training.trainer import learning_rate_share
from vitzoo_hf.training.world_trainer import WorldTrainer

MORE_ALPHAS = (1.005, 1.01, 1.02, 1.05, 128, 256, 512)
"""Rényi orders that opacus does not try: the best ones for very little noise, and for much."""


class PrivateTrainer(WorldTrainer):
    """The trainer of one model by DP-SGD, with `noise_multiplier` and `clip_norm` of its learner.

    Args:
        runs: one run.
        images: a world.
        models: one model, at its initial weights.
        device: where to train.

    Raises:
        ZooError: for more than one run, if opacus is not installed, or for a reason of `WorldTrainer`.
    """

    def __init__(self, runs: Sequence[Run], images: ImageSet, models: Sequence[nn.Module], device: str) -> None:
        if len(runs) != 1:
            raise ZooError(f"{len(runs)} runs by dp-sgd; they train one by one")
        super().__init__(runs, images, models, device)
        self.private = _private_optimizer(self._trained_weights[0], runs[0], device)

    @property
    def sample_rate(self) -> float:
        """The probability of each image to be in a batch."""
        return self.recipe.batch_size / self.counts[0]

    @property
    def epsilon(self) -> float | None:
        """The privacy budget that the steps so far have spent, at delta = 1 / n, by Rényi accounting.

        None without noise, where there is no privacy to count.
        """
        # opacus is an optional extra
        from opacus.accountants import RDPAccountant

        noise, steps = self.learner.noise_multiplier, self.steps_made()[0]
        if noise == 0 or steps == 0:
            return None if steps else 0.0
        accountant = RDPAccountant()
        # one entry for all steps: noise and rate never change
        accountant.history = [(noise, self.sample_rate, steps)]
        return float(accountant.get_epsilon(1 / self.counts[0], alphas=[*accountant.DEFAULT_ALPHAS, *MORE_ALPHAS]))

    def batches(self, epoch: int) -> list[Positions]:
        """Poisson samples of the images `[1, B]`, of any size, as the accountant of privacy assumes."""
        # on the CPU, so that samples are equal on every device
        generator = torch.Generator().manual_seed(derive_seed(self.recipe.seed, "poisson", epoch))
        samples = [torch.rand(self.counts[0], generator=generator) < self.sample_rate for _ in range(self.steps)]
        return [sample.nonzero()[:, 0][None].to(self.device) for sample in samples]

    def draws(self, epoch: int) -> Draws:
        """The generators of this epoch, the generator of noise among them."""
        # anew in each epoch, so that a resumed run adds the noise it would have added
        self.private.generator.manual_seed(derive_seed(self.recipe.seed, "noise", epoch))
        return super().draws(epoch)

    def step(self, batches: Iterator[FedBatch], draws: Draws, position: float, count: int = 1) -> Float[Tensor, " 1"]:
        """Update the model by clipped gradients and noise; returns the sum of losses over the expected batch."""
        (batch,) = batches
        gradients, losses = self._per_image(batch)
        (parameter,) = self.private.params
        parameter.grad_sample = gradients
        self.private.pre_step()
        share = learning_rate_share(self.recipe, position, self.epochs)
        if not int(self.stopped):
            self.optimizer.step(self._trained_weights, parameter.grad[None], share)
        else:
            # `steps_made` tells epochs by this count, also after the model has stopped
            self.optimizer.steps += 1
        self.private.zero_grad(set_to_none=True)
        return losses.sum()[None] / self.recipe.batch_size

    def _per_image(self, batch: FedBatch) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Gradient and loss of each image: every image has a copy of the model to itself."""
        count = batch.positions.shape[1]
        if count == 0:
            return self._trained_weights[:0].detach(), self.weights.new_zeros(0)
        labels = self.drawn_labels.gather(1, batch.positions)
        tensors, changing = self._tensors(self.weights.detach().expand(count, -1).clone())
        logits = self.vit.logits(tensors, batch.inputs[0][:, None])[:, 0]
        losses = cross_entropy(logits, self._softened(labels)[0], reduction="none")
        gradients = torch.autograd.grad(losses.sum(), changing)
        return torch.cat([gradient.flatten(1) for gradient in gradients], 1), losses.detach()

    def results(self) -> list[Results]:
        """The results of `WorldTrainer.results`, with the privacy budget spent as `epsilon`."""
        return [results | {"epsilon": self.epsilon} for results in super().results()]


def _private_optimizer(weights: Tensor, run: Run, device: str) -> Any:
    """Opacus's optimizer of one vector; updates are made by the stacked optimizer from the gradient it leaves."""
    try:
        from opacus.optimizers import DPOptimizer
    except ImportError:
        raise ZooError("learner dp-sgd needs opacus: run `pip install 'vitzoo-hf[privacy]'`") from None
    assert run.learner is not None
    parameter = nn.Parameter(torch.zeros_like(weights))
    return DPOptimizer(
        torch.optim.SGD([parameter], lr=0.0),
        noise_multiplier=run.learner.noise_multiplier,
        max_grad_norm=run.learner.clip_norm,
        expected_batch_size=run.recipe.batch_size,
        generator=torch.Generator(device),
    )
