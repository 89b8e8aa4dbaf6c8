"""Bayesian optimisation: a Gaussian process over the genes says what to evaluate next.

For few evaluations. The kernel is exponential in the distance of two architectures
(space.embedded). Fitness enters by rank, so that a few bad architectures do not hide how the
good ones differ. Candidates that are still being evaluated count as if they were as good as
predicted (Ginsbourger et al. 2010, the kriging believer), so that those under way at once
differ. Runs with a fixed lag (search/schedules.py).
"""

from statistics import NormalDist

import numpy as np

from nasray.algorithms.offspring import Offspring
from nasray.config import SearchConfig
from nasray.search.candidate import Candidate, best_first
from nasray.search.limits import Limits
from nasray.spaces.population import (
    as_population,
    crossover,
    embedded,
    mutate,
    random_population,
    squared_distances,
)
from nasray.spaces.space import Architecture, Population, Space

STEPS = (1, 4, 12)  # genes that mutate, on average
NUM_RANDOM = 10  # first candidates
OPTIMISM = 0.5  # standard deviations above the mean that a candidate is ranked by
POOL = 1024  # candidates of which the best is taken
MOST = 600  # evaluations that the process is fitted to: the best half and the newest
LENGTHS = (0.25, 0.5, 1.0, 2.0)  # of the kernel, in numbers of genes
NOISES = (0.01, 0.1, 0.5)  # variance of an evaluation, in variances of fitness
REFIT = 10  # evaluations between two choices of length and noise


class BayesianSearch:
    """Breeds one candidate at a time: the most promising of many mutants and newcomers."""

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.space, self.config = space, config
        self.rng = np.random.default_rng(seed)
        self.offspring = Offspring(limits, self.rng)
        self.known: list[Candidate] = []
        self.under_way: list[Architecture] = []
        self.length, self.noise = LENGTHS[1] * len(space.genes), NOISES[0]
        self.rivals = None  # every evaluation counts, a bad one, too

    def breed(self) -> Architecture | None:
        arch = None
        if len(self.known) + len(self.under_way) >= NUM_RANDOM and len(self.known) >= 2:
            arch = self._most_promising()
        if arch is None:
            arch = self.offspring.newcomer()
        if arch is not None:
            self.under_way.append(arch)
        return arch

    def learn(self, candidate: Candidate) -> None:
        self.under_way.remove(candidate.arch)
        if candidate.failed:
            return
        self.known.append(candidate)
        if len(self.known) % REFIT == 0:
            self._choose_kernel()

    def _most_promising(self) -> Architecture | None:
        fitted = self._fitted()
        archs = as_population([candidate.arch for candidate in fitted])
        process = _Process(self._distances(archs, archs), ranked(fitted), self.length, self.noise)
        pool = self._pool()
        toward = self._distances(pool, archs)
        if self.under_way:
            pending = as_population(self.under_way)
            process = process.believing(
                self._distances(pending, archs), self._distances(pending, pending)
            )
            toward = np.concatenate((toward, self._distances(pool, pending)), axis=1)
        mean, deviation = process.predict(toward)
        # Rounded, so that the last bits of sums, which differ between machines, decide nothing.
        promise = np.round(mean + OPTIMISM * deviation, 6)
        return self.offspring.first_new(pool[np.argsort(-promise, kind="stable")])

    def _fitted(self) -> list[Candidate]:
        if len(self.known) <= MOST:
            return self.known
        newest = self.known[-MOST // 2 :]
        return best_first(self.known[: -MOST // 2])[: MOST // 2] + newest

    def _pool(self) -> Population:
        """Children and mutants of the best, and newcomers: half, a quarter and a quarter."""
        genes, rng = self.space.genes, self.rng
        best = best_first(self.known)[: self.config.num_parents]
        parents = as_population([candidate.arch for candidate in best])
        mothers = parents[rng.integers(len(parents), size=3 * POOL // 4)]
        fathers = parents[rng.integers(len(parents), size=POOL // 2)]
        mothers[: POOL // 2] = crossover(mothers[: POOL // 2], fathers, rng)[0]
        # Near and far: the process knows best which steps are worth taking.
        litters = zip(np.array_split(mothers, len(STEPS)), STEPS, strict=True)
        mutants = np.concatenate([mutate(part, genes, s / len(genes), rng) for part, s in litters])
        newcomers = random_population(genes, POOL // 4, rng)
        return self.space.canonical(np.concatenate((mutants, newcomers)))

    def _distances(self, rows: Population, columns: Population) -> np.ndarray:
        """How far two architectures are apart, in genes: (rows, columns)."""
        return squared_distances(*(embedded(each, self.space.genes) for each in (rows, columns)))

    def _choose_kernel(self) -> None:
        """Take the length and noise of the greatest marginal likelihood."""
        fitted = self._fitted()
        archs = as_population([candidate.arch for candidate in fitted])
        distances, targets = self._distances(archs, archs), ranked(fitted)
        best = -np.inf
        for length in (share * len(self.space.genes) for share in LENGTHS):
            for noise in NOISES:
                found = round(_Process(distances, targets, length, noise).log_likelihood, 6)
                if found > best:
                    best, self.length, self.noise = found, length, noise


class _Process:
    """A Gaussian process with mean 0 and variance 1, fitted to targets at known distances."""

    def __init__(
        self, distances: np.ndarray, targets: np.ndarray, length: float, noise: float
    ) -> None:
        self.distances, self.targets, self.length, self.noise = distances, targets, length, noise
        covariance = np.exp(-distances / length) + noise * np.eye(len(targets))
        self.lower = np.linalg.cholesky(covariance)
        self.white = np.linalg.solve(self.lower, targets)

    @property
    def log_likelihood(self) -> float:
        """Of the targets, less a constant."""
        return float(-0.5 * self.white @ self.white - np.log(np.diag(self.lower)).sum())

    def predict(self, toward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of points at these distances (points, targets)."""
        white = np.linalg.solve(self.lower, np.exp(-toward / self.length).T)
        variance = 1 - np.square(white).sum(axis=0)
        return self.white @ white, np.sqrt(variance.clip(1e-9))

    def believing(self, toward: np.ndarray, between: np.ndarray) -> "_Process":
        """With more points, `toward` the targets and `between` them, as good as predicted."""
        distances = np.block([[self.distances, toward.T], [toward, between]])
        targets = np.append(self.targets, self.predict(toward)[0])
        return _Process(distances, targets, self.length, self.noise)


def ranked(candidates: list[Candidate]) -> np.ndarray:
    """Fitness as the normal quantile of its rank; equal fitness, equal rank."""
    fitness = np.array([candidate.fitness for candidate in candidates])
    ordered = np.sort(fitness)
    below = np.searchsorted(ordered, fitness, side="left")
    ranks = (below + np.searchsorted(ordered, fitness, side="right")) / 2
    normal = NormalDist()
    return np.array([normal.inv_cdf(rank / len(fitness)) for rank in ranks])
