"""NSGA-II (Deb et al. 2002) over accuracy and any costs, on whole populations.

Kept because it is the only algorithm here that trades off more than one cost: with limits on
MACs and latency its population spreads over both.
"""

import numpy as np

from nasray.search.evaluated import Evaluated
from nasray.spaces.population import crossover, mutate, random_population
from nasray.spaces.space import Population, Space

CROWDED = np.inf  # the extremes of a rank are always kept before the others


class Nsga2:
    """Keeps the `size` least dominated architectures, spread along each rank."""

    def __init__(
        self, space: Space, *, seed: int, size: int = 100, mutation_prob: float | None = None
    ) -> None:
        self.space, self.size = space, size
        self.mutation_prob = 1 / len(space.genes) if mutation_prob is None else mutation_prob
        self.rng = np.random.default_rng(seed)
        self.members = Evaluated.empty(len(space.genes))
        self.ranks, self.distances = np.empty(0, dtype=int), np.empty(0)

    def ask(self) -> Population:
        """The next generation, in canonical form: int8 (size, genes)."""
        population, genes = self.members.population, self.space.genes
        if len(population) < 2:
            return self.space.canonical(random_population(genes, self.size, self.rng))
        mothers, fathers = self._winners(), self._winners()
        children = crossover(population[mothers], population[fathers], self.rng)[0]
        return self.space.canonical(mutate(children, genes, self.mutation_prob, self.rng))

    def tell(self, evaluated: Evaluated) -> None:
        """Keep the best of the members and `evaluated`, by its fitness and all its costs."""
        members = (self.members + evaluated if len(self.members) else evaluated).distinct()
        losses = np.column_stack((-members.fitness, members.costs))
        ranks = rank(losses)
        distances = crowding(losses, ranks)
        kept = np.lexsort((-distances, ranks))[: self.size]
        self.members, self.ranks, self.distances = members[kept], ranks[kept], distances[kept]

    def _winners(self) -> np.ndarray:
        """Rows that win a tournament of two: by rank, then by distance."""
        number = len(self.members)
        pairs = self.rng.integers(number, size=(2, self.size))
        place = np.empty(number, dtype=int)
        place[np.lexsort((-self.distances, self.ranks))] = np.arange(number)
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
