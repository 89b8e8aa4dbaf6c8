"""Time the blocks of one network on this device, and whole networks.

A block is timed where it will run: inside whole networks. A network runs block by block with
a clock reading between the blocks. So every block finds its input as warm and its weights as
cold as in a network, the readings of a run add up to the network's own time, and overhead that
is paid per network is not counted once per block.

onnxruntime has no clock between blocks: each block is a session of its own, and the readings
of a network are scaled to add up to what the network takes as one session.

Knows no Ray, and no table: it takes and gives plain values.
"""

import io
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from nasray.costs.latency_files import block_key
from nasray.devices import computing_with
from nasray.errors import UserError
from nasray.spaces.space import Architecture, Block, Space
from nasray.spaces.supernet import build_subnet

WARMUP_RUNS, RUNS = 2, 15  # of a network, each time it is drawn
# Of the runs of one network: what is slower shared its processor with something else. On a
# machine with six times more work than cores this quantile still repeated within 2.6 %, the
# median within 12 %.
RUN_QUANTILE = 0.1
RUNTIMES = ("torch", "onnxruntime")

Step = Callable[[Any], Any]  # a network or a block: features -> features


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to measure. The rest of a table's provenance describes the machine.

    Raises:
        UserError: a value is not allowed, or this machine lacks what it needs.
    """

    device: str = "cpu"  # or "cuda"
    runtime: str = "torch"
    threads: int = 1  # on a CPU
    batch_size: int = 1

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"device = {self.device!r} must be 'cpu' or 'cuda'")
        if self.runtime not in RUNTIMES:
            raise UserError(f"runtime = {self.runtime!r} must be one of {sorted(RUNTIMES)}")
        for name in ("threads", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must be 1 or more")
        if self.runtime == "onnxruntime" and self.device != "cpu":
            raise UserError("runtime = 'onnxruntime' measures on device = 'cpu' only")
        if self.runtime == "onnxruntime" and not find_spec("onnxruntime"):
            raise UserError(
                "runtime = 'onnxruntime' needs: pip install '.[export]' in nasray's folder"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device = 'cuda', but torch finds no GPU on this machine")


def time_blocks(
    space: Space, arch: Architecture, setup: Setup, *, seed: int = 0
) -> list[tuple[str, float]]:
    """Time `arch` block by block: (block_key, ms) of each block, in their order."""
    blocks: list[Any] = [block for block in space.decode(arch) if block is not None]
    if setup.runtime == "torch":
        times = _time(list(_build(space, blocks, setup, seed)), blocks[0], setup)
    else:
        hashable: Any = space
        steps = [_session(hashable, replace(block, name="block"), setup, seed) for block in blocks]
        separate = _time(steps, blocks[0], setup)
        # Each call of a session costs time, and converts its tensors: the network does so once.
        scale = time_network(space, arch, setup, seed=seed) / sum(separate)
        times = [ms * scale for ms in separate]
    return [(block_key(block), ms) for block, ms in zip(blocks, times, strict=True)]


def time_network(space: Space, arch: Architecture, setup: Setup, *, seed: int = 0) -> float:
    """Time `arch` as a whole, ms."""
    blocks = [block for block in space.decode(arch) if block is not None]
    network = _build(space, blocks, setup, seed)
    step = network if setup.runtime == "torch" else _to_session(network, blocks[0], setup)
    return _time([step], blocks[0], setup)[0]


def describe(space: Space, setup: Setup) -> dict[str, str]:
    """The provenance of a table of `space` that is measured here with `setup`."""
    processor = torch.cuda.get_device_name() if setup.device == "cuda" else _processor()
    values = {"space": space.name, **asdict(setup), "processor": processor}
    values["version"] = version(setup.runtime)  # of the runtime
    return {name: str(value) for name, value in values.items()}


def _build(space: Space, blocks: Sequence[Block], setup: Setup, seed: int) -> nn.Sequential:
    """Build a network with initial weights: without, denormal numbers could slow it down."""
    network = build_subnet(blocks)
    space.initialize(network, torch.Generator().manual_seed(seed))
    return network.to(setup.device).eval()


@lru_cache(maxsize=1024)
def _session(space: Any, block: Any, setup: Setup, seed: int) -> Step:
    return _to_session(_build(space, [block], setup, seed), block, setup)


def _to_session(network: nn.Module, first: Block, setup: Setup) -> Step:
    """Convert `network` to a session of onnxruntime, which maps an array to an array."""
    import onnxruntime

    content = io.BytesIO()
    with warnings.catch_warnings():
        # The old exporter: for blocks without branches it writes the same, 60 times as fast.
        warnings.simplefilter("ignore")
        example = torch.zeros(
            setup.batch_size, first.in_channels, first.resolution, first.resolution
        )
        torch.onnx.export(
            network,
            (example,),
            content,  # type: ignore[arg-type]
            input_names=["input"],
            dynamo=False,
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = setup.threads
    session = onnxruntime.InferenceSession(
        content.getvalue(), options, providers=["CPUExecutionProvider"]
    )
    return lambda features: session.run(None, {"input": features})[0]


def _time(steps: Sequence[Step], first: Block, setup: Setup) -> list[float]:
    """Run `steps` one after the other, several times: the undisturbed time of each, ms."""
    shape = (setup.batch_size, first.in_channels, first.resolution, first.resolution)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(setup.device)
    run = _run_cuda if setup.device == "cuda" else _run_cpu
    with torch.inference_mode(), computing_with(setup.threads):
        features = images if setup.runtime == "torch" else images.numpy()
        times = [run(steps, features) for _ in range(WARMUP_RUNS + RUNS)]
    return np.quantile(times[WARMUP_RUNS:], RUN_QUANTILE, axis=0).tolist()


def _run_cpu(steps: Sequence[Step], features: Any) -> list[float]:
    stamps = [time.perf_counter_ns()]
    for step in steps:
        features = step(features)
        stamps.append(time.perf_counter_ns())
    return [(after - before) / 1e6 for before, after in pairwise(stamps)]


def _run_cuda(steps: Sequence[Step], features: Any) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        features = step(features)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]


def _processor() -> str:
    """The name of this machine's CPU."""
    with suppress(OSError), open("/proc/cpuinfo") as file:  # Linux
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
