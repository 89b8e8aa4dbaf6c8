"""Racing: judge a candidate on the images in most doubt first, drop it once it cannot win.

After Maron and Moore (1994). The networks judged before foretell, image by image, what a
relative of theirs will have right: a Gaussian process over the genes, one for all images. The
chance p to have an image right follows from how many networks have it right and from that
forecast, by logistic regression. Images are judged in the order of their variance p (1 - p),
and the rest is predicted with Rasch's model (1960): logit(p) of an image, plus what the
network is better at than foretold, its ability. How far all this is off is measured on the
networks judged on all images, each foretold from the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from nasray.search.candidate import Candidate, judged_fully
from nasray.spaces.population import squared_distances

FEWEST = 32  # images of a slice
SLICES = 16  # at most; a race looks after each
LENGTHS = (0.1, 0.25, 0.5, 1.0)  # of the kernel, in numbers of genes
NOISES = (0.1, 0.3, 1.0)  # variance of what relatives do not share, over that of what they do
HALF = 0.5  # networks added that have an image right, and as many that have it wrong
MOST_SHIFT = 8.0  # of a logit by a forecast, before it is weighed
GUESS = np.array([1.0, 0.5])  # slopes of logits and shifts, where images say little
MOST_POINTS = 1_000_000  # that the regression is fitted to
NEWTON_STEPS, MOST_CHANGE, MOST_SLOPE = 20, 0.5, 10.0
LEAST_ABILITY = 0.002  # variance
DIGITS = 5  # of what is learned, so that the last bits of sums, which threads and machines
# change, decide nothing
FEWEST_JUDGED, MOST_JUDGED = 20, 200  # judged on all images, that races learn from
MOST_DROPPED = 200  # of those that races dropped, that they learn from, too


def slice_ends(number: int) -> tuple[int, ...]:
    """After how many of `number` images a race looks; the last is all of them."""
    slices = max(1, min(SLICES, number // FEWEST))
    return tuple(round(number * index / slices) for index in range(1, slices + 1))


def slice_top1(correct: np.ndarray, number: int) -> tuple[float, ...]:
    """The top-1 on each slice alone, of the first of `number` images judged: bool (m,)."""
    ends = [end for end in slice_ends(number) if end < len(correct)]
    return tuple(float(part.mean()) for part in np.split(correct, ends))


@dataclass(frozen=True)
class Form:
    """What networks judged before say of one that is to be judged on the same n images."""

    vectors: np.ndarray  # of the networks' genes (space.embedded): (networks, any)
    length: float  # of the kernel, as a squared distance of vectors
    mean: np.ndarray  # forecast for a network without relatives: float32 (n,)
    weights: np.ndarray  # of the kernel toward each network: float32 (networks, n)
    share: np.ndarray  # of the networks that have each image right: (n,)
    slopes: np.ndarray  # of logits and shifts: (2,)
    precision: float  # 1 / variance of a network's ability
    spread: np.ndarray  # after each slice but the last: squared errors of predictions / variance

    @classmethod
    def of(cls, vectors: np.ndarray, records: np.ndarray, num_genes: int) -> "Form":
        """`records`: which images each network has right, float32 (networks, n), NaN where it
        was not judged. Two networks or more were judged on all.
        """
        whole = ~np.isnan(records).any(axis=1)
        right, kin = records[whole], vectors[whole]
        length, noise = _best_kernel(kin, right, num_genes)
        form = cls._calibrated(kin, right, length, noise)
        if whole.all():
            return form
        # What the dropped ones are worth cannot be measured on the others, who had their part in
        # what is missing of the dropped ones' records.
        chances = np.array([form._chance(vector) for vector in vectors[~whole]], np.float32)
        completed = np.where(np.isnan(records[~whole]), chances, records[~whole])
        right = np.concatenate((right, completed))
        kin = np.concatenate((kin, vectors[~whole]))
        mean, weights, _ = _krige(_covariance(kin, length, noise), right)
        share = right.mean(axis=0, dtype=np.float64).round(DIGITS)
        return replace(form, vectors=kin, mean=mean, weights=weights, share=share)

    @classmethod
    def _calibrated(
        cls, vectors: np.ndarray, right: np.ndarray, length: float, noise: float
    ) -> "Form":
        """From networks judged on all images, each foretold from the others."""
        number = len(right)
        mean, weights, alone = _krige(_covariance(vectors, length, noise), right)
        others = (right.sum(axis=0) - right) / (number - 1)  # for each network: share of others
        logits, shifts = _features(others, number - 1, right - weights / alone[:, None])
        slopes = _regress(logits, shifts, right).round(DIGITS)
        chances = _logistic(logits, shifts, slopes)
        variance = (chances * (1 - chances)).sum(axis=1)
        surplus = ((right - chances).sum(axis=1) ** 2 - variance) / variance**2
        precision = round(1 / max(LEAST_ABILITY, float(surplus.mean())), DIGITS)
        errors = []
        for own, chance in zip(right, chances, strict=True):
            order = _most_doubtful(chance)
            predicted, doubt = _predict(chance[order], own[order], precision)
            errors.append((own.sum() - predicted[:-1]) ** 2 / doubt[:-1])
        # The model's own variance at least: a few networks may be alike by chance. And more
        # than was measured, the fewer they are (the variance of Student's t).
        spread = np.maximum(1.0, np.mean(errors, axis=0)) * (number / max(1, number - 3))
        share = right.mean(axis=0, dtype=np.float64).round(DIGITS)
        return cls(vectors, length, mean, weights, share, slopes, precision, spread.round(DIGITS))

    def race(self, vector: np.ndarray, target: int, confidence: float) -> "Race":
        """For a network of these genes to have `target` images right."""
        chance = self._chance(vector)
        order = _most_doubtful(chance)
        return Race(order, chance[order], self.precision, self.spread, target, confidence)

    def _chance(self, vector: np.ndarray) -> np.ndarray:
        """A network's to have each image right."""
        kernel = np.exp(-np.square(self.vectors - vector).sum(axis=1) / self.length)
        # Not `@`, whose sums differ in their last bits from machine to machine.
        foretold = self.mean + np.einsum("i,ij->j", kernel, self.weights, dtype=np.float64)
        features = _features(self.share, len(self.weights), foretold)
        chance = _logistic(*features, self.slopes).round(DIGITS)
        return chance.clip(10.0**-DIGITS, 1 - 10.0**-DIGITS)


@dataclass(frozen=True)
class Race:
    """One candidate's, for the place of a network that has `target` images right."""

    order: np.ndarray  # of the n images: intp (n,), those in most doubt first
    chance: np.ndarray  # to have each right, in that order: float64 (n,)
    precision: float  # of its ability
    spread: np.ndarray  # as the form's
    target: int
    confidence: float  # share of those dropped that would not have reached the target

    def is_lost(self, correct: np.ndarray) -> bool:
        """Whether the candidate is all but sure to lose, by its first images in the order.

        Looking after every slice needs no correction: if the chance to win is below one in a
        hundred whenever a candidate is dropped, one in a hundred is dropped wrongly.
        """
        if len(correct) == len(self.order):
            return False
        mean, variance = _predict(self.chance, correct, self.precision)
        deviation = (self.spread[len(mean) - 1] * variance[-1]) ** 0.5
        chance = NormalDist(mean[-1], deviation).cdf(self.target - 0.5)
        return chance > self.confidence

    def among_all(self, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of all images in their own order: which are known to be right, which were judged."""
        right, judged = np.zeros((2, len(self.order)), dtype=bool)
        right[self.order[: len(correct)]] = correct
        judged[self.order[: len(correct)]] = True
        return right, judged

    def fitness(self, correct: np.ndarray) -> float:
        """Top-1 on all images; of a dropped candidate, as predicted from those judged."""
        if len(correct) == len(self.order):
            return float(correct.mean())
        return float(_predict(self.chance, correct, self.precision)[0][-1] / len(self.order))


def _best_kernel(vectors: np.ndarray, right: np.ndarray, num_genes: int) -> tuple[float, float]:
    """Length and noise that foretell each network best from the others."""
    best, found = np.inf, (0.0, 0.0)
    for length in (share * num_genes for share in LENGTHS):
        for noise in NOISES:
            _, weights, alone = _krige(_covariance(vectors, length, noise), right)
            error = round(float(np.square(weights / alone[:, None]).mean()), 6)
            if error < best:
                best, found = error, (length, noise)
    return found


def _covariance(vectors: np.ndarray, length: float, noise: float) -> np.ndarray:
    distances = squared_distances(vectors, vectors)
    return np.exp(-distances / length) + noise * np.eye(len(vectors))


def _krige(covariance: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean and weights of a Gaussian process with an unknown mean, one for each image; and what
    a network's weights are to be divided by for its error, foretold from the others
    (Dubrule 1983).
    """
    inverse = np.linalg.inv(covariance)
    rows = inverse.sum(axis=1)
    mean = (rows @ right) / rows.sum()
    weights = inverse @ (right - mean)
    alone = np.diag(inverse) - rows**2 / rows.sum()
    return *(each.round(DIGITS).astype(np.float32) for each in (mean, weights)), alone


def _features(
    share: np.ndarray, number: int, foretold: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The logit of each image for `number` networks, and how far a forecast shifts it."""
    chance = (share * number + HALF) / (number + 2 * HALF)
    shift = (foretold - share) / (chance * (1 - chance))
    return np.log(chance / (1 - chance)), shift.clip(-MOST_SHIFT, MOST_SHIFT)


def _regress(logits: np.ndarray, shifts: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Slopes of logits and shifts, by logistic regression (Newton's method)."""
    step = -(-right.size // MOST_POINTS)
    points = np.stack([each[:, ::step].ravel() for each in (logits, shifts)], axis=1)
    points, true, slopes = points.astype(np.float64), right[:, ::step].ravel(), GUESS
    for _ in range(NEWTON_STEPS):
        chance = _logistic(points[:, 0], points[:, 1], slopes)
        gradient = points.T @ (true - chance) + GUESS - slopes
        curvature = points.T @ (points * (chance * (1 - chance))[:, None]) + np.eye(2)
        change = np.linalg.solve(curvature, gradient)
        slopes = (slopes + change.clip(-MOST_CHANGE, MOST_CHANGE)).clip(0, MOST_SLOPE)
    return slopes


def _logistic(logits: np.ndarray, shifts: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-(slopes[0] * logits + slopes[1] * shifts)))


def _most_doubtful(chance: np.ndarray) -> np.ndarray:
    """The order of images in which those of most variance come first."""
    return np.argsort(np.abs(2 * chance - 1), kind="stable")


def _predict(
    chance: np.ndarray, correct: np.ndarray, precision: float
) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the number of all right ones, as known after each slice judged.

    `correct`, bool, may end after any slice. The ability is one Newton step from what was
    foretold.
    """
    ends = np.array([end for end in slice_ends(len(chance)) if end <= len(correct)]) - 1
    variance, expected = np.cumsum(chance * (1 - chance)), np.cumsum(chance)
    right, left = np.cumsum(correct)[ends], variance[-1] - variance[ends]
    known = variance[ends] + precision
    ability = (right - expected[ends]) / known
    mean = right + expected[-1] - expected[ends] + ability * left
    return mean.clip(right, right + len(chance) - 1 - ends), left + left**2 / known


def pack(correct: np.ndarray) -> bytes:
    """`correct`, bool (images,), in one bit each."""
    return np.packbits(correct).tobytes()


def as_record(correct: bytes, judged: bytes, number: int) -> np.ndarray:
    """For each of `number` images 1 or 0, NaN where `judged`, if anything, says it was not."""
    record = unpack(correct, number).astype(np.float32)
    if judged:
        record[~unpack(judged, number)] = np.nan
    return record


def unpack(packed: bytes, number: int) -> np.ndarray:
    """The `number` bools that pack() was given."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=number).astype(bool)


@dataclass(frozen=True)
class Rivals:
    """What newcomers race against."""

    bar: Candidate  # whose place they must take to be of use
    known: tuple[Candidate, ...]  # the latest that it was told of, those dropped among them

    @classmethod
    def of(cls, bar: Candidate | None, known: tuple[Candidate, ...]) -> "Rivals | None":
        """None, so no race, before there is a bar and enough to learn from."""
        if bar is None or len(judged_fully(known)) < FEWEST_JUDGED:
            return None
        return cls(bar, known)


def latest_known(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Those of `candidates` that races learn from."""
    full = judged_fully(candidates)
    dropped = [each for each in candidates if each.judged]
    return (*full[-MOST_JUDGED:], *dropped[-MOST_DROPPED:])
