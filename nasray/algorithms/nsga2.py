"""NSGA-II (Deb et al. 2002) over accuracy and any costs, on whole populations.

Knows no network: breed() a generation, evaluate it, absorb() it; repeat.
"""

import numpy as np

from nasray.spaces.population import crossover, mutate, random_population
from nasray.spaces.space import Population, Space

CROWDED = np.inf  # distance of the extremes of a rank: always kept before the crowded


class Nsga2:
    """Keeps the `size` least dominated architectures, spread along each rank."""

    def __init__(
        self, space: Space, *, seed: int, size: int = 100, mutation_prob: float | None = None
    ) -> None:
        self.space, self.size = space, size
        self.mutation_prob = 1 / len(space.genes) if mutation_prob is None else mutation_prob
        self.rng = np.random.default_rng(seed)
        self.population = np.empty((0, len(space.genes)), dtype=np.int8)
        self.losses = np.empty((0, 0))  # (n, objectives), all to be minimised
        self.ranks, self.distances = np.empty(0, dtype=int), np.empty(0)

    def breed(self) -> Population:
        """The next generation, in canonical form."""
        if len(self.population) < 2:
            drawn = random_population(self.space.genes, self.size, self.rng)
            return self.space.canonical(drawn)
        mothers, fathers = self._winners(), self._winners()
        children = crossover(self.population[mothers], self.population[fathers], self.rng)[0]
        mutants = mutate(children, self.space.genes, self.mutation_prob, self.rng)
        return self.space.canonical(mutants)

    def absorb(self, population: Population, losses: np.ndarray) -> None:
        """Learn the losses (n, objectives) of a generation; keep the best of old and new."""
        if len(self.population):
            population = np.concatenate((self.population, population))
            losses = np.concatenate((self.losses, losses))
        _, unique = np.unique(population, axis=0, return_index=True)
        unique.sort()
        population, losses = population[unique], losses[unique]
        ranks = rank(losses)
        distances = crowding(losses, ranks)
        kept = np.lexsort((-distances, ranks))[: self.size]
        self.population, self.losses = population[kept], losses[kept]
        self.ranks, self.distances = ranks[kept], distances[kept]

    def _winners(self) -> np.ndarray:
        """Rows that win a tournament of two: by rank, then by distance."""
        pairs = self.rng.integers(len(self.population), size=(2, self.size))
        place = np.empty(len(self.population), dtype=int)
        place[np.lexsort((-self.distances, self.ranks))] = np.arange(len(self.population))
        return np.where(place[pairs[0]] <= place[pairs[1]], pairs[0], pairs[1])


def rank(losses: np.ndarray) -> np.ndarray:
    """0 for rows that no row dominates, 1 for those that only rank 0 dominates, and so on."""
    no_worse = np.asarray((losses[:, None] <= losses).all(axis=2))
    dominates = no_worse & ~no_worse.T  # row i is nowhere worse than j, and better somewhere
    ranks = np.full(len(losses), -1)
    for number in range(len(losses)):
        open_rows = np.flatnonzero(ranks < 0)
        if not len(open_rows):
            break
        dominated = dominates[np.ix_(open_rows, open_rows)].any(axis=0)
        ranks[open_rows[~dominated]] = number
    return ranks


def crowding(losses: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """How far each row's neighbours of the same rank are apart, summed over the objectives."""
    distances = np.zeros(len(losses))
    for column in losses.T:
        order = np.lexsort((column, ranks))
        values, own = column[order], ranks[order]
        first = np.append(True, own[1:] != own[:-1])
        last = np.append(own[1:] != own[:-1], True)
        starts = np.flatnonzero(first)
        group = np.cumsum(first) - 1
        spread = (values[np.flatnonzero(last)] - values[starts])[group]
        gap = np.zeros(len(losses))
        gap[1:-1] = values[2:] - values[:-2]
        share = np.divide(gap, spread, out=np.zeros_like(gap), where=spread > 0)
        distances[order] += np.where(first | last, CROWDED, share)
    return distances
