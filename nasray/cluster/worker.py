"""Threads and device of Ray workers of every kind, and how worker errors are reported.

Does not import Ray Train, which would delay the start of evaluators.
"""

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from nasray.errors import UserError
from nasray.storage.files import told


def raise_user_error(error: BaseException | None) -> None:
    """Raise a UserError for a worker error that a user or a storage caused; else return.

    Raises:
        UserError: what user_mistake() finds.
    """
    if (mistake := user_mistake(error)) is not None:
        raise mistake from None


def user_mistake(error: BaseException | None) -> UserError | None:
    """The first UserError among the causes of `error`, or its OSError in one line; or None."""
    causes = [error] if error else []
    for found in causes:  # grows as causes of causes are found
        inner = [getattr(found, name, None) for name in ("cause", "controller_failure")]
        inner += [found.__cause__, *getattr(found, "worker_failures", {}).values()]
        for each in inner:
            if isinstance(each, BaseException) and all(each is not known for known in causes):
                causes.append(each)
        # Ray wraps an error in one of the same class whose text has the traceback.
        if isinstance(found, UserError) and not isinstance(found, RayTaskError):
            return found
        if isinstance(found, OSError) and not isinstance(found, RayError):
            text = told(found)
            if text.endswith("then run the same command again"):
                return UserError(f"{text} (finished work is kept)")
            return UserError(f"{text}; finished work is kept: run the same command again to resume")
    return None


def worker_device(cpus: int) -> str:
    """Set the number of this worker's threads, which decides the order of float sums.

    Returns "cuda" if Ray gave the worker a GPU, else "cpu".
    """
    torch.set_num_threads(cpus)
    return "cuda" if ray.get_gpu_ids() else "cpu"
