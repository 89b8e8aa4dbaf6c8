"""Genetic search, generation by generation: the published one (Guo et al. 2019).

Unlike the original (docs/spec.md, OneShot 3.1) it evaluates no architecture twice, evaluates its
last offspring, and ends where no feasible architecture is left.
"""

import numpy as np

from nasray.config import SearchConfig
from nasray.search.candidate import Candidate, best_first
from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures, as_population, crossover, draw_pairs, mutate
from nasray.spaces.space import Architecture, Space

PAIRS = 512  # of parents in one round of crossover
MAX_ROUNDS = 50  # then random architectures fill the generation


class GeneticSearch:
    """Returns the new members of each generation.

    Parents are the best `num_parents` of the population, and each other member with a small
    probability.
    """

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.space, self.config, self.limits = space, config, limits
        self.rng = np.random.default_rng(seed)
        self.parents: list[Candidate] = []
        self.seen: set[Architecture] = set()

    def ask(self) -> list[Architecture]:
        number = self.config.population_size - len(self.parents)
        offspring = self._offspring(number) if len(self.parents) >= 2 else []
        return offspring + self.limits.draw(number - len(offspring), self.rng, self.seen)

    def tell(self, candidates: list[Candidate]) -> None:
        succeeded = [candidate for candidate in candidates if not candidate.failed]
        ranked = best_first(self.parents + succeeded)
        best, others = ranked[: self.config.num_parents], ranked[self.config.num_parents :]
        lucky = self.rng.random(len(others)) < self.config.random_parent_prob
        parents = best + [other for other, kept in zip(others, lucky, strict=True) if kept]
        self.parents = parents[: self.config.population_size - 1]  # room for one child at least

    def _offspring(self, number: int) -> list[Architecture]:
        """Up to `number` feasible children of the parents that were never returned before."""
        parents = as_population([parent.arch for parent in self.parents])
        found: list[Architecture] = []
        for _ in range(MAX_ROUNDS):
            mothers, fathers = draw_pairs(len(parents), PAIRS, self.rng)
            pair = crossover(parents[mothers], parents[fathers], self.rng)
            children = np.stack(pair, axis=1).reshape(2 * PAIRS, -1)
            children = mutate(children, self.space.genes, self.config.mutation_prob, self.rng)
            for arch in as_architectures(self.limits.feasible(self.space.canonical(children))):
                if len(found) == number:
                    return found
                if arch not in self.seen:
                    self.seen.add(arch)
                    found.append(arch)
        return found
