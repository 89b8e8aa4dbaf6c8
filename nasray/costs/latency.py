"""Latency of architectures on a device, from a table of what each block takes there.

A network takes the sum of its blocks. Measures nothing itself (latency_measure.py) and reads
no file (latency_files.py).
"""

import hashlib
from typing import Any

import numpy as np

from nasray.costs.latency_files import LatencyOf, block_key, read_ofa_folder, read_own_file
from nasray.costs.table import BlockTable, block_choices
from nasray.errors import UserError
from nasray.spaces.space import Architecture, Population, Space


class LatencyTable:
    """Latencies of a space on one device: `table(population)`, by a BlockTable.

    `provenance`: the "space", "device" and whatever else the file at `path` says.

    Raises:
        UserError: `latency_of` knows no latency of a block of the space.
    """

    def __init__(
        self, path: str, provenance: dict[str, str], space: Space, latency_of: LatencyOf
    ) -> None:
        self.path, self.provenance = path, provenance
        missing: dict[str, str] = {}

        def value_of(block: Any, resolution: int) -> float:
            ms = latency_of(block, resolution)
            if ms is None:
                key = block_key(block)
                missing.setdefault(key, f"{block.name} at resolution {resolution}, {key}")
            return ms or 0.0

        self.blocks = BlockTable(space, value_of)
        if missing:
            more = f" (and {len(missing) - 1} more blocks)" if len(missing) > 1 else ""
            raise UserError(
                f"{path} has no latency of {next(iter(missing.values()))}{more}; measure what "
                "is missing, or search only what was measured (resolutions, width, ... of the "
                "space)"
            )

    @classmethod
    def load(cls, path: str, space: Space) -> "LatencyTable":
        """Read the table at `path` and look up every block of `space` in it.

        Raises:
            UserError: the table is absent, damaged, of another space, or lacks a block.
        """
        own = path.endswith((".parquet", ".csv"))
        latency_of, provenance = (read_own_file if own else read_ofa_folder)(path, space)
        return cls(path, provenance, space, latency_of)

    def __call__(self, population: Population) -> np.ndarray:
        """The latencies of `population` (n, genes): float64 (n,), ms."""
        return self.blocks.sums(population)

    def bounds(self) -> tuple[float, float]:
        """The smallest and largest latency that search can reach, ms, to the last digits."""
        return self.blocks.bounds()

    def digest(self) -> str:
        """A hash that differs between tables with different latencies for this space."""
        return hashlib.sha256(self.blocks.entries.tobytes()).hexdigest()


def blocks_of(space: Space) -> dict[Any, tuple[int, Architecture]]:
    """Every block that some architecture has -> its position, and an architecture with it."""
    blocks: dict[Any, tuple[int, Architecture]] = {}
    for position, arch, _ in block_choices(space):
        block = space.decode(arch)[position]
        if block is not None:
            blocks.setdefault(block, (position, arch))
    return blocks
