"""A model in training on a world by differentially private SGD: gradients of single images clipped, noise added.

Clipping, noise and accounting are opacus's (`pip install 'vitzoo-hf[privacy]'`); batches are Poisson samples, as
its accountant assumes. Noise comes from a seeded generator, so that runs can be repeated: this measures what noise
does to leakage, and gives no guarantee for data that are secret.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vitzoo_hf.blueprint.blueprint import Run
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.images.sources import ImageSet
from vitzoo_hf.training.seeds import derive_seed
from vitzoo_hf.training.stacked_trainer import Draws
from vitzoo_hf.training.trainer import learning_rate_share
from vitzoo_hf.training.world_trainer import WorldTrainer

MORE_ALPHAS = (1.005, 1.01, 1.02, 1.05, 128, 256, 512)
"""Orders at which privacy is counted, beside those that opacus tries: for very little noise, and for much."""


class PrivateTrainer(WorldTrainer):
    """One model in training by DP-SGD; the settings are `noise_multiplier` and `clip_norm` of its learner.

    Args:
        runs: one run.
        images: a world.
        models: one model, at its initial weights.
        device: where to train.

    Raises:
        ZooError: as `WorldTrainer`, for more than one run, or where opacus is not installed.
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
        """What the steps made so far have spent of the privacy budget, at delta = 1 / n, by Rényi accounting.

        None without noise, where there is no privacy to count.
        """
        from opacus.accountants import RDPAccountant

        noise, made = self.learner.noise_multiplier, self.steps_made()[0]
        if noise == 0 or made == 0:
            return None if made else 0.0
        accountant = RDPAccountant()
        accountant.history = [(noise, self.sample_rate, made)]
        return float(accountant.get_epsilon(1 / self.counts[0], alphas=[*accountant.DEFAULT_ALPHAS, *MORE_ALPHAS]))

    def train_epoch(self, epoch: int) -> list[int]:
        """The steps of an epoch, each on a Poisson sample; returns [0] if the model is no longer finite."""
        draws = self.draws(epoch)
        seed = self.recipe.seed
        chosen = torch.Generator().manual_seed(derive_seed(seed, "poisson", epoch))
        self.private.generator.manual_seed(derive_seed(seed, "noise", epoch))
        total = torch.zeros(1, device=self.device)
        for number in range(self.steps):
            batch = (torch.rand(self.counts[0], generator=chosen) < self.sample_rate).nonzero()[:, 0]
            total += self.step(batch[None].to(self.device), draws, epoch - 1 + number / self.steps)
        self._stop(total / self.steps, epoch)
        return [] if bool(total.isfinite() & self.weights.isfinite().all()) else [0]

    def step(self, batch: Int64[Tensor, "1 B"], draws: Draws, position: float) -> Float[Tensor, " 1"]:
        """One update with clipped gradients and noise; returns the sum of losses over the expected batch."""
        gradients, losses = self._per_image(batch, draws)
        (parameter,) = self.private.params
        parameter.grad_sample = gradients
        self.private.pre_step()
        share = learning_rate_share(self.recipe, position, self.epochs)
        if not int(self.stopped):
            self.optimizer.step(self._trained_weights, parameter.grad[None], share)
        else:
            self.optimizer.steps += 1
        self.private.zero_grad(set_to_none=True)
        return losses.sum()[None] / self.recipe.batch_size

    def _per_image(
        self, batch: Int64[Tensor, "1 B"], draws: Draws
    ) -> tuple[Float[Tensor, "B P"], Float[Tensor, " B"]]:
        """Gradient and loss of each image: every image has a copy of the model to itself."""
        if batch.shape[1] == 0:
            return self._trained_weights[:0].detach(), self.weights.new_zeros(0)
        inputs, labels = self._fed(batch, draws)
        tensors = unflatten(self.weights.detach().expand(batch.shape[1], -1).clone(), self.layout)
        changing = [tensors[name].requires_grad_() for name in self.trained.names]
        logits = self.vit.logits(tensors, inputs[0][:, None])[:, 0]
        losses = cross_entropy(logits, self._softened(labels)[0], reduction="none")
        gradients = torch.autograd.grad(losses.sum(), changing)
        return torch.cat([gradient.flatten(1) for gradient in gradients], 1), losses.detach()

    def results(self) -> list[dict[str, float | None]]:
        """As `WorldTrainer.results`, with `epsilon`."""
        return [own | {"epsilon": self.epsilon} for own in super().results()]


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
