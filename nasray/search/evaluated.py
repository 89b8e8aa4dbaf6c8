"""Evaluated architectures as arrays, for searches that count in hundreds of thousands."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nasray.search.candidate import Candidate
from nasray.search.limits import Answer
from nasray.spaces.space import Population


@dataclass(frozen=True)
class Evaluated:
    """A population with its numbers, row by row."""

    population: Population  # int8 (n, genes)
    costs: np.ndarray  # float64 (n,), or (n, costs)
    fitness: np.ndarray  # (n,); -inf marks an infeasible architecture

    @classmethod
    def of(cls, candidates: Sequence[Candidate], *costs: str) -> "Evaluated":
        """`candidates` with these costs; of one cost, the array is one-dimensional."""
        columns = [[candidate.costs[cost] for candidate in candidates] for cost in costs]
        return cls(
            np.array([candidate.arch for candidate in candidates], dtype=np.int8),
            np.array(columns[0]) if len(costs) == 1 else np.array(columns).T,
            np.array([candidate.fitness for candidate in candidates]),
        )

    @classmethod
    def empty(cls, num_genes: int) -> "Evaluated":
        """A population of no rows, with one cost."""
        return cls(np.empty((0, num_genes), dtype=np.int8), np.empty(0), np.empty(0))

    def __len__(self) -> int:
        return len(self.population)

    def __getitem__(self, rows: np.ndarray | slice) -> "Evaluated":
        return Evaluated(self.population[rows], self.costs[rows], self.fitness[rows])

    def __add__(self, other: "Evaluated") -> "Evaluated":
        return Evaluated(
            np.concatenate((self.population, other.population)),
            np.concatenate((self.costs, other.costs)),
            np.concatenate((self.fitness, other.fitness)),
        )

    def replaced(self, rows: np.ndarray, other: "Evaluated") -> "Evaluated":
        """A copy with `other` in `rows`; of several for one row, the last."""
        new = Evaluated(self.population.copy(), self.costs.copy(), self.fitness.copy())
        new.population[rows], new.costs[rows] = other.population, other.costs
        new.fitness[rows] = other.fitness
        return new

    def distinct(self) -> "Evaluated":
        """Each architecture once: its first row."""
        _, first = np.unique(self.population, axis=0, return_index=True)
        return self[np.sort(first)]

    def best_first(self) -> "Evaluated":
        """Sorted by fitness; rows of equal fitness stay in order."""
        return self[np.argsort(-self.fitness, kind="stable")]

    def answer(self, limit: float, row: int) -> Answer:
        """One row as the answer for `limit`."""
        arch = tuple(self.population[row].tolist())
        return Answer(limit, arch, float(self.costs[row]), float(self.fitness[row]))
