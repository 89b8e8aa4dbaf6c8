"""Regularised evolution (Real et al. 2019, algorithm 1): the oldest member leaves, not the worst.

Kept because it is the usual reference for evolutionary search, and because a candidate with a
lucky evaluation does not stay a parent for ever, which helps where fitness is noisy.
"""

from collections import deque

import numpy as np

from nasray.algorithms.offspring import BATCH, Offspring
from nasray.config import SearchConfig
from nasray.search.candidate import Candidate, best_first
from nasray.search.limits import Limits
from nasray.spaces.population import as_population
from nasray.spaces.space import Architecture, Population, Space

SAMPLE = 0.25  # of the population competes to be the parent, as published: 25 of 100


class RegularizedEvolution:
    """A child is the best of a random sample of the population with one gene changed."""

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.space, self.size = space, config.population_size
        self.rng = np.random.default_rng(seed)
        self.offspring = Offspring(limits, self.rng)
        self.num_asked = 0
        self.population: deque[Candidate] = deque(maxlen=self.size)
        self.first = np.array([gene.first for gene in space.genes])
        self.counts = np.array([len(gene.choices) for gene in space.genes]) - self.first

    def ask(self) -> list[Architecture]:
        self.num_asked += 1
        if self.num_asked > self.size and self.population:
            arch = self.offspring.child(self._mutants)
        else:
            arch = self.offspring.random()
        return [] if arch is None else [arch]

    def tell(self, candidates: list[Candidate]) -> None:
        self.population.extend(each for each in candidates if not each.failed)

    def _mutants(self) -> Population:
        """Copies of a new parent, each with one random gene at another random choice."""
        size = max(1, round(SAMPLE * len(self.population)))
        sample = self.rng.choice(len(self.population), size=size, replace=False)
        parent = best_first([self.population[index] for index in sample])[0]
        mutants = np.repeat(as_population([parent.arch]), BATCH, axis=0)
        rows = np.arange(BATCH)
        columns = self.rng.choice(np.flatnonzero(self.counts > 1), size=BATCH)
        shift = self.rng.integers(1, self.counts[columns])
        old = mutants[rows, columns] - self.first[columns]
        mutants[rows, columns] = self.first[columns] + (old + shift) % self.counts[columns]
        return self.space.canonical(mutants)
