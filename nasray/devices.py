"""What torch computes with: threads, and the precision of a device."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def amp_dtype(device: str) -> torch.dtype | None:
    """The type of mixed precision: bfloat16 where the GPU computes it, else float16; CPU none."""
    if device != "cuda":
        return None
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native else torch.float16


@contextmanager
def computing_with(number: int) -> Iterator[None]:
    """Let torch compute with `number` threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
