"""What workers of every kind share: their threads and device, and how their failures are told.

Imports little: an evaluator does not wait for Ray Train to be loaded.
"""

import os

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from nasray.errors import UserError


def raise_user_error(error: BaseException | None) -> None:
    """Raise the root of a failure in a worker in one line, if the user or a storage is to blame."""
    causes = [error] if error else []
    for found in causes:  # which grows as causes of causes are found
        inner = (
            getattr(found, "cause", None),
            getattr(found, "controller_failure", None),
            found.__cause__,
        )
        inner += tuple(getattr(found, "worker_failures", {}).values())
        inner = (each for each in inner if isinstance(each, BaseException))
        causes += [each for each in inner if all(each is not known for known in causes)]
        # Ray wraps an error in one that is of the same class, but says much more.
        if isinstance(found, UserError) and not isinstance(found, RayTaskError):
            raise found from None
        if isinstance(found, OSError) and not isinstance(found, RayError):
            raise UserError(
                f"{found}; what is done is kept, and the same command goes on"
            ) from None


def worker_device(cpus: int) -> str:
    """Settle this worker's threads, which decide the order of float sums, and its device."""
    torch.set_num_threads(cpus)
    if not ray.get_gpu_ids():
        return "cpu"
    # The same run again must give the same weights: no choice of kernels by timing.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return "cuda"
