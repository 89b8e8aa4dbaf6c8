"""A search in two steps: a predictor proposes, evaluations verify, the predictor is refitted.

For each limit the predictor's best architectures are found by a search on predictions,
hundreds of thousands of candidates in a second or two; only those that were not evaluated yet
go to the evaluators.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np

from nasray.algorithms.many_limits import SplitLimits
from nasray.config import SearchConfig
from nasray.search.candidate import Candidate
from nasray.search.limits import Answer, CostOf, Limits
from nasray.search.predicted import PopulationSearch, search_predicted
from nasray.spaces.population import as_architectures, as_population
from nasray.spaces.space import Architecture, Population, Space

MIN_FITTED = 20  # evaluations that a predictor is fitted to


class Predictor(Protocol):
    """What predicts top-1 of architectures."""

    def begin(self, population: Population) -> Callable[[], np.ndarray]:
        """Begin to predict; calling what is returned waits for top-1 (n,)."""


class Fit(Protocol):
    """Fits a predictor to architectures (n, genes) and their top-1."""

    def __call__(
        self, population: Population, top1: Sequence[float], *, seed: int
    ) -> Predictor: ...


class InnerSearch(PopulationSearch, Protocol):
    """The search on predictions, such as annealing.Annealing."""

    told: int  # candidates

    def answers(self) -> list[Answer]:
        """The best for each limit, in the given order; those without any are left out."""

    def members(self, limit: float) -> Population:
        """The different architectures kept for `limit`, best first: int8 (n, genes)."""


class MakeInnerSearch(Protocol):
    """Begins a search of `budget` predictions under `limits`, in units of `cost_of`."""

    def __call__(
        self, space: Space, cost_of: CostOf, limits: Sequence[float], seed: int, *, budget: int
    ) -> InnerSearch: ...


class VerifiedSearch:
    """Asks for the predictor's best for every limit.

    `inner_search` makes the search on predictions; `fit` fits a predictor to evaluations;
    `known` are some of the same supernet from elsewhere. The first generation is random unless
    there are enough of them, or a `predictor` is given.

    ask() depends on nothing but the seed and what was told (Schedule.repeat_asks = False).
    """

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        limits: Limits,
        seed: int,
        *,
        inner_search: MakeInnerSearch,
        fit: Fit,
        known: Sequence[Candidate] = (),
        predictor: Predictor | None = None,
    ) -> None:
        self.space, self.config, self.seed = space, config, seed
        self.inner_search, self.fit = inner_search, fit
        self.limits = SplitLimits(limits)
        self.known, self.given = list(known), predictor
        self.told: list[Candidate] = []
        self.generation = 0

    def ask(self) -> list[Architecture]:
        number = self.config.population_size
        seen = {candidate.arch for candidate in self.told}
        predictor = self._predictor()
        found = self._proposed(predictor, number, seen) if predictor is not None else []
        rng = np.random.default_rng((self.seed, self.generation, 1))
        return found + self.limits.bounds.draw(number - len(found), rng, seen | set(found))

    def tell(self, candidates: list[Candidate]) -> None:
        self.told += candidates
        self.generation += 1

    def _predictor(self) -> Predictor | None:
        """Fitted to all that is known by now; the given one while that is too little."""
        candidates = unique(self.known + self.told)
        if len(candidates) < MIN_FITTED or (self.given is not None and not self.told):
            return self.given
        population, top1 = as_data(candidates)
        return self.fit(population, top1, seed=self.seed + self.generation)

    def _proposed(
        self, predictor: Predictor, number: int, seen: set[Architecture]
    ) -> list[Architecture]:
        """The best unseen of each limit in turn: first the best of all limits, then the next."""
        limits, budget = self.limits, self.config.proposals
        seed = int(np.random.default_rng((self.seed, self.generation, 0)).integers(2**31))
        search = self.inner_search(self.space, limits.cost_of, limits.maxima, seed, budget=budget)

        def begin(population: Population) -> Callable[[], np.ndarray]:
            top1 = predictor.begin(population)
            feasible = limits.bounds.violation(population) == 0
            return lambda: np.where(feasible, top1(), -np.inf)

        steps = search_predicted(search, limits.cost_of, begin, lag=2)
        while search.told < budget:
            next(steps)
        best = {answer.limit: answer.arch for answer in search.answers()}
        ranked = [
            [*filter(None, [best.get(limit)]), *as_architectures(search.members(limit))]
            for limit in limits.maxima
        ]
        in_turn = [arch for place in zip_longest(*ranked) for arch in place if arch is not None]
        return [arch for arch in dict.fromkeys(in_turn) if arch not in seen][:number]


def unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each architecture that could be evaluated, once, in order; of several the latest result."""
    return list({c.arch: c for c in candidates if not c.failed}.values())


def as_data(candidates: Sequence[Candidate]) -> tuple[Population, list[float]]:
    """What a predictor is fitted to: int8 (n, genes), and n top-1."""
    population = as_population([candidate.arch for candidate in candidates])
    return population, [candidate.fitness for candidate in candidates]
