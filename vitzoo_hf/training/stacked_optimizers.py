"""AdamW and SGD over the weights of P models in one matrix, each with its own learning rate, decay and momentum.

Operations and their order are those of `torch.optim.AdamW` and `torch.optim.SGD`, and so are the names of the state.
All models of a stack have made equally many steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from vitzoo_hf.blueprint.blueprint import Recipe
from vitzoo_hf.format.schema import ZooError

# torch's defaults, by which a run alone trains
BETAS = (0.9, 0.999)
EPS = 1e-8
STATE = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ("momentum_buffer",)}


@dataclass
class StackedOptimizer:
    """One optimizer for P models; a row of a tensor belongs to a model.

    Attributes:
        kind: `adamw` or `sgd`.
        settings: `lr`, `weight_decay` and `momentum` of every model.
        state: torch's names -> what the optimizer remembers of every weight.
        steps: updates made so far.

    Example:
        >>> weights = torch.ones(2, 3)
        >>> optimizer = StackedOptimizer.of([Recipe(optimizer="sgd", lr=lr) for lr in (0.5, 0.25)], weights)
        >>> optimizer.step(weights, torch.ones(2, 3), lr_scale=1.0)
        >>> weights[:, 0]
        tensor([0.5000, 0.7500])
    """

    kind: str
    settings: dict[str, Float64[Tensor, "P 1"]]
    state: dict[str, Float[Tensor, "P D"]]
    steps: int = field(default=0)

    @classmethod
    def of(cls, recipes: Sequence[Recipe], weights: Float[Tensor, "P D"]) -> "StackedOptimizer":
        """The optimizer of these recipes, before its first step.

        Raises:
            ZooError: if the recipes name different optimizers.
        """
        kinds = sorted({recipe.optimizer for recipe in recipes})
        if len(kinds) != 1:
            raise ZooError(f"models with optimizers {', '.join(kinds)} cannot be updated together: group them by it")
        settings = {
            # float64: torch computes rates in Python's floats and rounds once, when a weight is updated
            name: torch.tensor([[getattr(recipe, name)] for recipe in recipes], dtype=torch.float64)
            for name in ("lr", "weight_decay", "momentum")
        }
        remembers = kinds[0] == "adamw" or bool(settings["momentum"].any())
        return cls(
            kind=kinds[0],
            settings={name: value.to(weights.device) for name, value in settings.items()},
            # a buffer of zeros gives torch's first step of momentum, which takes the gradient itself
            state={name: torch.zeros_like(weights) for name in STATE[kinds[0]] if remembers},
        )

    def step(self, weights: Float[Tensor, "P D"], gradients: Float[Tensor, "P D"], lr_scale: float) -> None:
        """Change `weights` in place; `lr_scale` is what the schedule leaves of every learning rate."""
        self.steps += 1
        lr, decay = self.settings["lr"] * lr_scale, self.settings["weight_decay"]
        if self.kind == "sgd":
            self._sgd(weights, gradients, lr.to(weights.dtype), decay.to(weights.dtype))
            return
        weights.mul_((1 - lr * decay).to(weights.dtype))
        mean, square = self.state["exp_avg"], self.state["exp_avg_sq"]
        mean.lerp_(gradients, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradients, gradients, value=1 - BETAS[1])
        size = (lr / (1 - BETAS[0] ** self.steps)).to(weights.dtype)
        spread = square.sqrt().div_((1 - BETAS[1] ** self.steps) ** 0.5).add_(EPS)
        weights.sub_((mean * size).div_(spread))

    def _sgd(self, weights: Tensor, gradients: Tensor, lr: Tensor, decay: Tensor) -> None:
        update = torch.addcmul(gradients, weights, decay)
        if self.state:
            momentum = self.settings["momentum"].to(weights.dtype)
            update = self.state["momentum_buffer"].mul_(momentum).add_(update)
        weights.sub_(update * lr)

    def of_model(self, model: int) -> dict[str, Float[Tensor, " D"]]:
        """The optimizer state of one model, by torch's names."""
        # torch keeps no buffer without momentum, and a run may continue alone
        if self.kind == "sgd" and not self.settings["momentum"][model]:
            return {}
        return {name: value[model] for name, value in self.state.items()}

    def keep(self, models: Sequence[int]) -> None:
        """Continue with these models alone."""
        self.settings = {name: value[list(models)] for name, value in self.settings.items()}
        self.state = {name: value[list(models)] for name, value in self.state.items()}
