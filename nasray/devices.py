"""How torch computes: the type of mixed precision, choice of kernels, threads, compilation."""

import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch

logger = logging.getLogger(__name__)

COMPILE_STEPS = 3000  # training steps from which on compilation pays


def amp_dtype(device: str) -> torch.dtype | None:
    """The type of mixed precision: bfloat16 where the GPU computes it, else float16; CPU none."""
    if device != "cuda":
        return None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def choose_kernels(*, deterministic: bool) -> None:
    """Have cuDNN and cuBLAS take deterministic kernels, or time all and take the fastest.

    cuBLAS obeys only if this is called before its first use in this process.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic


@contextmanager
def computing_with(number: int) -> Iterator[None]:
    """Limit torch to `number` threads inside the `with` block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def should_compile(wanted: str, num_steps: int) -> bool:
    """Whether to compile a network for `num_steps` training steps on this machine's GPU.

    `wanted` is the job's retrain.compile: "off", "on", or "auto", which compiles where it pays.
    """
    if wanted == "off":
        return False
    needs = {
        "Triton": find_spec("triton"),
        "a C compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "Python.h": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    }
    missing = [name for name, found in needs.items() if not found]
    if missing and wanted == "on":
        logger.warning('retrain.compile = "on", but %s is missing here: off', " and ".join(missing))
    return not missing and (wanted == "on" or num_steps >= COMPILE_STEPS)
