"""Searches over populations, as ask/tell algorithms of the driver.

The cost of the first entry of search.limits is the axis; each of its `max` is a rung, an
answer that is asked for. All other limits hold for every candidate. Without any limit the
whole space is one rung.
"""

import copy
from collections.abc import Callable

import numpy as np

from nasray.algorithms.annealing import Front
from nasray.algorithms.nsga2 import Nsga2
from nasray.algorithms.staged import FIRST, LATER, Staged
from nasray.config import Limit, SearchConfig, axis
from nasray.search.candidate import Candidate
from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures, as_population
from nasray.spaces.space import Architecture, Population, Space

MAX_ROUNDS = 30  # of breeding, before random newcomers fill what offspring could not


class Ladder:
    """search.limits, split into the rungs of the axis and what holds for every candidate."""

    def __init__(self, limits: Limits) -> None:
        given = limits.limits
        self.cost = axis(given)
        own = [limit for limit in given if limit.cost == self.cost]
        tops = [limit.max for limit in own if limit.max is not None]
        self.rungs = tops or [limits.bounds(self.cost)[1]]
        bottoms = [limit.min for limit in own if limit.min is not None]
        loosest = Limit(cost=self.cost, max=max(self.rungs), min=min(bottoms, default=None))
        others = [limit for limit in given if limit.cost != self.cost]
        self.bounds = copy.copy(limits)  # with the same cost table
        self.bounds.limits = (loosest, *others)
        self.costs = tuple(dict.fromkeys([self.cost, *(limit.cost for limit in others)]))

    def price(self, population: Population) -> np.ndarray:
        """The cost of each row on the axis."""
        return self.bounds.price_one(self.cost, population)


class LadderSearch:
    """Ask for a generation of a population's offspring, tell its results; repeat.

    Nothing is evaluated twice, and nothing that another limit excludes. Asking a fresh
    instance and telling it the recorded generations, in turn, resumes a search exactly.
    """

    carries_state = True

    def __init__(
        self,
        ladder: Ladder,
        breed: Callable[[], Population],
        learn: Callable[[list[Candidate]], None],
        size: int,
        seed: int,
    ) -> None:
        self.ladder, self.breed, self.learn, self.size = ladder, breed, learn, size
        self.rng = np.random.default_rng((seed, 1))  # of newcomers; breeding has its own
        self.seen: set[Architecture] = set()

    def ask(self) -> list[Architecture]:
        """The next generation, all new; empty once the space is exhausted."""
        found: list[Architecture] = []
        for _ in range(MAX_ROUNDS):
            for arch in as_architectures(self.ladder.bounds.feasible(self.breed())):
                if arch not in self.seen:
                    self.seen.add(arch)
                    found.append(arch)
                if len(found) == self.size:
                    return found
        newcomers = self.ladder.bounds.draw(self.size - len(found), self.rng, self.seen)
        return found + newcomers

    def tell(self, generation: list[Candidate]) -> None:
        if alive := [candidate for candidate in generation if not candidate.failed]:
            self.learn(alive)


def front_search(space: Space, config: SearchConfig, limits: Limits, seed: int) -> LadderSearch:
    """All limits at once, by one population (annealing.py)."""
    ladder = Ladder(limits)
    size, budget = config.population_size, config.population_size * config.num_generations
    core = Front(space, ladder.price, ladder.rungs, seed, budget=budget, size=size)
    return _on_the_axis(ladder, core, size, seed)


def staged_search(
    space: Space, config: SearchConfig, limits: Limits, seed: int, *, strategy: str
) -> LadderSearch:
    """One limit after another, as published (staged.py)."""
    ladder = Ladder(limits)
    core = Staged(
        space,
        ladder.price,
        ladder.rungs,
        strategy=strategy,
        seed=seed,
        size=config.population_size,
        generations=_shares(config.num_generations, len(set(ladder.rungs)), strategy),
        mutation_prob=config.mutation_prob,
    )
    return _on_the_axis(ladder, core, config.population_size, seed)


def vanilla_search(space: Space, config: SearchConfig, limits: Limits, seed: int) -> LadderSearch:
    return staged_search(space, config, limits, seed, strategy="vanilla")


def topdown_search(space: Space, config: SearchConfig, limits: Limits, seed: int) -> LadderSearch:
    return staged_search(space, config, limits, seed, strategy="top-down")


def bottomup_search(space: Space, config: SearchConfig, limits: Limits, seed: int) -> LadderSearch:
    return staged_search(space, config, limits, seed, strategy="bottom-up")


def nsga2_search(space: Space, config: SearchConfig, limits: Limits, seed: int) -> LadderSearch:
    """Accuracy against every cost that has a limit (nsga2.py)."""
    ladder = Ladder(limits)
    size = config.population_size
    core = Nsga2(space, seed=seed, size=size, mutation_prob=config.mutation_prob)

    def learn(generation: list[Candidate]) -> None:
        losses = [
            [-candidate.fitness, *(candidate.costs[cost] for cost in ladder.costs)]
            for candidate in generation
        ]
        core.absorb(as_population([candidate.arch for candidate in generation]), np.array(losses))

    return LadderSearch(ladder, core.breed, learn, size, seed)


def _on_the_axis(ladder: Ladder, core: Front | Staged, size: int, seed: int) -> LadderSearch:
    def learn(generation: list[Candidate]) -> None:
        core.absorb(
            as_population([candidate.arch for candidate in generation]),
            np.array([candidate.costs[ladder.cost] for candidate in generation]),
            np.array([candidate.fitness for candidate in generation]),
        )

    return LadderSearch(ladder, core.breed, learn, size, seed)


def _shares(generations: int, num_limits: int, strategy: str) -> tuple[int, int]:
    """Divide the generations among the limits as published: equally, or 5 to 1 to 1 ..."""
    ratio = 1 if strategy == "vanilla" else FIRST // LATER
    later = max(1, generations // (num_limits - 1 + ratio))
    return generations - later * (num_limits - 1), later
