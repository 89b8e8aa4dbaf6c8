"""How torch computes: the type of mixed precision, choice of kernels, threads, compilation."""

import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)


def precisions(device: str) -> list[str]:
    """What networks can be computed in on `device`, the best first: "bfloat16" and so on."""
    if device != "cuda":
        return ["float32"]
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return [*(["bfloat16"] if native else []), "float16", "float32"]


_used: dict[str, str] = {}  # by device, if not the best one


def use_precision(name: str, device: str) -> None:
    """Compute in this precision from now on in this process; one of precisions()."""
    _used[device] = name


def amp_dtype(device: str) -> torch.dtype | None:
    """The type of mixed precision, that of use_precision() or the best; None: there is none."""
    name = _used.get(device) or precisions(device)[0]
    return None if name == "float32" else getattr(torch, name)


def autocast(device: str) -> torch.autocast:
    """Mixed precision on `device` by its amp_dtype(); without one, nothing changes."""
    dtype = amp_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


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


def can_compile() -> bool:
    """Whether torch.compile works on this GPU; if not, a warning says what is missing."""
    capable = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (7, 0)
    needs = {
        "a GPU of compute capability 7.0": capable,
        "Triton": find_spec("triton"),
        "a C compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "Python.h": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    }
    missing = [name for name, found in needs.items() if not found]
    if missing:
        logger.warning("retrain.compile = true, but %s is missing here: off", " and ".join(missing))
    return not missing


class Compiled:
    """`network` by torch.compile, or as it is from the first call on that cannot be compiled."""

    def __init__(self, network: nn.Module) -> None:
        self.network, self.compiled = network, torch.compile(network)

    def __call__(self, images: Tensor) -> Tensor:
        if self.compiled is not self.network:
            try:
                return self.compiled(images)
            except torch._dynamo.exc.TorchDynamoException as error:
                reason = str(error).strip().splitlines()[0]
                logger.warning("torch.compile failed (%s); training goes on without it", reason)
                self.compiled = self.network
        return self.network(images)
