"""Searches for several limits on one cost, as algorithms of the driver.

The cost of the first entry of search.limits is the one whose limits are answered one by one:
each of its `max` asks for an architecture. All other limits hold for every candidate. Without
any limit there is one answer, for the whole space.
"""

import copy

import numpy as np

from nasray.algorithms.annealing import Annealing
from nasray.algorithms.nsga2 import Nsga2
from nasray.algorithms.staged import FIRST, LATER, Staged
from nasray.config import Limit, SearchConfig, limited_cost
from nasray.search.candidate import Candidate
from nasray.search.evaluated import Evaluated
from nasray.search.limits import Limits
from nasray.search.predicted import PopulationSearch
from nasray.spaces.population import as_architectures
from nasray.spaces.space import Architecture, Population, Space

MAX_ROUNDS = 30  # of asking the population, then random architectures fill the generation


class SplitLimits:
    """search.limits, split into those answered one by one and those of every candidate."""

    def __init__(self, limits: Limits) -> None:
        given = limits.limits
        self.cost = limited_cost(given)
        own = [limit for limit in given if limit.cost == self.cost]
        others = [limit for limit in given if limit.cost != self.cost]
        maxima = [limit.max for limit in own if limit.max is not None]
        minima = [limit.min for limit in own if limit.min is not None]
        self.maxima = maxima or [limits.bounds(self.cost)[1]]  # one for each answer
        loosest = Limit(cost=self.cost, max=max(self.maxima), min=min(minima, default=None))
        self.bounds = copy.copy(limits)  # with the same cost table
        self.bounds.limits = (loosest, *others)
        self.costs = tuple(dict.fromkeys([self.cost, *(limit.cost for limit in others)]))

    def cost_of(self, population: Population) -> np.ndarray:
        """The cost that is answered one by one, of each row: float64 (n,)."""
        return self.bounds.cost_of(self.cost, population)


class ManyLimitsSearch:
    """Asks a population for architectures that are new and within the limits."""

    def __init__(
        self,
        limits: SplitLimits,
        population: PopulationSearch,
        costs: tuple[str, ...],
        size: int,
        seed: int,
    ) -> None:
        self.limits, self.population, self.costs = limits, population, costs
        self.size = size
        self.rng = np.random.default_rng((seed, 1))  # the population has its own
        self.seen: set[Architecture] = set()

    def ask(self) -> list[Architecture]:
        found: list[Architecture] = []
        for _ in range(MAX_ROUNDS):
            for arch in as_architectures(self.limits.bounds.feasible(self.population.ask())):
                if arch not in self.seen:
                    self.seen.add(arch)
                    found.append(arch)
                if len(found) == self.size:
                    return found
        return found + self.limits.bounds.draw(self.size - len(found), self.rng, self.seen)

    def tell(self, candidates: list[Candidate]) -> None:
        if succeeded := [candidate for candidate in candidates if not candidate.failed]:
            self.population.tell(Evaluated.of(succeeded, *self.costs))


def annealing_search(
    space: Space, config: SearchConfig, limits: Limits, seed: int
) -> ManyLimitsSearch:
    """All limits at once, by one population (annealing.py)."""
    split = SplitLimits(limits)
    size, budget = config.population_size, config.population_size * config.num_generations
    annealing = Annealing(space, split.cost_of, split.maxima, seed, budget=budget, size=size)
    return ManyLimitsSearch(split, annealing, (split.cost,), size, seed)


def staged_search(
    space: Space, config: SearchConfig, limits: Limits, seed: int, *, strategy: str
) -> ManyLimitsSearch:
    """One limit after another, as published (staged.py)."""
    split = SplitLimits(limits)
    # The generations are divided among the limits as published: equally, or 5 to 1 to 1 ...
    ratio, num_limits = (1 if strategy == "vanilla" else FIRST // LATER), len(set(split.maxima))
    later = max(1, config.num_generations // (num_limits - 1 + ratio))
    staged = Staged(
        space,
        split.cost_of,
        split.maxima,
        strategy=strategy,
        seed=seed,
        size=config.population_size,
        generations=(config.num_generations - later * (num_limits - 1), later),
        mutation_prob=config.mutation_prob,
    )
    return ManyLimitsSearch(split, staged, (split.cost,), config.population_size, seed)


def nsga2_search(space: Space, config: SearchConfig, limits: Limits, seed: int) -> ManyLimitsSearch:
    """Accuracy against every cost that has a limit (nsga2.py)."""
    split = SplitLimits(limits)
    size = config.population_size
    nsga2 = Nsga2(space, seed=seed, size=size, mutation_prob=config.mutation_prob)
    return ManyLimitsSearch(split, nsga2, split.costs, size, seed)
