"""Outputs of models by tasks of Ray, on this machine or on a cluster.

Each task opens the zoo for itself, so that no weights pass through this process; the outputs come back and are kept
here. A task whose worker dies is run again.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from vitzoo_hf.evaluation.forward import Computed, outputs_of
from vitzoo_hf.evaluation.outputs_cache import ImageBatch
from vitzoo_hf.format.schema import ZooError
from vitzoo_hf.launch.ray_cluster import cluster
from vitzoo_hf.zoo import Zoo

RETRIES = 3


def outputs_on_ray(
    source: tuple[str, str | None],
    chunks: Sequence[Sequence[str]],
    batches: Mapping[str, Sequence[ImageBatch]],
    *,
    device: str,
    precision: str,
    address: str,
) -> Iterator[Computed]:
    """Outputs of chunks of models, in the order in which the tasks end.

    Args:
        source: path or id of the zoo, which every machine must reach, and its revision.
        chunks: lists of model ids, one task a list.
        batches: model -> the images that the model is run on.
        device: `cpu`, or `cuda` for one GPU a task.
        precision: the precision that models run in.
        address: address of a Ray cluster, `auto` for the cluster of this machine, or `local` to start one here.

    Raises:
        ZooError: if Ray is not installed, the cluster does not answer, or a task fails again and again.
    """
    with cluster(address) as ray:
        distinct = {batch.digest: batch for model_batches in batches.values() for batch in model_batches}
        # put once: an array among the arguments of every task would be sent with every task
        references = {digest: ray.put(batch.images.cpu().numpy()) for digest, batch in distinct.items()}
        resources = {"num_cpus": 1, "num_gpus": 1 if device.startswith("cuda") else 0}
        task = ray.remote(max_retries=RETRIES, **resources)(_task)
        running = [
            task.remote(
                source,
                {model_id: [batch.digest for batch in batches[model_id]] for model_id in chunk},
                {batch.digest: references[batch.digest] for model_id in chunk for batch in batches[model_id]},
                device,
                precision,
            )
            for chunk in chunks
        ]
        while running:
            (reference,), running = ray.wait(running, num_returns=1)
            yield _result(ray, reference)


def _task(
    source: tuple[str, str | None],
    digests: Mapping[str, Sequence[str]],
    references: Mapping[str, object],
    device: str,
    precision: str,
) -> Computed:
    import ray

    # copied: memory of Ray's store is read-only, which torch cannot mark
    images = {digest: torch.from_numpy(ray.get(reference).copy()) for digest, reference in references.items()}
    zoo = Zoo(source[0], revision=source[1]).filter(model_id=list(digests))
    # one row at a time: a worker holds the weights of one model, whatever the chunk
    return [
        entry
        for row in zoo.rows()
        for computed in outputs_of([row], digests, images, device, precision)
        for entry in computed
    ]


def _result(ray: Any, reference: object) -> Computed:
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
