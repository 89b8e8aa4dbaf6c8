"""Latency of architectures on a device, from a table of what each block takes there.

A network takes the sum of its blocks; a population is priced by one gather per block. Measures
nothing itself (latency_measure.py) and reads no file (latency_files.py).
"""

import hashlib
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from nasray.costs.latency_files import Price, block_key, ofa_prices, own_prices
from nasray.costs.table import smallest_sum
from nasray.errors import UserError
from nasray.spaces.space import Architecture, Population, Space


class LatencyTable:
    """Latencies of a space on one device, compiled: prices a population by gathers."""

    def __init__(self, path: str, provenance: dict[str, str], space: Space, price: Price) -> None:
        self.path = path
        self.provenance = provenance  # "space", "device" and whatever else the file says
        self.genes = space.genes
        self.parts = space.gene_columns
        self.tables = _compile(space, price, path)  # per part: float64 (choices of its genes...)
        self._flatten()

    @classmethod
    def load(cls, path: str, space: Space) -> "LatencyTable":
        """Read the table at `path` and look up every block of `space` in it."""
        own = path.endswith((".parquet", ".csv"))
        price, provenance = own_prices(path, space) if own else ofa_prices(path, space)
        return cls(path, provenance, space, price)

    def __call__(self, population: Population) -> np.ndarray:
        """Price `population` (n, genes): float64 (n,), ms."""
        # No matrix product: it would wake BLAS threads, which then spin on the cores that a
        # predictor computes on.
        choices = population.T.astype(self.offsets.dtype)
        places = np.repeat(self.offsets[:, None], len(population), axis=1)
        for columns, strides in zip(self.columns, self.strides, strict=True):
            places += choices[columns] * strides[:, None]
        total = np.zeros(len(population))
        for latency in self.entries[places]:  # in this order, however many architectures
            total += latency
        return total

    def digest(self) -> str:
        """Tells tables with other prices for this space apart."""
        return hashlib.sha256(self.entries.tobytes()).hexdigest()

    def bounds(self) -> tuple[float, float]:
        """The smallest and largest latency that search can reach, ms, to the last digits."""
        terms = []
        for columns, table in zip(self.parts, self.tables, strict=True):
            drawn = tuple(slice(self.genes[column].first, None) for column in columns)
            terms.append((columns, table[drawn]))
        return smallest_sum(terms), -smallest_sum([(columns, -table) for columns, table in terms])

    def _flatten(self) -> None:
        """One array of all tables' entries, and how choices lead to a place in it."""
        self.entries = np.concatenate([table.ravel() for table in self.tables])
        sizes = [table.size for table in self.tables]
        dtype = np.int16 if len(self.entries) <= np.iinfo(np.int16).max else np.int32
        self.offsets = np.cumsum([0, *sizes[:-1]], dtype=dtype)  # of each part's entries
        # The first column of every part, the second, ...: (most genes of a part, parts).
        most = max(len(columns) for columns in self.parts)
        self.columns = np.zeros((most, len(self.parts)), dtype=np.intp)
        self.strides = np.zeros((most, len(self.parts)), dtype=dtype)  # 0: no such column
        for part, (columns, table) in enumerate(zip(self.parts, self.tables, strict=True)):
            self.columns[: len(columns), part] = columns
            self.strides[: len(columns), part] = np.array(table.strides) // table.itemsize


def blocks_of(space: Space) -> dict[Any, tuple[int, Architecture]]:
    """Every block that some architecture has -> its position, and an architecture with it."""
    blocks: dict[Any, tuple[int, Architecture]] = {}
    for position, arch, _ in _choices(space):
        block = space.decode(arch)[position]
        if block is not None:
            blocks.setdefault(block, (position, arch))
    return blocks


def _choices(space: Space) -> Iterable[tuple[int, Architecture, tuple[int, ...]]]:
    """(position, architecture, choices) for all choices of each part's genes, the rest at 0."""
    for position, columns in enumerate(space.gene_columns):
        sizes = [len(space.genes[column].choices) for column in columns]
        for choices in itertools.product(*map(range, sizes)):
            arch = [0] * len(space.genes)
            for column, choice in zip(columns, choices, strict=True):
                arch[column] = choice
            yield position, tuple(arch), choices


def _compile(space: Space, price: Price, path: str) -> list[np.ndarray]:
    """Price each part at every choice of its own genes; name the first block without a price."""
    tables = [
        np.zeros([len(space.genes[column].choices) for column in columns])
        for columns in space.gene_columns
    ]
    missing: dict[str, str] = {}
    for position, arch, choices in _choices(space):
        block = space.decode(arch)[position]
        if block is None:  # left out by the depth: takes no time
            continue
        ms = price(block, space.resolution_of(arch))
        if ms is None:
            where = f"{block.name} at resolution {space.resolution_of(arch)}, {block_key(block)}"
            missing.setdefault(block_key(block), where)
        else:
            tables[position][choices] = ms
    if missing:
        more = f" (and {len(missing) - 1} more blocks)" if len(missing) > 1 else ""
        raise UserError(
            f"{path} has no latency of {next(iter(missing.values()))}{more}; measure what "
            "is missing, or search only what was measured (resolutions, width, ... of the space)"
        )
    return tables
