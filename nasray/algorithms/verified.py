"""A search in two steps: a predictor proposes, evaluations verify, the predictor is refitted.

For each limit the predictor's best architectures are found by the search for all limits at
once, hundreds of thousands of candidates in a second or two; only those that this search
has not evaluated yet go to the evaluators. An ask/tell algorithm like any other.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Protocol

import numpy as np

from nasray.algorithms.annealing import Front
from nasray.algorithms.many_limits import Ladder
from nasray.config import SearchConfig
from nasray.search.candidate import Candidate
from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures, as_population
from nasray.spaces.space import Architecture, Population, Space

FEWEST = 20  # evaluations to fit to; fewer say nothing about those held out


class Predictor(Protocol):
    """What predicts top-1 of architectures."""

    def begin(self, population: Population) -> Callable[[], np.ndarray]:
        """Begin to predict; calling what is returned waits for top-1 (n,)."""


class Fit(Protocol):
    """What fits a predictor to architectures (n, genes) and their top-1."""

    def __call__(
        self, population: Population, top1: Sequence[float], *, seed: int
    ) -> Predictor: ...


class VerifiedSearch:
    """Ask for the predictor's best for every limit, evaluate them, tell; repeat.

    `fit` fits a predictor to evaluations; `known` are some of the same supernet from elsewhere.
    The first generation is random unless there are enough of them, or a `predictor` is given.
    """

    carries_state = False

    def __init__(
        self,
        space: Space,
        config: SearchConfig,
        limits: Limits,
        seed: int,
        *,
        fit: Fit,
        known: Sequence[Candidate] = (),
        predictor: Predictor | None = None,
    ) -> None:
        self.space, self.config, self.seed, self.fit = space, config, seed, fit
        self.ladder = Ladder(limits)
        self.known, self.given = list(known), predictor
        self.told: list[Candidate] = []
        self.generation = 0

    def ask(self) -> list[Architecture]:
        """The next generation, all new; empty once the space is exhausted."""
        number = self.config.population_size
        seen = {candidate.arch for candidate in self.told}
        predictor = self._predictor()
        found = self._proposed(predictor, number, seen) if predictor is not None else []
        rng = np.random.default_rng((self.seed, self.generation, 1))
        newcomers = self.ladder.bounds.draw(number - len(found), rng, seen | set(found))
        return found + newcomers

    def tell(self, generation: list[Candidate]) -> None:
        self.told += generation
        self.generation += 1

    def _predictor(self) -> Predictor | None:
        """Fitted to all that is known by now; the given one while that is too little."""
        candidates = unique(self.known + self.told)
        if len(candidates) < FEWEST or (self.given is not None and not self.told):
            return self.given
        population, top1 = as_data(candidates)
        return self.fit(population, top1, seed=self.seed + self.generation)

    def _proposed(
        self, predictor: Predictor, number: int, seen: set[Architecture]
    ) -> list[Architecture]:
        """The best unseen of each rung in turn: first the best of all rungs, then the next."""
        budget = self.config.proposals
        front = Front(
            self.space, self.ladder.price, self.ladder.rungs, self._draw_seed(), budget=budget
        )

        def begin(population: Population) -> Callable[[], np.ndarray]:
            top1 = predictor.begin(population)
            feasible = self.ladder.bounds.violation(population) == 0
            return lambda: np.where(feasible, top1(), -np.inf)

        while front.told < budget:
            front.advance(begin)
        best = {answer.limit: answer.arch for answer in front.answers()}
        rungs = [
            [*filter(None, [best.get(limit)]), *as_architectures(front.members(limit))]
            for limit in self.ladder.rungs
        ]
        in_turn = [arch for place in zip_longest(*rungs) for arch in place if arch is not None]
        return [arch for arch in dict.fromkeys(in_turn) if arch not in seen][:number]

    def _draw_seed(self) -> int:
        rng = np.random.default_rng((self.seed, self.generation, 0))
        return int(rng.integers(2**31))


def unique(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Each architecture that could be evaluated once, in the order in which they came."""
    return list({c.arch: c for c in candidates if not c.failed}.values())


def as_data(candidates: Sequence[Candidate]) -> tuple[Population, list[float]]:
    """What a predictor is fitted to."""
    population = as_population([candidate.arch for candidate in candidates])
    return population, [candidate.fitness for candidate in candidates]
