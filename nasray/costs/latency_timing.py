"""Time the blocks of one network, and whole networks, on this device or on a host.

A block is timed where it will run: inside whole networks. A network runs block by block with
a clock reading between the blocks. So every block finds its input as warm and its weights as
cold as in a network, the readings of a run add up to the network's own time, and overhead that
is paid per network is not counted once per block.

onnxruntime has no clock between blocks: each block is a session of its own, and the readings
of a network are scaled to add up to what the network takes as one session. Where the sessions
are, the place, is this machine (latency_board.py) or a host that ssh reaches (latency_host.py).

Knows no Ray, and no table: it takes and gives plain values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from nasray.costs.latency_board import (
    Sessions,
    machine,
    numbers_of,
    pinned,
    ranges_of,
    run_in_order,
    undisturbed,
)
from nasray.costs.latency_files import block_key
from nasray.costs.latency_host import Host, connected
from nasray.costs.latency_onnx import require_int8, to_onnx
from nasray.devices import computing_with
from nasray.errors import UserError
from nasray.spaces.space import Architecture, Block, Space
from nasray.spaces.supernet import build_subnet

RUNTIMES = ("torch", "onnxruntime")
PRECISIONS = ("fp32", "int8")

Step = Callable[[Any], Any]  # a network or a block: features -> features
Place = Sessions | Host  # where ONNX files are timed


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
    precision: str = "fp32"  # or "int8", with onnxruntime
    cpus: str = ""  # the cores to run on, e.g. "4-7"; "" for any

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
        self._check_precision()
        self._check_cpus()

    def _check_precision(self) -> None:
        if self.precision == "fp16":
            raise UserError(
                "precision = 'fp16': on a CPU onnxruntime converts most operations to fp32 and "
                "back; give fp32 or int8"
            )
        if self.precision not in PRECISIONS:
            raise UserError(f"precision = {self.precision!r} must be one of {sorted(PRECISIONS)}")
        if self.precision == "int8":
            if self.runtime != "onnxruntime":
                raise UserError("precision = 'int8' needs runtime = 'onnxruntime'")
            require_int8()

    def _check_cpus(self) -> None:
        if not self.cpus:
            return
        try:
            number = len(numbers_of(self.cpus))
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.device != "cpu":
            raise UserError(f"cpus = {self.cpus!r} is for device = 'cpu'; leave it out")
        if number < self.threads:
            raise UserError(
                f"threads = {self.threads} on cpus = {self.cpus!r}: not more threads than cores"
            )


def place_at(host: str, setup: Setup) -> AbstractContextManager[Place | None]:
    """The `place` of the functions below: `host`, e.g. "user@board"; without one this machine.

    Raises:
        UserError: `setup` is of another runtime than onnxruntime, or the host cannot be used.
    """
    if not host:
        return nullcontext()
    if setup.runtime != "onnxruntime":
        raise UserError(f"host = {host!r} measures with runtime = 'onnxruntime' only")
    return connected(host, setup.threads, setup.cpus, setup.batch_size)


def time_blocks(
    space: Space, arch: Architecture, setup: Setup, *, seed: int = 0, place: Place | None = None
) -> list[tuple[str, float]]:
    """Time `arch` block by block: (block_key, ms) of each block, in their order.

    Raises:
        UserError: the place cannot run a block.
    """
    blocks: list[Any] = [block for block in space.decode(arch) if block is not None]
    keys = [block_key(block) for block in blocks]
    if setup.runtime == "torch":
        times = _time(list(_build(space, blocks, setup, seed)), blocks[0], setup)
    else:
        names = [f"{space.name} {seed} {setup.precision} {key}" for key in keys]
        makes = [partial(_to_onnx, space, [block], setup, seed) for block in blocks]
        separate = _time_files(names, makes, setup, place)
        # Each call of a session costs time, and converts its tensors: the network does so once.
        scale = time_network(space, arch, setup, seed=seed, place=place) / sum(separate)
        times = [ms * scale for ms in separate]
    return list(zip(keys, times, strict=True))


def time_network(
    space: Space, arch: Architecture, setup: Setup, *, seed: int = 0, place: Place | None = None
) -> float:
    """Time `arch` as a whole, ms.

    Raises:
        UserError: the place cannot run it.
    """
    blocks = [block for block in space.decode(arch) if block is not None]
    if setup.runtime == "torch":
        return _time([_build(space, blocks, setup, seed)], blocks[0], setup)[0]
    return time_onnx(_to_onnx(space, blocks, setup, seed), setup, place=place)


def time_onnx(content: bytes, setup: Setup, *, place: Place | None = None) -> float:
    """Time the network in an ONNX file of one float input, as it is, ms for a batch.

    Of `setup` the threads and cpus count, and where the file leaves it open the batch size.

    Raises:
        UserError: the place cannot run the file.
    """
    at = place or _here(setup)
    with _mistakes_told():
        at.hold("network", content)
        return at.time(["network"])[0]


def time_in_turn(
    contents: Sequence[bytes], setup: Setup, rounds: int, *, place: Place | None = None
) -> list[list[float]]:
    """Time ONNX files as time_onnx() does, in turn: ms of each file in each of `rounds`.

    The place is given every file once, and keeps all of them.

    Raises:
        UserError: the place cannot run a file.
    """
    at = place or _here(setup)
    names = [f"file {index}" for index in range(len(contents))]
    with _mistakes_told():
        for name, content in zip(names, contents, strict=True):
            at.hold(name, content)
        return [[at.time([name])[0] for name in names] for _ in range(rounds)]


def describe(space: Space, setup: Setup, *, place: Place | None = None) -> dict[str, str]:
    """The provenance of a table of `space` that is measured with `setup` at `place`.

    Raises:
        UserError: this machine does not have the cores that `setup` names.
    """
    values = {"space": space.name, **asdict(setup)}
    if setup.cpus:
        values["cpus"] = ranges_of(numbers_of(setup.cpus))  # the same cores, the same text
    with _mistakes_told():
        if setup.runtime == "torch":
            values |= {**machine(setup.cpus), "version": version("torch")}
        else:
            values |= (place or _here(setup)).machine()
    if setup.device == "cuda":
        values["processor"] = torch.cuda.get_device_name()
    return {name: str(value) for name, value in values.items()}


@lru_cache(maxsize=1)
def _here(setup: Setup) -> Sessions:
    """The sessions of this process, which are kept from one network to the next."""
    with _mistakes_told():
        return Sessions(setup.threads, setup.cpus, setup.batch_size)


@contextmanager
def _mistakes_told() -> Iterator[None]:
    """latency_board.py knows no UserError: it raises a ValueError with the same one line."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def _build(space: Space, blocks: Sequence[Block], setup: Setup, seed: int) -> nn.Sequential:
    """Build a network with initial weights: without, denormal numbers could slow it down."""
    network = build_subnet(blocks)
    space.initialize(network, torch.Generator().manual_seed(seed))
    return network.to(setup.device).eval()


def _to_onnx(space: Space, blocks: Sequence[Block], setup: Setup, seed: int) -> bytes:
    return to_onnx(_build(space, blocks, setup, seed), _shape(blocks[0], setup), setup.precision)


def _shape(first: Block, setup: Setup) -> tuple[int, ...]:
    return (setup.batch_size, first.in_channels, first.resolution, first.resolution)


def _time_files(
    names: Sequence[str],
    makes: Sequence[Callable[[], bytes]],
    setup: Setup,
    place: Place | None,
) -> list[float]:
    """Time files one after the other, ms of each; only those that the place lacks are made."""
    at = place or _here(setup)
    missing = set(at.missing(names))
    files = {name: make() for name, make in zip(names, makes, strict=True) if name in missing}
    with _mistakes_told():
        for name, content in files.items():
            at.hold(name, content)
        return at.time(names)


def _time(steps: Sequence[Step], first: Block, setup: Setup) -> list[float]:
    """Run `steps` of torch one after the other: the undisturbed time of each, ms."""
    shape = _shape(first, setup)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(setup.device)
    run = _run_cuda if setup.device == "cuda" else run_in_order
    with torch.inference_mode(), computing_with(setup.threads), pinned(setup.cpus):
        return undisturbed(steps, images, run)


def _run_cuda(steps: Sequence[Step], features: Any) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        features = step(features)
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in pairwise(events)]
