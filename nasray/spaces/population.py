"""Operators on populations, which serve all spaces alike.

A population is an int8 array (n, genes). None of these loops over architectures. Knows no network.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nasray.spaces.space import Architecture, Gene, Population


def random_population(genes: Sequence[Gene], size: int, rng: np.random.Generator) -> Population:
    """Draw `size` architectures, every gene uniformly from its search range: int8 (size, genes)."""
    first, last = _ranges(genes)
    return rng.integers(first, last, size=(size, len(genes)), dtype=np.int8)


def draw_pairs(number: int, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw `size` pairs of different parents, as indices below `number`: two arrays (size,)."""
    mothers = rng.integers(number, size=size)
    # Further on by 1 ... number - 1, so never the mother herself.
    fathers = (mothers + rng.integers(1, number, size=size)) % number
    return mothers, fathers


def crossover(
    mothers: Population, fathers: Population, rng: np.random.Generator
) -> tuple[Population, Population]:
    """Mate row by row, each gene from either parent with p = 1/2: two children per pair.

    The second child gets what the first did not: uniform crossover (docs/spec.md, OneShot 3.1).
    """
    from_mother = rng.random(mothers.shape) < 0.5
    return np.where(from_mother, mothers, fathers), np.where(from_mother, fathers, mothers)


def mutate(
    population: Population, genes: Sequence[Gene], prob: float, rng: np.random.Generator
) -> Population:
    """Redraw each gene with probability `prob`; the new value may equal the old one.

    As published (docs/spec.md, OneShot 3.1).
    """
    fresh = random_population(genes, len(population), rng)
    return np.where(rng.random(population.shape) < prob, fresh, population)


def embedded(population: Population, genes: Sequence[Gene]) -> np.ndarray:
    """Embed architectures: float64 (n, dimensions), from a population (n, genes).

    The squared distance of two vectors sums a distance of 0 to 1 over the genes: for kind "op"
    whether they differ, for all others the difference of their positions among the choices.
    """
    return np.concatenate(
        [_vectors(gene)[population[:, column]] for column, gene in enumerate(genes)], axis=1
    )


def squared_distances(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return the squared distances (n, m) between vectors (n, any) and (m, any)."""
    squares = np.square(rows).sum(axis=1)[:, None] + np.square(columns).sum(axis=1)
    return (squares - 2 * rows @ columns.T).clip(0)


@lru_cache(maxsize=1024)
def _vectors(gene: Gene) -> np.ndarray:
    """Return one vector for each choice of `gene`."""
    number = len(gene.choices)
    if gene.kind == "op":
        return np.eye(number) / 2**0.5
    return np.tri(number, number - 1, -1) / max(1, number - 1) ** 0.5


def as_architectures(population: Population) -> list[Architecture]:
    """Return the rows of `population` (n, genes) as tuples."""
    return [tuple(row) for row in population.tolist()]


def as_population(archs: Sequence[Architecture]) -> Population:
    """Return `archs` as an int8 array (n, genes)."""
    return np.array(archs, dtype=np.int8)


def _ranges(genes: Sequence[Gene]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([gene.first for gene in genes], dtype=np.int8),
        np.array([len(gene.choices) for gene in genes], dtype=np.int8),
    )
