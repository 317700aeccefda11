"""Outputs of models by tasks of Ray, on this machine or on a cluster.

Each task opens the zoo for itself, so that no weights pass through this process; the outputs come back and are kept
here. A task whose worker dies is run again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.launch.ray_cluster import cluster

if TYPE_CHECKING:
    from vitzoo_hf.evaluation.outputs_cache import ImageBatch

RETRIES = 3

Computed = list[tuple[str, str, dict[str, np.ndarray]]]


def outputs_on_ray(
    source: tuple[str, str | None],
    chunks: Sequence[Sequence[str]],
    missing: Mapping[str, Sequence["ImageBatch"]],
    *,
    device: str,
    precision: str,
    address: str,
) -> Iterator[Computed]:
    """Outputs of chunks of models as they become ready: model id, digest of the images, and the arrays.

    Args:
        source: path or id of the zoo, which every machine must reach, and its revision.
        chunks: model ids, a task each.
        missing: model -> the images it is to see.
        device: `cpu`, or `cuda` for one GPU a task.
        precision: that models run in.
        address: of a cluster, `auto` for the one this machine belongs to, or `local` to start one here.

    Raises:
        ZooError: if Ray is not installed, the cluster does not answer, or a task fails again and again.
    """
    with cluster(address) as ray:
        images = {batch.digest: batch.images.cpu().numpy() for batches in missing.values() for batch in batches}
        there = {digest: ray.put(values) for digest, values in images.items()}
        resources = {"num_cpus": 1, "num_gpus": 1 if device.startswith("cuda") else 0}
        task = ray.remote(max_retries=RETRIES, **resources)(_task)
        waiting = [
            task.remote(
                source,
                {model_id: [batch.digest for batch in missing[model_id]] for model_id in chunk},
                {batch.digest: there[batch.digest] for model_id in chunk for batch in missing[model_id]},
                device,
                precision,
            )
            for chunk in chunks
        ]
        while waiting:
            done, waiting = ray.wait(waiting, num_returns=1)
            yield _result(ray, done[0])


def _task(
    source: tuple[str, str | None],
    digests: Mapping[str, Sequence[str]],
    references: Mapping[str, Any],
    device: str,
    precision: str,
) -> Computed:
    import ray
    import torch

    from vitzoo_hf.models.population import Population
    from vitzoo_hf.zoo import Zoo

    images = {digest: torch.from_numpy(ray.get(reference).copy()) for digest, reference in references.items()}
    zoo = Zoo(source[0], revision=source[1]).filter(model_id=list(digests))
    found: Computed = []
    for row in zoo.rows():
        population = Population.from_rows([row], device=device, precision=precision)
        for digest in digests[row["model_id"]]:
            (outputs,) = population.each(images[digest])
            parts = {"logits": outputs.logits[0], "features": outputs.features[0]}
            found.append((row["model_id"], digest, {name: part.cpu().numpy() for name, part in parts.items()}))
    return found


def _result(ray: Any, reference: Any) -> Computed:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ZooError):
            raise ZooError(str(cause)) from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise ZooError(f"a task of Ray failed {RETRIES + 1} times ({reason}); the same command continues") from None
