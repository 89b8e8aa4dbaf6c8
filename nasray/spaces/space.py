"""What every design space offers, and the operators that serve all of them alike.

One architecture is a tuple of small integers, one choice index per gene. A population is
an int8 array (n, genes). The operators work on whole populations; none loops over
candidates. Knows no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
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
    side: int  # of the square input, pixels

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
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """For each row of decode(): the genes (columns) that the row depends on."""

    @property
    def named(self) -> Mapping[str, Architecture]:
        """Published architectures by name."""

    def side(self, arch: Architecture) -> int:
        """The side of the square input that `arch` is to be given, pixels."""

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

    def spread(self, supernet: Any) -> None:
        """Copy each first operation's weights into its siblings, as nearly as they fit."""

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        """Write `arch` in the field's own keys."""

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        """Read what to_json writes; UserError names what is wrong."""


def num_architectures(genes: Sequence[Gene]) -> int:
    """Count the architectures search may draw (before canonical form)."""
    return prod(len(gene.choices) - gene.first for gene in genes)


def random_population(genes: Sequence[Gene], size: int, rng: np.random.Generator) -> Population:
    """Draw every gene uniformly from its search range."""
    first, last = _ranges(genes)
    return rng.integers(first, last, size=(size, len(genes)), dtype=np.int8)


def draw_pairs(number: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw `size` mothers of `number` parents (rows), and for each another one as father."""
    mothers = rng.integers(number, size=size)
    # The next 1 ... number - 1 places round the circle.
    fathers = (mothers + rng.integers(1, number, size=size)) % number
    return mothers, fathers


def crossover(
    mothers: Population, fathers: Population, rng: np.random.Generator
) -> tuple[Population, Population]:
    """Mate row by row, each gene from either parent with p = 1/2: two children per pair.

    The second child gets what the first did not (uniform crossover, spec 3.1).
    """
    from_mother = rng.random(mothers.shape) < 0.5
    return np.where(from_mother, mothers, fathers), np.where(from_mother, fathers, mothers)


def mutate(
    population: Population, genes: Sequence[Gene], prob: float, rng: np.random.Generator
) -> Population:
    """Redraw each gene with probability `prob`; the new value may equal the old (spec 3.1)."""
    fresh = random_population(genes, len(population), rng)
    return np.where(rng.random(population.shape) < prob, fresh, population)


def embedded(population: Population, genes: Sequence[Gene]) -> np.ndarray:
    """Vectors, one for each row; their squared distances sum over the genes how far two
    architectures are apart: 0 to 1 each, for genes of kind "op" whether they differ, for all
    others by their places among the choices.
    """
    return np.concatenate(
        [_vectors(gene)[population[:, column]] for column, gene in enumerate(genes)], axis=1
    )


def squared_distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Between vectors (rows, any) and (columns, any): (rows, columns)."""
    squares = np.square(rows).sum(axis=1)[:, None] + np.square(columns).sum(axis=1)
    return (squares - 2 * rows @ columns.T).clip(0)


@lru_cache(maxsize=1024)
def _vectors(gene: Gene) -> np.ndarray:
    """One for each choice."""
    number = len(gene.choices)
    if gene.kind == "op":
        return np.eye(number) / 2**0.5
    return np.tri(number, number - 1, -1) / max(1, number - 1) ** 0.5


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


def as_architectures(population: Population) -> list[Architecture]:
    return [tuple(row) for row in population.tolist()]


def as_population(archs: Sequence[Architecture]) -> Population:
    return np.array(archs, dtype=np.int8)


def _ranges(genes: Sequence[Gene]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([gene.first for gene in genes], dtype=np.int8),
        np.array([len(gene.choices) for gene in genes], dtype=np.int8),
    )
