"""Racing: judge a candidate on the most telling images first, drop it once it cannot win.

After Maron and Moore (1994). All networks of one supernet have most images right, or most of
them wrong; the others decide who is better. So images are judged in the order of their
variance p (1 - p) over the networks judged in full before, and the rest is predicted with
Rasch's model (1960): logit(p) of an image, plus the network's ability. How far such
predictions are off is measured on those same networks, each predicted from the others.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FEWEST = 32  # images of a slice
SLICES = 16  # at most; a race looks after each
PRIOR = 20.0  # 1 / variance of a network's ability around that of those before it
HALF = 0.5  # networks added that have an image right, and as many that have it wrong


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
    """What networks judged in full say of the images before another one is judged."""

    order: np.ndarray  # of the n images: intp (n,), the most telling first
    chance: np.ndarray  # of a network to have each right, in that order: float64 (n,)
    spread: np.ndarray  # after each slice but the last: squared errors of predictions / variance

    @classmethod
    def of(cls, records: np.ndarray) -> "Form":
        """`records`: which images each of two networks or more has right, bool (networks, n)."""
        number, right = len(records), records.sum(axis=0)
        errors = []
        for own in records:  # as if the others had been judged before it, and no other
            order, chance = _most_telling(right - own, number - 1)
            mean, variance = _predict(chance, own[order])
            errors.append((own.sum() - mean[:-1]) ** 2 / variance[:-1])
        # The model's own variance at least: a few networks may be alike by chance. And more
        # than was measured, the fewer they are (the variance of Student's t).
        spread = np.maximum(1.0, np.mean(errors, axis=0)) * (number / max(1, number - 3))
        return cls(*_most_telling(right, number), spread)


@dataclass(frozen=True)
class Race:
    """For the place of one that has `target` images right."""

    form: Form
    target: int
    confidence: float  # share of those dropped that would not have reached the target

    def is_lost(self, correct: np.ndarray) -> bool:
        """Whether a candidate is all but sure to lose, by its first images in the form's order.

        Looking after every slice needs no correction: if the chance to win is below one in a
        hundred whenever a candidate is dropped, one in a hundred is dropped wrongly.
        """
        if len(correct) == len(self.form.order):
            return False
        mean, variance = _predict(self.form.chance, correct)
        deviation = (self.form.spread[len(mean) - 1] * variance[-1]) ** 0.5
        chance = NormalDist(mean[-1], deviation).cdf(self.target - 0.5)
        return chance > self.confidence

    def fitness(self, correct: np.ndarray) -> float:
        """Top-1 on all images; of a dropped candidate, as predicted from those judged."""
        if len(correct) == len(self.form.order):
            return float(correct.mean())
        return float(_predict(self.form.chance, correct)[0][-1] / len(self.form.order))


def _most_telling(right: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The order of images that `right` of `number` networks have, and the chances in it."""
    order = np.argsort(np.abs(2 * right - number), kind="stable")
    return order, (right[order] + HALF) / (number + 2 * HALF)


def _predict(chance: np.ndarray, correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of the number of all right ones, as known after each slice judged.

    `correct`, bool, may end after any slice. The ability is one Newton step from that of the
    networks before.
    """
    ends = np.array([end for end in slice_ends(len(chance)) if end <= len(correct)]) - 1
    variance, expected = np.cumsum(chance * (1 - chance)), np.cumsum(chance)
    right, left = np.cumsum(correct)[ends], variance[-1] - variance[ends]
    precision = variance[ends] + PRIOR
    ability = (right - expected[ends]) / precision
    mean = right + expected[-1] - expected[ends] + ability * left
    return mean.clip(right, right + len(chance) - 1 - ends), left + left**2 / precision


def pack(correct: np.ndarray) -> bytes:
    """`correct`, bool (images,), in one bit each."""
    return np.packbits(correct).tobytes()


def unpack(packed: bytes, number: int) -> np.ndarray:
    """The `number` bools that pack() was given."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=number).astype(bool)
