"""What training workers of a supernet and of a subnet share."""

import torch
from ray.train import ScalingConfig
from ray.train.torch import get_device

from nasray.cluster.placement import on_gpu, worker_labels
from nasray.config import ComputeConfig, Job
from nasray.data.splits import JobImages


def scaling(compute: ComputeConfig, num_workers: int, cpus_per_worker: int) -> ScalingConfig:
    """What `num_workers` training workers ask of the cluster."""
    use_gpu = on_gpu(compute, num_workers)
    resources = {"CPU": cpus_per_worker, **({"GPU": 1} if use_gpu else {})}
    return ScalingConfig(
        num_workers=num_workers,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        label_selector=worker_labels(compute, gpu=use_gpu),
    )


def check_batches(job: Job, data_path: str, batch_size: int, num_workers: int) -> None:
    """Refuse what every worker would refuse, and be restarted for."""
    images = JobImages(job, data_path)
    images.training_batches(batch_size, 0, rank=0, world_size=num_workers)


def use_own_gpu() -> None:
    """Settle on this worker's GPU: Ray Train shows each worker all that its node has."""
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
