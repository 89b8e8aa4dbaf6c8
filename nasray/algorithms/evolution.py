"""Regularised evolution (Real et al. 2019, algorithm 1): the oldest dies, not the worst.

Here with a fixed lag (search/schedules.py), so that it runs on any number of evaluators.
"""

from collections import deque

import numpy as np

from nasray.algorithms.offspring import LITTER, MAX_LITTERS, Offspring
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
        self.num_bred = 0
        self.population: deque[Candidate] = deque(maxlen=self.size)
        self.first = np.array([gene.first for gene in space.genes])
        self.counts = np.array([len(gene.choices) for gene in space.genes]) - self.first

    @property
    def rivals(self) -> None:
        """None: everything newborn is a member, good or bad."""

    def breed(self) -> Architecture | None:
        self.num_bred += 1
        if self.num_bred > self.size and self.population:
            number = max(1, round(SAMPLE * len(self.population)))
            for _ in range(MAX_LITTERS):
                drawn = self.rng.choice(len(self.population), size=number, replace=False)
                parent = best_first([self.population[index] for index in drawn])[0]
                if (child := self.offspring.first_new(self._mutants(parent.arch))) is not None:
                    return child
        return self.offspring.newcomer()

    def learn(self, candidate: Candidate) -> None:
        if not candidate.failed:
            self.population.append(candidate)

    def _mutants(self, parent: Architecture) -> Population:
        """Copies of `parent`, each with one random gene at another random choice."""
        mutants = np.repeat(as_population([parent]), LITTER, axis=0)
        rows = np.arange(LITTER)
        columns = self.rng.choice(np.flatnonzero(self.counts > 1), size=LITTER)
        shift = self.rng.integers(1, self.counts[columns])
        old = mutants[rows, columns] - self.first[columns]
        mutants[rows, columns] = self.first[columns] + (old + shift) % self.counts[columns]
        return self.space.canonical(mutants)
