"""What workers of every kind share: their threads and device, and how their failures are told.

Imports little: an evaluator does not wait for Ray Train to be loaded.
"""

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from nasray.devices import choose_kernels
from nasray.errors import UserError


def raise_user_error(error: BaseException | None) -> None:
    """Raise the root of a failure in a worker in one line, if the user or a storage is to blame."""
    causes = [error] if error else []
    for found in causes:  # which grows as causes of causes are found
        inner = [getattr(found, name, None) for name in ("cause", "controller_failure")]
        inner += [found.__cause__, *getattr(found, "worker_failures", {}).values()]
        for each in inner:
            if isinstance(each, BaseException) and all(each is not known for known in causes):
                causes.append(each)
        # Ray wraps an error in one that is of the same class, but says much more.
        if isinstance(found, UserError) and not isinstance(found, RayTaskError):
            raise found from None
        if isinstance(found, OSError) and not isinstance(found, RayError):
            raise UserError(
                f"{found}; what is done is kept, and the same command goes on"
            ) from None


def worker_device(cpus: int, *, deterministic: bool) -> str:
    """Settle this worker's threads, which decide the order of float sums, and its device.

    If `deterministic`, the same run again gives the same weights: no choice of kernels by timing.
    """
    torch.set_num_threads(cpus)
    if not ray.get_gpu_ids():
        return "cpu"
    choose_kernels(deterministic=deterministic)
    return "cuda"
