"""Measure a latency table on this device, or on a host: every block of a space.

A pass runs as many random networks as it takes to meet every block; a slow phase of the
machine hits whatever blocks those networks have. Passes go on until the median of every
block is known well enough. latency_timing.py says how a network is timed.
"""

import re
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

import numpy as np

from nasray.costs.latency import blocks_of
from nasray.costs.latency_board import UNKNOWN
from nasray.costs.latency_files import (
    BEFORE,
    DESCRIPTIVE,
    Line,
    block_key,
    differing,
    provenance_of,
    read_lines,
    write_lines,
)
from nasray.costs.latency_timing import Place, Setup, describe, time_blocks
from nasray.errors import UserError
from nasray.progress import Show
from nasray.spaces.population import as_architectures
from nasray.spaces.space import Architecture, Space
from nasray.storage import files as storage
from nasray.storage import locks

MIN_SAMPLES, MAX_SAMPLES = 5, 25  # per block; each from one network, at another time
TOLERANCE = 0.02  # wanted of a block: the standard error of its median, as a share of it
NUM_DRAWS = 16  # networks drawn at a time, of which the one that meets most blocks is run
SAVE_EVERY_S = 10.0

Wanted = dict[str, dict[int, int]]  # block_key -> {column: choice} of the networks with it


def measure(
    space: Space,
    path: str,
    *,
    setup: Setup | None = None,
    place: Place | None = None,
    resolutions: Sequence[int] | None = None,
    seed: int = 0,
    show: Show = lambda done, text: None,
) -> None:
    """Measure every block of `space` into the table at `path`, a .parquet or .csv file.

    A table that exists is continued: only what it lacks is measured. `show` is called with
    the number of blocks done, of len(wanted_blocks()). When interrupted, what was measured is
    kept. A lock beside the file keeps other processes out. `place` is from place_at(setup).

    Raises:
        UserError: the file is damaged, in use, of another setup or machine, or has another
            ending; `space` lacks one of `resolutions`; or `place` cannot measure.
    """
    setup = setup or Setup()
    wanted = wanted_blocks(space, resolutions)
    with locks.held(f"{path}.in-use", temporary=True):
        table = _Table(path, describe(space, setup, place=place))
        _measure(space, table, wanted, setup, place, seed, show)
    show(len(wanted), "")


def _measure(
    space: Space,
    table: "_Table",
    wanted: Wanted,
    setup: Setup,
    place: Place | None,
    seed: int,
    show: Show,
) -> None:
    done = sum(map(len, table.samples.values()))
    rng = np.random.default_rng((seed, done))  # after an interruption: other networks
    saved = time.monotonic()
    try:
        while unsure := {key: genes for key, genes in wanted.items() if table.share(key) < 1}:
            for arch in networks_with(space, unsure, rng):
                table.add(time_blocks(space, arch, setup, seed=seed, place=place))
                show(int(sum(map(table.share, wanted))), f"{len(unsure)} not yet sure")
                if time.monotonic() - saved > SAVE_EVERY_S:
                    table.save()
                    saved = time.monotonic()
    finally:
        if sum(map(len, table.samples.values())) > done:
            table.save()


def doubts(path: str) -> list[str]:
    """Warnings about a measured table, each one line: imprecise blocks, a clock that changed."""
    lines = read_lines(path) if storage.exists(path) else []  # not on another machine's disk
    return [warning for warning in (_unsure(path, lines), _clocked(path, lines)) if warning]


def _unsure(path: str, lines: Sequence[Line]) -> str:
    errors = [_error([float(value) for value in line["samples_ms"].split()]) for line in lines]
    unsure = [error for error in errors if error > TOLERANCE]
    if not unsure:
        return ""
    return (
        f"{path}: {len(unsure)} of {len(lines)} blocks are known to {np.median(unsure):.1%} only "
        f"(aim: {TOLERANCE:.0%}): something else ran meanwhile; remove the file and measure again "
        "when that has ended"
    )


def _clocked(path: str, lines: Sequence[Line]) -> str:
    told = lines[0].get("governor", "") if lines else ""
    others = set(re.split("[,;] ", told)) - {"", UNKNOWN, "performance"}
    if not others:
        return ""
    return (
        f"{path}: the scaling governor was {' and '.join(sorted(others))}, which changes the clock "
        "rate while blocks are timed; set performance (sudo cpupower frequency-set -g performance, "
        "on the machine that is measured), remove the file and measure again"
    )


def wanted_blocks(space: Space, resolutions: Sequence[int] | None = None) -> Wanted:
    """The blocks that measure() has to measure: block_key -> the genes of networks with it.

    Raises:
        UserError: `space` lacks one of `resolutions`.
    """
    wanted: Wanted = {}
    blocks = blocks_of(space)
    known = sorted({space.resolution_of(arch) for _, arch in blocks.values()})
    for block, (position, arch) in blocks.items():
        if resolutions is None or space.resolution_of(arch) in resolutions:
            columns = space.gene_columns[position]
            wanted.setdefault(block_key(block), {column: arch[column] for column in columns})
    for resolution in resolutions or ():
        if resolution not in known:
            raise UserError(
                f"{space.name} has no resolution {resolution}: they are "
                f"{', '.join(map(str, known))}"
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


class _Table:
    """The table while it is measured: samples by block, ms, saved in the file at `path`."""

    def __init__(self, path: str, provenance: dict[str, str]) -> None:
        if not path.endswith((".parquet", ".csv")):
            raise UserError(f"{path} must end in .parquet or .csv")
        self.path, self.provenance = path, provenance
        self.samples: dict[str, list[float]] = {}
        self.measured_at: dict[str, str] = {}
        lines = read_lines(path) if storage.exists(path) else []
        before = provenance_of(lines, path) if lines else provenance
        for name in differing(before, provenance):
            raise UserError(
                f"{path} was measured with {name} = {(BEFORE | before).get(name)}, this is "
                f"{provenance.get(name)}; give another file"
            )
        for name in DESCRIPTIVE:  # of the first and of each other time
            said = [*before.get(name, "").split("; "), provenance[name]]
            provenance[name] = "; ".join(dict.fromkeys(filter(None, said)))
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
                sample = float(f"{np.median(values):.5g}")  # rounded as in the file
                self.samples.setdefault(key, []).append(sample)
                self.measured_at[key] = now

    def share(self, key: str) -> float:
        """How much of a block's measuring is done: 1 if its median is precise, or stays so."""
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


def _error(samples: Sequence[float]) -> float:
    """The standard error of the median of normal samples, as a share of it."""
    return float(1.25 * _spread(samples) / len(samples) ** 0.5 / np.median(samples))


def _spread(samples: Sequence[float]) -> float:
    """A robust standard deviation (by the median absolute deviation), ms."""
    return 1.4826 * float(np.median(np.abs(np.asarray(samples) - np.median(samples))))
