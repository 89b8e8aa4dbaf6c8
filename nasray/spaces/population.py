"""Operators on populations, which serve all spaces alike.

A population is an int8 array (n, genes). None of these loops over architectures. Knows no network.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from nasray.spaces.space import Architecture, Gene, Population


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


def as_architectures(population: Population) -> list[Architecture]:
    return [tuple(row) for row in population.tolist()]


def as_population(archs: Sequence[Architecture]) -> Population:
    return np.array(archs, dtype=np.int8)


def _ranges(genes: Sequence[Gene]) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([gene.first for gene in genes], dtype=np.int8),
        np.array([len(gene.choices) for gene in genes], dtype=np.int8),
    )
