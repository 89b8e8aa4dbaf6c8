"""Bayesian optimisation: a Gaussian process over the genes says what to evaluate next.

For few evaluations. The kernel is exponential in the distance of two architectures
(population.embedded). Fitness enters by rank, so that a few bad architectures do not hide the
differences between good ones. Pending candidates count as evaluated with the predicted fitness
(the kriging believer, Ginsbourger et al. 2010), so that those evaluated at once differ.
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
OPTIMISM = 0.5  # standard deviations added to the mean: the upper confidence bound
POOL = 1024  # candidates of which the one of the highest bound is taken
MAX_FITTED = 600  # evaluations that the process is fitted to: half the best, half the newest
LENGTHS = (0.25, 0.5, 1.0, 2.0)  # of the kernel, in numbers of genes
NOISES = (0.01, 0.1, 0.5)  # variance of an evaluation, in variances of fitness
REFIT_EVERY = 10  # evaluations, then length and noise are chosen again


class BayesianSearch:
    """Asks for one candidate at a time: the most promising of many mutants and random ones."""

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.space, self.config = space, config
        self.rng = np.random.default_rng(seed)
        self.offspring = Offspring(limits, self.rng)
        self.known: list[Candidate] = []
        self.pending: list[Architecture] = []
        self.length, self.noise = LENGTHS[1] * len(space.genes), NOISES[0]

    def ask(self) -> list[Architecture]:
        arch = None
        if len(self.known) + len(self.pending) >= NUM_RANDOM and len(self.known) >= 2:
            arch = self._most_promising()
        if arch is None:
            arch = self.offspring.random()
        if arch is None:
            return []
        self.pending.append(arch)
        return [arch]

    def tell(self, candidates: list[Candidate]) -> None:
        for candidate in candidates:
            self.pending.remove(candidate.arch)
            if candidate.failed:
                continue
            self.known.append(candidate)
            if len(self.known) % REFIT_EVERY == 0:
                self._choose_kernel()

    def _most_promising(self) -> Architecture | None:
        """The new one of the highest upper confidence bound in a pool of candidates."""
        fitted = self._fitted()
        archs = as_population([candidate.arch for candidate in fitted])
        process = _Process(self._distances(archs, archs), ranked(fitted), self.length, self.noise)
        pool = self._pool()
        distances = self._distances(pool, archs)
        if self.pending:
            pending = as_population(self.pending)
            process = process.believing(
                self._distances(pending, archs), self._distances(pending, pending)
            )
            distances = np.concatenate((distances, self._distances(pool, pending)), axis=1)
        mean, deviation = process.predict(distances)
        # Rounded: the last bits of sums differ between machines and must not matter.
        bound = np.round(mean + OPTIMISM * deviation, 6)
        return self.offspring.first_new(pool[np.argsort(-bound, kind="stable")])

    def _fitted(self) -> list[Candidate]:
        if len(self.known) <= MAX_FITTED:
            return self.known
        half = MAX_FITTED // 2
        return best_first(self.known[:-half])[:half] + self.known[-half:]

    def _pool(self) -> Population:
        """Mutated children, mutants and random architectures: half, a quarter and a quarter."""
        genes, rng = self.space.genes, self.rng
        best = best_first(self.known)[: self.config.num_parents]
        parents = as_population([candidate.arch for candidate in best])
        mothers = parents[rng.integers(len(parents), size=3 * POOL // 4)]
        fathers = parents[rng.integers(len(parents), size=POOL // 2)]
        mothers[: POOL // 2] = crossover(mothers[: POOL // 2], fathers, rng)[0]
        # Small steps and large ones: the process predicts which are worth taking.
        parts = zip(np.array_split(mothers, len(STEPS)), STEPS, strict=True)
        mutants = [mutate(part, genes, step / len(genes), rng) for part, step in parts]
        drawn = random_population(genes, POOL // 4, rng)
        return self.space.canonical(np.concatenate((*mutants, drawn)))

    def _distances(self, rows: Population, columns: Population) -> np.ndarray:
        """Distances of architectures, in genes: (rows, columns)."""
        return squared_distances(*(embedded(each, self.space.genes) for each in (rows, columns)))

    def _choose_kernel(self) -> None:
        """Set length and noise to those of the greatest marginal likelihood."""
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
        """The log marginal likelihood of the targets, without its constant."""
        return float(-0.5 * self.white @ self.white - np.log(np.diag(self.lower)).sum())

    def predict(self, distances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of points at these distances (points, targets)."""
        white = np.linalg.solve(self.lower, np.exp(-distances / self.length).T)
        variance = 1 - np.square(white).sum(axis=0)
        return self.white @ white, np.sqrt(variance.clip(1e-9))

    def believing(self, to_targets: np.ndarray, among: np.ndarray) -> "_Process":
        """Fitted to more points as well, taken to be exactly as predicted.

        `to_targets` (points, targets) and `among` (points, points) are their distances.
        """
        distances = np.block([[self.distances, to_targets.T], [to_targets, among]])
        targets = np.append(self.targets, self.predict(to_targets)[0])
        return _Process(distances, targets, self.length, self.noise)


def ranked(candidates: list[Candidate]) -> np.ndarray:
    """Fitness as the normal quantile of its rank; equal fitness, equal rank."""
    fitness = np.array([candidate.fitness for candidate in candidates])
    ordered = np.sort(fitness)
    below = np.searchsorted(ordered, fitness, side="left")
    ranks = (below + np.searchsorted(ordered, fitness, side="right")) / 2
    normal = NormalDist()
    return np.array([normal.inv_cdf(rank / len(fitness)) for rank in ranks])
