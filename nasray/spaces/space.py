"""What every design space offers.

One architecture is a tuple of small integers, one choice index per gene. A population is
an int8 array (n, genes); population.py has the operators. Knows no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from nasray.errors import UserError

Architecture = tuple[int, ...]
Population = np.ndarray  # int8 (n, genes)


@dataclass(frozen=True)
class Gene:
    """One decision. `kind` groups genes that a sampler treats alike, e.g. "op" or "scale"."""

    name: str
    kind: str
    choices: tuple[Any, ...]
    first: int = 0  # search draws from choices[first:]; all of choices[] can be built


class Block(Protocol):
    """A row of a decoded architecture: frozen, hashable, complete in itself."""

    name: str
    in_channels: int
    resolution: int  # of the square input, pixels

    def build(self) -> Any:
        """Build the block as a plain nn.Module of standard layers."""


class Space(Protocol):
    """A design space: a frozen dataclass in a file of its own, listed in spaces/__init__.py."""

    name: str
    resolution: int
    num_classes: int

    @property
    def genes(self) -> tuple[Gene, ...]: ...

    @property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        """For each row of decode(): the genes (columns) that the row depends on."""

    @property
    def named(self) -> Mapping[str, Architecture]:
        """Published architectures by name."""

    def resolution_of(self, arch: Architecture) -> int:
        """The resolution of the square input that `arch` is to be given, pixels."""

    def decode(self, arch: Architecture) -> tuple[Block | None, ...]:
        """List the blocks of the subnet that `arch` stands for, stem to head.

        One entry per position of the deepest network, None where `arch` has no block.
        """

    def canonical(self, population: Population) -> Population:
        """Zero the genes that have no effect, so that equal networks are equal rows."""

    def supernet(self) -> Any:
        """Build the supernet: forward(images, arch), extract(arch)."""

    def initialize(self, network: Any, generator: Any) -> None:
        """Draw the initial weights of a supernet or subnet in place, from `generator` alone."""

    def copy_to_siblings(self, supernet: Any) -> None:
        """Copy each first operation's weights into its siblings, as nearly as they fit."""

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        """Write `arch` in the field's own keys."""

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        """Read what to_json writes; UserError names what is wrong."""


def num_architectures(genes: Sequence[Gene]) -> int:
    """Count the architectures search may draw (before canonical form)."""
    return prod(len(gene.choices) - gene.first for gene in genes)


def out_resolution(resolution: int, stride: int) -> int:
    """The output resolution of a layer with padding kernel // 2."""
    return (resolution - 1) // stride + 1


def check_architecture(arch: Sequence[int], space: Space) -> Architecture:
    """Return `arch` as a tuple if it lies in `space`; name the first gene that does not."""
    if len(arch) != len(space.genes):
        raise UserError(f"{space.name} has {len(space.genes)} genes, got {len(arch)}: {list(arch)}")
    for gene, choice in zip(space.genes, arch, strict=True):
        if not 0 <= choice < len(gene.choices):
            raise UserError(
                f"{space.name}: gene {gene.name} = {choice} must be an index 0..."
                f"{len(gene.choices) - 1} of its choices {list(gene.choices)}"
            )
    return tuple(int(choice) for choice in arch)


def index_lists(
    space: Space, values: Mapping[str, Any], keys: Mapping[str, str]
) -> dict[str, list[int]]:
    """Read {key: kind} lists of choice indices, one per gene of that kind."""
    unknown = sorted(set(values) - set(keys))
    missing = sorted(set(keys) - set(values))
    if unknown or missing:
        raise UserError(
            f"an architecture of {space.name} has the keys {sorted(keys)}, got {sorted(values)}"
        )
    lists = {}
    for key, kind in keys.items():
        count = sum(gene.kind == kind for gene in space.genes)
        value = values[key]
        whole = isinstance(value, list) and all(type(index) is int for index in value)
        if not whole or len(value) != count:
            raise UserError(
                f"{space.name}: {key!r} must be a list of {count} integers, got {value}"
            )
        lists[key] = value
    return lists
