"""Genetic search, generation by generation: the published one (Guo et al. 2019, spec 3.1).

Unlike the original it evaluates no architecture twice, evaluates its last offspring, and
ends where no feasible architecture is left.
"""

import numpy as np

from nasray.config import SearchConfig
from nasray.search.candidate import Candidate, best_first
from nasray.search.limits import Limits
from nasray.search.racing import Rivals, latest_known
from nasray.spaces.population import as_architectures, as_population, crossover, draw_pairs, mutate
from nasray.spaces.space import Architecture, Space

PAIRS = 512  # mated at once
MAX_ROUNDS = 50  # of mating, before random newcomers fill what offspring could not


class GeneticSearch:
    """Ask for a generation's new architectures, evaluate them, tell the results; repeat.

    Telling a fresh instance the recorded generations resumes a search exactly. Parents are
    the best `num_parents` of the population, and each other member with a small probability.
    """

    carries_state = True

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.space, self.config, self.limits = space, config, limits
        self.rng = np.random.default_rng(seed)
        self.parents: list[Candidate] = []
        self.known: tuple[Candidate, ...] = ()
        self.seen: set[Architecture] = set()

    @property
    def rivals(self) -> Rivals | None:
        """The bar is the last of the best, who are parents whatever luck says."""
        number = self.config.num_parents
        bar = self.parents[number - 1] if len(self.parents) >= number else None
        return Rivals.of(bar, self.known)

    def ask(self) -> list[Architecture]:
        """The new members of the next generation; none once the space is exhausted."""
        number = self.config.population_size - len(self.parents)
        offspring = self._offspring(number) if len(self.parents) >= 2 else []
        newcomers = self.limits.draw(number - len(offspring), self.rng, self.seen)
        return offspring + newcomers

    def tell(self, generation: list[Candidate]) -> None:
        alive = [candidate for candidate in generation if not candidate.failed]
        self.known = latest_known([*self.known, *alive])
        ranked = best_first(self.parents + alive)
        best, others = ranked[: self.config.num_parents], ranked[self.config.num_parents :]
        lucky = self.rng.random(len(others)) < self.config.random_parent_prob
        parents = best + [other for other, kept in zip(others, lucky, strict=True) if kept]
        self.parents = parents[: self.config.population_size - 1]  # someone new every time

    def _offspring(self, number: int) -> list[Architecture]:
        """Mate parents until `number` feasible children that nobody has seen are born."""
        parents = as_population([parent.arch for parent in self.parents])
        children: list[Architecture] = []
        for _ in range(MAX_ROUNDS):
            mothers, fathers = draw_pairs(len(parents), PAIRS, self.rng)
            pair = crossover(parents[mothers], parents[fathers], self.rng)
            litter = np.stack(pair, axis=1).reshape(2 * PAIRS, -1)
            litter = mutate(litter, self.space.genes, self.config.mutation_prob, self.rng)
            for arch in as_architectures(self.limits.feasible(self.space.canonical(litter))):
                if len(children) == number:
                    return children
                if arch not in self.seen:
                    self.seen.add(arch)
                    children.append(arch)
        return children
