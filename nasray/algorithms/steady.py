"""Steady-state genetic search: every child is bred from the best known by then (schedules.py)."""

import numpy as np

from nasray.algorithms.offspring import LITTER, MAX_LITTERS, Offspring
from nasray.config import SearchConfig
from nasray.search.candidate import Candidate, best_first
from nasray.search.limits import Limits
from nasray.search.racing import Rivals, latest_known
from nasray.spaces.population import as_population, crossover, draw_pairs, mutate
from nasray.spaces.space import Architecture, Population, Space


class SteadyGenetic:
    """The published genetic search (genetic.py) without its generations.

    Begins with `population_size` random candidates. Parents are the `num_parents` best so
    far; a child mates two of them and mutates.
    """

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.space, self.config = space, config
        self.rng = np.random.default_rng(seed)
        self.offspring = Offspring(limits, self.rng)
        self.num_bred = 0
        self.parents: list[Candidate] = []
        self.known: tuple[Candidate, ...] = ()
        self.fresh: list[Candidate] = []  # as many as a generation, then they are among the known

    @property
    def rivals(self) -> Rivals | None:
        """The bar is the last of the parents."""
        bar = self.parents[-1] if len(self.parents) == self.config.num_parents else None
        return Rivals.of(bar, self.known)

    def breed(self) -> Architecture | None:
        self.num_bred += 1
        if self.num_bred > self.config.population_size and len(self.parents) >= 2:
            parents = as_population([parent.arch for parent in self.parents])
            for _ in range(MAX_LITTERS):
                if (child := self.offspring.first_new(self._litter(parents))) is not None:
                    return child
        return self.offspring.newcomer()

    def learn(self, candidate: Candidate) -> None:
        if candidate.failed:
            return
        self.parents = best_first([*self.parents, candidate])[: self.config.num_parents]
        self.fresh.append(candidate)
        if len(self.fresh) == self.config.population_size:
            self.known = latest_known([*self.known, *self.fresh])
            self.fresh = []

    def _litter(self, parents: Population) -> Population:
        mothers, fathers = draw_pairs(len(parents), LITTER, self.rng)
        children = crossover(parents[mothers], parents[fathers], self.rng)[0]
        mutants = mutate(children, self.space.genes, self.config.mutation_prob, self.rng)
        return self.space.canonical(mutants)
