"""Train quadratic Bézier curves between two networks in weight space.

The barrier of a path is the largest rise of the loss above the straight line between the losses of its ends,
max over t of L(t) − (1 − t) L(0) − t L(1) (Frankle et al. 2020; Entezari et al. 2022). The control point of a Bézier
curve is trained as in Garipov et al. 2018. Training costs one forward and one backward pass of a batch a step.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from vitzoo_hf.apply.candidates import check_images, check_vectors
from vitzoo_hf.apply.interpolation import bezier_points
from vitzoo_hf.format.layout import unflatten
from vitzoo_hf.format.row import RowLike
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.models.architecture import Architecture
from vitzoo_hf.models.rebuild import usable_device


def train_bezier(
    first: Float[Tensor, " D"],
    last: Float[Tensor, " D"],
    like: RowLike,
    images: Float[Tensor, "N C H W"],
    labels: Int64[Tensor, " N"],
    *,
    steps: int = 300,
    lr: float = 3e-3,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Float[Tensor, " D"]:
    """The control point of a quadratic Bézier curve with a low loss along it (Garipov et al. 2018).

    Each step of Adam uses one position, uniform between 0 and 1, and one batch. The control point starts at the
    middle of the straight path. The learning rate falls to 0 along half a cosine.

    Args:
        first: weights at t = 0, float32.
        last: weights at t = 1, in the same layout.
        like: a row with the architecture and head of the networks.
        images: training images, which no result is reported on.
        labels: one class an image.
        steps: number of steps.
        lr: learning rate of Adam.
        batch_size: images a step.
        seed: seed of positions and batches.
        device: where the control point is trained.

    Returns:
        The control point, float32, on the CPU.

    Raises:
        ZooError: if there is no image, images or weights do not fit `like`, or this machine lacks the device.
    """
    if not len(images):
        raise ZooError("a Bézier curve is trained on images; none were given")
    check_images(like, images, labels)
    check_vectors(like, first, last)
    place, architecture = usable_device(device), Architecture.of(like)
    model, layout = architecture.skeleton, architecture.layout
    ends = [vector.detach().to(place, torch.float32) for vector in (first, last)]
    # the middle gives the straight path, so training starts from the barrier that it lowers
    control = ((ends[0] + ends[1]) / 2).requires_grad_()
    optimizer = torch.optim.Adam([control], lr=lr)
    # at least 1, because torch divides by the number of steps
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    # on the CPU, so that every device draws equal positions and batches
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        batch = torch.randint(len(images), (min(batch_size, len(images)),), generator=generator)
        # one position a batch: an unbiased sample of the mean loss along the curve, as in Garipov et al. 2018
        t = torch.rand(1, generator=generator, dtype=torch.float64)
        point = bezier_points(ends[0], control, ends[1], t)[0]
        logits = functional_call(model, unflatten(point, layout), (images[batch].to(place),))
        optimizer.zero_grad()
        functional.cross_entropy(logits, labels[batch].to(place)).backward()
        optimizer.step()
        schedule.step()
    return control.detach().cpu()
