"""What the training of a supernet and that of a subnet have in common on a cluster."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from ray.exceptions import RayError
from ray.train import ScalingConfig, TrainingFailedError
from ray.train.torch import get_device
from ray.tune import TuneError

from nasray.cluster.placement import on_gpu, worker_labels
from nasray.cluster.worker import raise_user_error
from nasray.config import ComputeConfig, Job
from nasray.data.splits import JobImages

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def scaling(compute: ComputeConfig, num_workers: int, cpus_per_worker: int) -> ScalingConfig:
    """The resources and the nodes of `num_workers` training workers."""
    use_gpu = on_gpu(compute, num_workers)
    resources = {"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    return ScalingConfig(
        num_workers=num_workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        label_selector=worker_labels(compute, gpu=use_gpu),
    )


def check_batches(job: Job, data_path: str, batch_size: int, num_workers: int) -> None:
    """Check here, once, that `num_workers` workers can be fed batches of `batch_size`.

    Raises:
        UserError: there are too few images, or the batch cannot be divided.
    """
    images = JobImages(job, data_path)
    images.training_batches(batch_size, 0, rank=0, world_size=num_workers)


def use_own_gpu() -> None:
    """Make this worker's GPU the current one: Ray Train shows each worker all of its node."""
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)


def resumed(train: Callable[[], Result], epochs_done: Callable[[], int]) -> Result:
    """Call train() until it returns, as long as each call records more epochs than there were.

    Ray gives up after compute.max_failures losses of workers in all, however long a training
    takes; on nodes that may be taken away it takes more of them. Code that crashes whenever it is
    run records no epoch, so that its error is raised.

    Args:
        train: goes on from what it has recorded.
        epochs_done: how many epochs are on record.

    Raises:
        UserError: what ended the training is a user's or a storage's mistake.
    """
    while True:
        before = epochs_done()
        try:
            return train()
        except (TrainingFailedError, TuneError, RayError) as error:
            raise_user_error(error)
            if epochs_done() <= before:
                raise
            reason = str(error).strip().rsplit("\n", 1)[-1]
            logger.warning(
                "too many workers were lost, but epochs completed: going on (%s)", reason
            )
