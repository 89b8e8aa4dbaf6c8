"""What the training of a supernet and that of a subnet ask of the cluster and check first."""

import torch
from ray.train import ScalingConfig
from ray.train.torch import get_device

from nasray.cluster.placement import on_gpu, worker_labels
from nasray.config import ComputeConfig, Job
from nasray.data.splits import JobImages


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
