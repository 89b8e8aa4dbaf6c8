"""What torch computes with: the device's number type, its kernels, its threads."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def amp_dtype(device: str) -> torch.dtype | None:
    """The type of mixed precision: bfloat16 where the GPU computes it, else float16; CPU none."""
    if device != "cuda":
        return None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


def settle_kernels(*, deterministic: bool) -> None:
    """Have cuDNN and cuBLAS take repeatable kernels, or time all and take the quickest.

    For cuBLAS, before it is used for the first time in this process.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic


@contextmanager
def computing_with(number: int) -> Iterator[None]:
    """Let torch compute with `number` threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
