"""Racing: evaluate a candidate on the most uncertain images first, stop once it cannot win.

After Maron and Moore (1994). Evaluated architectures predict, per image, whether a similar one
classifies it correctly: a Gaussian process over the genes, one for all images. The probability
p of a correct answer follows from the share of architectures that are correct and from that
prediction, by logistic regression. Images come in the order of their variance p (1 - p), and
the result on the rest is predicted by Rasch's model (1960): logit(p) of an image plus what the
architecture is better at than predicted, its ability. How far predictions are off is measured
on the architectures evaluated on all images, by leave-one-out.

Only the driver holds an EarlyStopping, and only evaluators apply its rules.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any

import numpy as np

from nasray.config import SearchConfig
from nasray.search.candidate import Candidate, as_record, best_first, fully_evaluated, pack
from nasray.search.schedules import Schedule
from nasray.spaces.population import as_population, embedded, squared_distances
from nasray.spaces.space import Architecture, Gene, Space

MIN_SLICE = 32  # images
MAX_SLICES = 16  # an evaluation may stop after each
LENGTHS = (0.1, 0.25, 0.5, 1.0)  # of the kernel, in numbers of genes
NOISES = (0.1, 0.3, 1.0)  # variance that similar architectures do not share / that they share
SMOOTHING = 0.5  # architectures added that are correct on an image, and as many that are not
MAX_SHIFT = 8.0  # of a logit by a prediction, before it is weighted
PRIOR_SLOPES = np.array([1.0, 0.5])  # of logits and shifts, where images say little
MAX_POINTS = 1_000_000  # that the regression is fitted to
NEWTON_STEPS, MAX_CHANGE, MAX_SLOPE = 20, 0.5, 10.0
MIN_ABILITY_VARIANCE = 0.002
DIGITS = 5  # of fitted values: the last bits of sums differ between machines and must not matter
MIN_FULL, MAX_FULL = 20, 200  # fully evaluated candidates that the model is fitted to
MAX_STOPPED = 200  # candidates stopped early that it is fitted to as well


def slice_ends(number: int) -> tuple[int, ...]:
    """After how many of `number` images an evaluation may stop; the last is all of them."""
    slices = max(1, min(MAX_SLICES, number // MIN_SLICE))
    return tuple(round(number * index / slices) for index in range(1, slices + 1))


class EarlyStopping:
    """When evaluations of one search stop: what it was told, and the rule for each candidate.

    A candidate must beat the incumbent, the last of the `num_incumbents` best so far.
    """

    def __init__(
        self, space: Space, *, num_incumbents: int, refit_after: int, confidence: float
    ) -> None:
        self.genes, self.num_incumbents = space.genes, num_incumbents
        self.refit_after = refit_after  # new evaluations before the model is fitted again
        self.confidence = confidence
        self.incumbents: list[Candidate] = []  # best first
        self.fitted_to: tuple[Candidate, ...] = ()
        self.unused: list[Candidate] = []  # not yet in `fitted_to`
        self.fitted: CorrectnessModel | None = None  # to `fitted_to`, once it is needed

    @classmethod
    def of(cls, space: Space, config: SearchConfig, schedule: Schedule) -> "EarlyStopping | None":
        """The early stopping of a search by `schedule`, if its job asks for it."""
        if not config.racing:
            return None
        return cls(
            space,
            num_incumbents=config.num_parents,
            refit_after=schedule.asks_per_generation,
            confidence=config.racing_confidence,
        )

    def tell(self, candidates: Sequence[Candidate]) -> None:
        """Learn of evaluated candidates."""
        succeeded = [candidate for candidate in candidates if not candidate.failed]
        self.incumbents = best_first([*self.incumbents, *succeeded])[: self.num_incumbents]
        self.unused += succeeded
        if len(self.unused) >= self.refit_after:
            known = [*self.fitted_to, *self.unused]
            stopped = [candidate for candidate in known if candidate.judged]
            self.fitted_to = (*fully_evaluated(known)[-MAX_FULL:], *stopped[-MAX_STOPPED:])
            self.unused, self.fitted = [], None

    def rule(self, arch: Architecture) -> "StoppingRule | None":
        """For a new candidate; none before there is an incumbent and enough to learn from."""
        if len(self.incumbents) < self.num_incumbents:
            return None
        if len(fully_evaluated(self.fitted_to)) < MIN_FULL:
            return None
        incumbent = self.incumbents[-1]
        if self.fitted is None:
            self.fitted = CorrectnessModel.of(self.fitted_to, self.genes, incumbent.images)
        [vector] = embedded(as_population([arch]), self.genes)
        target = round(incumbent.fitness * incumbent.images)
        return StoppingRule(self.fitted, vector, target, self.confidence)


@dataclass(frozen=True)
class CorrectnessModel:
    """Predicts from evaluated architectures on which of n images another one is correct."""

    vectors: np.ndarray  # of the architectures (population.embedded): (architectures, any)
    length: float  # of the kernel, as a squared distance of vectors
    mean: np.ndarray  # prediction for an architecture unlike all others: float32 (n,)
    weights: np.ndarray  # of the kernel toward each architecture: float32 (architectures, n)
    share: np.ndarray  # of the architectures that are correct on each image: (n,)
    slopes: np.ndarray  # of logits and shifts: (2,)
    precision: float  # 1 / variance of an architecture's ability
    # After each slice but the last: squared errors of predictions / variance by the model.
    dispersion: np.ndarray

    @classmethod
    def of(
        cls, candidates: Sequence[Candidate], genes: Sequence[Gene], number: int
    ) -> "CorrectnessModel":
        """Fit to `candidates`, evaluated on up to `number` images."""
        records = [as_record(each.correct, each.judged, number) for each in candidates]
        vectors = embedded(as_population([each.arch for each in candidates]), genes)
        return cls.fit(vectors, np.array(records), len(genes))

    @classmethod
    def fit(cls, vectors: np.ndarray, records: np.ndarray, num_genes: int) -> "CorrectnessModel":
        """`records`: on which images each architecture is correct, float32 (architectures, n),
        NaN where it was not evaluated. Two architectures or more were evaluated on all.
        """
        full = ~np.isnan(records).any(axis=1)
        known, correct = vectors[full], records[full]
        length, noise = _best_kernel(known, correct, num_genes)
        model = cls._calibrated(known, correct, length, noise)
        if full.all():
            return model
        # The missing results are filled in by the model itself, so calibration cannot use them.
        chances = np.array([model.chance(vector) for vector in vectors[~full]], np.float32)
        completed = np.where(np.isnan(records[~full]), chances, records[~full])
        correct = np.concatenate((correct, completed))
        known = np.concatenate((known, vectors[~full]))
        mean, weights, _ = _krige(_covariance(known, length, noise), correct)
        share = correct.mean(axis=0, dtype=np.float64).round(DIGITS)
        return replace(model, vectors=known, mean=mean, weights=weights, share=share)

    @classmethod
    def _calibrated(
        cls, vectors: np.ndarray, correct: np.ndarray, length: float, noise: float
    ) -> "CorrectnessModel":
        """Fit to architectures evaluated on all images; measure errors by leave-one-out."""
        number = len(correct)
        mean, weights, precisions = _krige(_covariance(vectors, length, noise), correct)
        others = (correct.sum(axis=0) - correct) / (number - 1)  # share of the others
        logits, shifts = _features(others, number - 1, correct - weights / precisions[:, None])
        slopes = _regress(logits, shifts, correct).round(DIGITS)
        chances = _logistic(logits, shifts, slopes)
        variance = (chances * (1 - chances)).sum(axis=1)
        surplus = ((correct - chances).sum(axis=1) ** 2 - variance) / variance**2
        precision = round(1 / max(MIN_ABILITY_VARIANCE, float(surplus.mean())), DIGITS)
        errors = []
        for own, chance in zip(correct, chances, strict=True):
            order = _most_uncertain(chance)
            predicted, doubt = _predict(chance[order], own[order], precision)
            errors.append((own.sum() - predicted[:-1]) ** 2 / doubt[:-1])
        # At least 1: a few architectures may agree by chance. Small samples are widened by the
        # variance of Student's t.
        dispersion = np.maximum(1.0, np.mean(errors, axis=0)) * (number / max(1, number - 3))
        share = correct.mean(axis=0, dtype=np.float64).round(DIGITS)
        return cls(
            vectors, length, mean, weights, share, slopes, precision, dispersion.round(DIGITS)
        )

    def chance(self, vector: np.ndarray) -> np.ndarray:
        """The probability that an architecture is correct on each image: float64 (n,)."""
        kernel = np.exp(-np.square(self.vectors - vector).sum(axis=1) / self.length)
        # Not `@`, whose sums differ in their last bits from machine to machine.
        predicted = self.mean + np.einsum("i,ij->j", kernel, self.weights, dtype=np.float64)
        features = _features(self.share, len(self.weights), predicted)
        chance = _logistic(*features, self.slopes).round(DIGITS)
        return chance.clip(10.0**-DIGITS, 1 - 10.0**-DIGITS)


@dataclass(frozen=True)
class StoppingRule:
    """When to stop evaluating one candidate, which must be correct on `target` of n images."""

    model: CorrectnessModel
    vector: np.ndarray  # of the candidate (population.embedded)
    target: int
    confidence: float  # the share of stopped candidates that would have missed the target

    @cached_property
    def order(self) -> np.ndarray:
        """The images, the most uncertain first: intp (n,)."""
        return _most_uncertain(self._chances)

    @cached_property
    def chance(self) -> np.ndarray:
        """The probability to be correct on each image, in that order: float64 (n,)."""
        return self._chances[self.order]

    @cached_property
    def _chances(self) -> np.ndarray:
        return self.model.chance(self.vector)

    def apply(self, classify: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Evaluate slice by slice; `classify` says which of some images (rows) are correct.

        Returns bool (n,) in the order of the images; if stopped, (m,) in the order of the rule.
        """
        correct = np.empty(0, dtype=bool)
        for end in slice_ends(len(self.order)):
            correct = np.append(correct, classify(self.order[len(correct) : end]))
            if self.is_hopeless(correct):
                return correct
        return correct[np.argsort(self.order)]

    def is_hopeless(self, correct: np.ndarray) -> bool:
        """Whether the candidate will miss the target, by its first images in the order.

        Repeated looks need no correction: if the chance to win is below one in a hundred
        whenever a candidate is stopped, one in a hundred is stopped wrongly.
        """
        if len(correct) == len(self.order):
            return False
        mean, variance = _predict(self.chance, correct, self.model.precision)
        deviation = (self.model.dispersion[len(mean) - 1] * variance[-1]) ** 0.5
        chance = NormalDist(mean[-1], deviation).cdf(self.target - 0.5)
        return chance > self.confidence

    def among_all(self, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """In the order of the images, bool (n,): which are correct, which were evaluated."""
        known, evaluated = np.zeros((2, len(self.order)), dtype=bool)
        known[self.order[: len(correct)]] = correct
        evaluated[self.order[: len(correct)]] = True
        return known, evaluated

    def fitness(self, correct: np.ndarray) -> float:
        """Top-1 on all images; of a stopped candidate, as predicted from those evaluated."""
        if len(correct) == len(self.order):
            return float(correct.mean())
        mean, _ = _predict(self.chance, correct, self.model.precision)
        return float(mean[-1] / len(self.order))


def measured(correct: np.ndarray, number: int, rule: StoppingRule | None) -> dict[str, Any]:
    """The fields of an Evaluation by what apply() returned, or bool (n,) without a rule."""
    ends = [end for end in slice_ends(number) if end < len(correct)]
    found = {
        "fitness": rule.fitness(correct) if rule else float(correct.mean()),
        "images": len(correct),
        "slices": tuple(float(part.mean()) for part in np.split(correct, ends)),
    }
    if rule and len(correct) < number:
        known, evaluated = rule.among_all(correct)
        return found | {"correct": pack(known), "judged": pack(evaluated)}
    return found | {"correct": pack(correct)}


def _best_kernel(vectors: np.ndarray, correct: np.ndarray, num_genes: int) -> tuple[float, float]:
    """The kernel length and noise of the least leave-one-out error."""
    best, found = np.inf, (0.0, 0.0)
    for length in (share * num_genes for share in LENGTHS):
        for noise in NOISES:
            _, weights, precisions = _krige(_covariance(vectors, length, noise), correct)
            error = round(float(np.square(weights / precisions[:, None]).mean()), 6)
            if error < best:
                best, found = error, (length, noise)
    return found


def _covariance(vectors: np.ndarray, length: float, noise: float) -> np.ndarray:
    distances = squared_distances(vectors, vectors)
    return np.exp(-distances / length) + noise * np.eye(len(vectors))


def _krige(
    covariance: np.ndarray, correct: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and weights of a Gaussian process with an unknown mean, one for each image; and what
    an architecture's weights are divided by for its leave-one-out error (Dubrule 1983).
    """
    inverse = np.linalg.inv(covariance)
    rows = inverse.sum(axis=1)
    mean = (rows @ correct) / rows.sum()
    weights = inverse @ (correct - mean)
    precisions = np.diag(inverse) - rows**2 / rows.sum()
    return *(each.round(DIGITS).astype(np.float32) for each in (mean, weights)), precisions


def _features(
    share: np.ndarray, number: int, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The logit of each image for `number` architectures, and its shift by a prediction."""
    chance = (share * number + SMOOTHING) / (number + 2 * SMOOTHING)
    shift = (predicted - share) / (chance * (1 - chance))
    return np.log(chance / (1 - chance)), shift.clip(-MAX_SHIFT, MAX_SHIFT)


def _regress(logits: np.ndarray, shifts: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Slopes of logits and shifts, by logistic regression (Newton's method)."""
    step = -(-correct.size // MAX_POINTS)
    points = np.stack([each[:, ::step].ravel() for each in (logits, shifts)], axis=1)
    points, true, slopes = points.astype(np.float64), correct[:, ::step].ravel(), PRIOR_SLOPES
    for _ in range(NEWTON_STEPS):
        chance = _logistic(points[:, 0], points[:, 1], slopes)
        gradient = points.T @ (true - chance) + PRIOR_SLOPES - slopes
        curvature = points.T @ (points * (chance * (1 - chance))[:, None]) + np.eye(2)
        change = np.linalg.solve(curvature, gradient)
        slopes = (slopes + change.clip(-MAX_CHANGE, MAX_CHANGE)).clip(0, MAX_SLOPE)
    return slopes


def _logistic(logits: np.ndarray, shifts: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(slopes[0] * logits + slopes[1] * shifts)))


def _most_uncertain(chance: np.ndarray) -> np.ndarray:
    """The order of images by falling variance."""
    return np.argsort(np.abs(2 * chance - 1), kind="stable")


def _predict(
    chance: np.ndarray, correct: np.ndarray, precision: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the number of correct images among all, after each slice evaluated.

    `correct`, bool, may end after any slice. The ability is one Newton step from the prediction.
    """
    ends = np.array([end for end in slice_ends(len(chance)) if end <= len(correct)]) - 1
    variance, expected = np.cumsum(chance * (1 - chance)), np.cumsum(chance)
    found, left = np.cumsum(correct)[ends], variance[-1] - variance[ends]
    known = variance[ends] + precision
    ability = (found - expected[ends]) / known
    mean = found + expected[-1] - expected[ends] + ability * left
    return mean.clip(found, found + len(chance) - 1 - ends), left + left**2 / known
