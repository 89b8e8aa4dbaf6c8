"""Steady-state genetic search: every child has the best parents known when it is made."""

import numpy as np

from nasray.algorithms.offspring import BATCH, Offspring
from nasray.config import SearchConfig
from nasray.search.candidate import Candidate, best_first
from nasray.search.limits import Limits
from nasray.spaces.population import as_population, crossover, draw_pairs, mutate
from nasray.spaces.space import Architecture, Population, Space


class SteadyGenetic:
    """The published genetic search (genetic.py) without its generations.

    Begins with `population_size` random candidates. Parents are the `num_parents` best so far; a
    child is the mutated crossover of two of them.
    """

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.space, self.config = space, config
        self.rng = np.random.default_rng(seed)
        self.offspring = Offspring(limits, self.rng)
        self.num_asked = 0
        self.parents: list[Candidate] = []

    def ask(self) -> list[Architecture]:
        self.num_asked += 1
        if self.num_asked > self.config.population_size and len(self.parents) >= 2:
            arch = self.offspring.child(self._children)
        else:
            arch = self.offspring.random()
        return [] if arch is None else [arch]

    def tell(self, candidates: list[Candidate]) -> None:
        succeeded = [candidate for candidate in candidates if not candidate.failed]
        self.parents = best_first(self.parents + succeeded)[: self.config.num_parents]

    def _children(self) -> Population:
        parents = as_population([parent.arch for parent in self.parents])
        mothers, fathers = draw_pairs(len(parents), BATCH, self.rng)
        children = crossover(parents[mothers], parents[fathers], self.rng)[0]
        mutants = mutate(children, self.space.genes, self.config.mutation_prob, self.rng)
        return self.space.canonical(mutants)
