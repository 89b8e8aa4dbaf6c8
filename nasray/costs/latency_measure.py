"""Measure a latency table on this device, and check a table against whole networks.

A block is timed where it will run: inside whole networks. Random architectures run block by
block with a clock reading between the blocks. So every block finds its input as warm and its
weights as cold as in a network, the readings of a run add up to the network's own time, and
overhead that is paid per network is not counted once per block.

A pass runs as many random networks as it takes to meet every block; a slow phase of the
machine hits whatever blocks those networks have. Passes go on until the median of every
block is known well enough. Knows no Ray: time_blocks() takes and gives plain values, so that
another process can run it.

onnxruntime has no clock between blocks: each block is a session of its own, and the readings
of a network are scaled to add up to what the network takes as one session.
"""

import io
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import nn

from nasray.costs.latency import LatencyTable, blocks_of
from nasray.costs.latency_files import block_key, provenance_of, read_lines, write_lines
from nasray.devices import computing_with
from nasray.errors import UserError
from nasray.progress import Show
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.space import Architecture, Block, Space
from nasray.spaces.supernet import build_subnet
from nasray.storage import files as storage
from nasray.storage import locks

WARMUP_RUNS, RUNS = 2, 15  # of a network, each time it is drawn
# Of the runs of one network: what is slower shared its processor with something else. On a
# machine with six times more work than cores this quantile still repeated within 2.6 %, the
# median within 12 %.
RUN_QUANTILE = 0.1
MIN_SAMPLES, MAX_SAMPLES = 5, 25  # per block; each from one network, at another time
TOLERANCE = 0.02  # wanted of a block: the standard error of its median, as a share of it
RUNTIMES = ("torch", "onnxruntime")
NUM_DRAWS = 16  # networks drawn at a time, of which the one that meets most blocks is run
SAVE_EVERY_S = 10.0
CHECK_PASSES = 3

Step = Callable[[Any], Any]
Wanted = dict[str, dict[int, int]]  # block_key -> {column: choice} of the networks with it


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How to measure. The rest of a table's provenance is the machine's."""

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


@dataclass(frozen=True)
class Agreement:
    """How well a table predicts whole networks."""

    rows: tuple[tuple[Architecture, float, float], ...]  # arch, predicted ms, measured ms
    median_relative_error: float  # of |predicted - measured| / measured
    median_bias: float  # of (predicted - measured) / measured
    median_scatter: float  # of (slowest - fastest) / median of a network's measurements
    rank_correlation: float  # Spearman's


def measure(
    space: Space,
    path: str,
    *,
    setup: Setup | None = None,
    resolutions: Sequence[int] | None = None,
    seed: int = 0,
    show: Show = lambda done, text: None,
) -> None:
    """Measure every block of `space` into the table at `path`, a .parquet or .csv file, alone.

    A table that is there is continued: only what it lacks is measured. `show` hears
    how many of len(wanted_blocks()) are done. When interrupted, what was measured is kept.
    """
    setup = setup or Setup()
    wanted = wanted_blocks(space, resolutions)
    lock = f"{path}.in-use"
    with locks.held(lock):
        try:
            _measure(space, _Table(path, describe(space, setup)), wanted, setup, seed, show)
        finally:
            storage.remove(lock)
    show(len(wanted), "")


def _measure(
    space: Space, table: "_Table", wanted: Wanted, setup: Setup, seed: int, show: Show
) -> None:
    done = sum(map(len, table.samples.values()))
    rng = np.random.default_rng((seed, done))  # not the networks of the first time again
    saved = time.monotonic()
    try:
        while unsure := {key: genes for key, genes in wanted.items() if table.share(key) < 1}:
            for arch in networks_with(space, unsure, rng):
                table.add(time_blocks(space, arch, setup, seed=seed))
                show(int(sum(map(table.share, wanted))), f"{len(unsure)} not yet sure")
                if time.monotonic() - saved > SAVE_EVERY_S:
                    table.save()
                    saved = time.monotonic()
    finally:
        if sum(map(len, table.samples.values())) > done:
            table.save()


def doubt(path: str) -> str:
    """What is to be said of a measured table with blocks that stay unsure; else nothing."""
    lines = read_lines(path) if storage.exists(path) else []  # not on another machine's disk
    errors = [_error([float(value) for value in line["samples_ms"].split()]) for line in lines]
    unsure = [error for error in errors if error > TOLERANCE]
    if not unsure:
        return ""
    return (
        f"{path}: {len(unsure)} of {len(lines)} blocks are known to {np.median(unsure):.1%} only "
        f"(aim: {TOLERANCE:.0%}): something else ran meanwhile; remove the file and measure again "
        "when that has ended"
    )


def wanted_blocks(space: Space, resolutions: Sequence[int] | None = None) -> Wanted:
    """What measure() has to measure, each block once, however often networks have it."""
    wanted: Wanted = {}
    blocks = blocks_of(space)
    sides = sorted({space.resolution_of(arch) for _, arch in blocks.values()})
    for block, (position, arch) in blocks.items():
        if resolutions is None or space.resolution_of(arch) in resolutions:
            columns = space.gene_columns[position]
            wanted.setdefault(block_key(block), {column: arch[column] for column in columns})
    for side in resolutions or ():
        if side not in sides:
            raise UserError(
                f"{space.name} has no resolution {side}: they are {', '.join(map(str, sides))}"
            )
    return wanted


def networks_with(space: Space, wanted: Wanted, rng: np.random.Generator) -> Iterator[Architecture]:
    """Yield random architectures until each of the blocks `wanted` was in one of them."""
    missing = dict(wanted)
    sizes = [len(gene.choices) for gene in space.genes]
    while missing:
        draws = rng.integers(0, sizes, size=(NUM_DRAWS, len(sizes)))
        for column, choice in missing[rng.choice(list(missing))].items():
            draws[:, column] = choice
        archs = as_architectures(draws)
        found = [{block_key(row) for row in space.decode(arch) if row} for arch in archs]
        best = max(range(NUM_DRAWS), key=lambda index: len(found[index] & missing.keys()))
        yield archs[best]
        missing = {key: genes for key, genes in missing.items() if key not in found[best]}


def check(space: Space, table: LatencyTable, *, num_archs: int = 50, seed: int = 0) -> Agreement:
    """Compare `table` with whole random networks, measured here as the table was."""
    setup = _setup_of(table)
    if describe(space, setup) != dict(table.provenance):
        raise UserError(
            f"{table.path} was measured on {dict(table.provenance)}, this is "
            f"{describe(space, setup)}; check it there"
        )
    archs = random_population(space.genes, num_archs, np.random.default_rng(seed))
    rng = np.random.default_rng((seed, 1))
    samples: list[list[float]] = [[] for _ in archs]
    for _ in range(CHECK_PASSES):
        for index in rng.permutation(num_archs):
            arch = tuple(archs[index].tolist())
            samples[index].append(time_network(space, arch, setup, seed=seed))
    return compare(archs, table(archs), np.array(samples))


def compare(archs: np.ndarray, predicted: np.ndarray, samples: np.ndarray) -> Agreement:
    """How well `predicted` (n,) agrees with what was measured, `samples` (n, times), ms."""
    measured = np.median(samples, axis=1)
    relative = (predicted - measured) / measured
    rows = zip(as_architectures(archs), predicted.tolist(), measured.tolist(), strict=True)
    ranks = [values.argsort().argsort() for values in (predicted, measured)]
    num = len(measured)
    correlation = 1 - 6 * np.sum((ranks[0] - ranks[1]) ** 2) / (num * (num**2 - 1))
    return Agreement(
        tuple(rows),
        median_relative_error=float(np.median(np.abs(relative))),
        median_bias=float(np.median(relative)),
        median_scatter=float(np.median(np.ptp(samples, axis=1) / measured)),
        rank_correlation=float(correlation),
    )


def time_blocks(
    space: Space, arch: Architecture, setup: Setup, *, seed: int = 0
) -> list[tuple[str, float]]:
    """Run `arch` block by block: (block_key, ms) of each."""
    blocks: list[Any] = [block for block in space.decode(arch) if block is not None]
    if setup.runtime == "torch":
        times = _time(list(_build(space, blocks, setup, seed)), blocks[0], setup)
    else:
        whole: Any = space
        steps = [_session(whole, replace(block, name="block"), setup, seed) for block in blocks]
        alone = _time(steps, blocks[0], setup)
        # Each call of a session costs time, and converts its tensors: the network does so once.
        shorter = time_network(space, arch, setup, seed=seed) / sum(alone)
        times = [ms * shorter for ms in alone]
    return [(block_key(block), ms) for block, ms in zip(blocks, times, strict=True)]


def time_network(space: Space, arch: Architecture, setup: Setup, *, seed: int = 0) -> float:
    """Run `arch` as a whole: ms."""
    blocks = [block for block in space.decode(arch) if block is not None]
    network = _build(space, blocks, setup, seed)
    step = network if setup.runtime == "torch" else _to_session(network, blocks[0], setup)
    return _time([step], blocks[0], setup)[0]


def describe(space: Space, setup: Setup) -> dict[str, str]:
    """What a table of `space` measured here with `setup` says of its origin."""
    processor = torch.cuda.get_device_name() if setup.device == "cuda" else _processor()
    values = {"space": space.name, **asdict(setup), "processor": processor}
    values["version"] = version(setup.runtime)  # of the runtime
    return {name: str(value) for name, value in values.items()}


def _setup_of(table: LatencyTable) -> Setup:
    values = table.provenance
    try:
        return Setup(
            device=values["device"],
            runtime=values["runtime"],
            threads=int(values["threads"]),
            batch_size=int(values["batch_size"]),
        )
    except (ValueError, UserError) as error:
        raise UserError(f"{table.path}: {error}") from None
    except KeyError as error:
        raise UserError(
            f"{table.path} does not say {error}, as tables of `nasray measure-latency` do; check "
            "one of those"
        ) from None


class _Table:
    """The table while it is measured: samples by block, ms, kept in the file at `path`."""

    def __init__(self, path: str, provenance: dict[str, str]) -> None:
        if not path.endswith((".parquet", ".csv")):
            raise UserError(f"{path} must end in .parquet or .csv")
        self.path, self.provenance = path, provenance
        self.samples: dict[str, list[float]] = {}
        self.measured_at: dict[str, str] = {}
        lines = read_lines(path) if storage.exists(path) else []
        before = provenance_of(lines, path) if lines else provenance
        for name in before | provenance:
            if before.get(name) != provenance.get(name):
                raise UserError(
                    f"{path} was measured with {name} = {before.get(name)}, this is "
                    f"{provenance.get(name)}; give another file"
                )
        for line in lines:
            values = (line.get("samples_ms") or line["ms"]).split()
            self.samples[line["block"]] = [float(value) for value in values]
            self.measured_at[line["block"]] = line.get("measured_at", "")

    def add(self, times: Sequence[tuple[str, float]]) -> None:
        """Keep one sample per block: the median over the places where a network has it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        by_key: dict[str, list[float]] = {}
        for key, ms in times:
            by_key.setdefault(key, []).append(ms)
        for key, values in by_key.items():
            if self.share(key) < 1:
                self.samples.setdefault(key, []).append(
                    float(f"{np.median(values):.5g}")
                )  # as saved
                self.measured_at[key] = now

    def share(self, key: str) -> float:
        """How far a block is measured: 1 if its median is sure, or will not get surer."""
        samples = self.samples.get(key, [])
        if len(samples) < MIN_SAMPLES:
            return len(samples) / (MIN_SAMPLES + 1)
        done = _error(samples) <= TOLERANCE or len(samples) >= MAX_SAMPLES
        return 1.0 if done else MIN_SAMPLES / (MIN_SAMPLES + 1)

    def save(self) -> None:
        lines = [
            {
                "block": key,
                "ms": f"{np.median(samples):.6g}",
                "spread_ms": f"{_spread(samples):.3g}",
                "samples_ms": " ".join(str(sample) for sample in samples),
                "measured_at": self.measured_at[key],
                **self.provenance,
            }
            for key, samples in sorted(self.samples.items())
        ]
        if lines:
            write_lines(self.path, lines)


def _build(space: Space, blocks: Sequence[Block], setup: Setup, seed: int) -> nn.Sequential:
    """A network with initial weights: without any, denormal numbers could slow it down."""
    network = build_subnet(blocks)
    space.initialize(network, torch.Generator().manual_seed(seed))
    return network.to(setup.device).eval()


@lru_cache(maxsize=1024)
def _session(space: Any, block: Any, setup: Setup, seed: int) -> Step:
    return _to_session(_build(space, [block], setup, seed), block, setup)


def _to_session(network: nn.Module, first: Block, setup: Setup) -> Step:
    """`network` in onnxruntime: maps an array to an array."""
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
    """Run `steps` one after the other, several times: what each takes undisturbed, ms."""
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


def _error(samples: Sequence[float]) -> float:
    """The standard error of the median of normal samples, as a share of it."""
    return float(1.25 * _spread(samples) / len(samples) ** 0.5 / np.median(samples))


def _spread(samples: Sequence[float]) -> float:
    """A standard deviation that a few slow samples do not change."""
    return 1.4826 * float(np.median(np.abs(np.asarray(samples) - np.median(samples))))


def _processor() -> str:
    """The name of this machine's CPU."""
    with suppress(OSError), open("/proc/cpuinfo") as file:  # Linux
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
