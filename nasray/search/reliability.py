"""How far the ranking of a search can be trusted, from what each candidate says of each image.

A fitness is a mean over the hold-out images, so two candidates also differ by the luck of these
images. The standard error s of a difference is that of a paired bootstrap over images: what two
candidates have in common cancels. The best was chosen for its fitness, which makes its lead d too
large (the winner's curse); empirical Bayes (Efron and Morris 1975) shrinks it, and then the choice
needs no further correction. With a standard deviation t of true differences,

    P(really better) = Phi(sqrt(k) d / s),   k = t^2 / (t^2 + s^2).

t^2 is by how much the spread of the candidates exceeds the noise: of all of them or, if it is less,
the geometric mean of that and of the spread of the better half, since a search adds many good
candidates to a few random ones. One half of the images says which half is better, and two other
quarters how far it spreads, so that the selection does not narrow it. P is the mean over all t that
the candidates leave possible, with an even prior. Two candidates that agree on more images than
others do are related, and t is taken to be as much smaller for them.
"""

import math
from dataclasses import dataclass

import numpy as np

SPLITS = 50  # random divisions of the images into quarters
BLOCK = 4096  # images whose results are floats at once
MIN_CANDIDATES, MIN_IMAGES = 3, 8
DIGITS = 6  # of probabilities: the last bits of sums differ between machines and must not matter
GRID = ((np.arange(32) + 0.5) / 32) ** 2  # of k; even in its square root, which is as even in t
# Clearly better is better by one standard error, as in the rule by which Breiman et al. (1984)
# choose the simplest of many trees: a probability of 0.84.
CLEARLY = 0.5 * (1 + math.erf(math.sqrt(0.5)))

_normal_cdf = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)), otypes=[np.float64])


@dataclass(frozen=True)
class Reliability:
    """What the ranking of n candidates is worth; arrays are (n,), row 0 is the best candidate."""

    num_images: int
    split_half: float  # reliability of the fitness: 0 is noise, 1 has none
    errors: np.ndarray  # standard error of each fitness
    leads: np.ndarray  # of the best over each, as measured
    lead_errors: np.ndarray  # standard errors of these
    expected_leads: np.ndarray  # true leads that are to be expected
    chances: np.ndarray  # that the best is really better than each; 0.5 where nothing differs

    @classmethod
    def of(
        cls,
        scores: np.ndarray,
        labels: np.ndarray,
        *,
        balanced: bool = False,
        seed: int = 0,
    ) -> "Reliability | None":
        """Assess candidates by their results; None if they or the images are too few.

        Args:
            scores: (n, images), whether each image is right, bool, or another number whose mean is
                the fitness; the best candidate first.
            labels: (images,), the class of each: parts of the images have equal shares of each.
            balanced: the fitness is the mean over the classes of the means of their images.
            seed: draws the parts.
        """
        if len(scores) < MIN_CANDIDATES or len(labels) < MIN_IMAGES:
            return None
        classes = np.zeros(len(labels), np.int64)  # whose means make the fitness; else one for all
        if balanced:  # images in the order of their classes
            order = np.argsort(labels, kind="stable")
            scores, labels = scores[:, order], labels[order]
            classes = np.unique(labels, return_inverse=True)[1]
        numbers = np.bincount(classes)  # of images of each class
        weights = (1 / (len(numbers) * numbers))[classes]
        # A class of n images has n - 1 degrees of freedom: a mean of its own.
        squares = weights**2 * (numbers / np.maximum(numbers - 1, 1))[classes]
        quarters = _quarters(labels, seed) * weights[:, None]
        columns = np.column_stack((weights, quarters))
        sums = np.zeros((len(scores), columns.shape[1]))
        means = np.zeros((len(scores), len(numbers)))  # of each class
        own, apart = np.zeros((2, len(scores)))  # sums of squares
        noise = top_noise = 0.0
        top = len(scores) // 2 + 1
        for start in range(0, len(labels), BLOCK):
            rows = slice(start, start + BLOCK)
            found = scores[:, rows].astype(np.float64)
            sums += found @ columns[rows]
            present, starts = np.unique(classes[rows], return_index=True)
            means[:, present] += np.add.reduceat(found, starts, axis=1) / numbers[present]
            own += found**2 @ squares[rows]
            apart += (found[0] - found) ** 2 @ squares[rows]
            noise += found.var(axis=0, ddof=1) @ squares[rows]
            top_noise += found[:top].var(axis=0, ddof=1) @ squares[rows]
        # Deviations are from the mean of an image's class, which is not what varies by luck.
        of_class = np.bincount(classes, squares)
        noise = max(0.0, noise - means.var(axis=0, ddof=1) @ of_class)
        top_noise = max(0.0, top_noise - means[:top].var(axis=0, ddof=1) @ of_class)
        fitness = sums[:, 0]
        parts = (sums[:, 1:] / quarters.sum(axis=0)).reshape(len(scores), SPLITS, 4)
        leads = fitness[0] - fitness
        variances = (apart - (means[0] - means) ** 2 @ of_class).clip(0)
        overall = among_top = _ratio(fitness.var(ddof=1) - noise, noise)
        if top_noise > 0:  # else the better half agree on every image
            among_top = _ratio(_top_spread(parts, top), top_noise)
        excess = (
            (overall * among_top) ** 0.5 if 0 < among_top < overall else min(overall, among_top)
        )
        chances, kept = _posterior(leads, variances, 2 * (top_noise or noise), excess)
        return cls(
            num_images=len(labels),
            split_half=_split_half(parts),
            errors=np.sqrt((own - means**2 @ of_class).clip(0)),
            leads=leads,
            lead_errors=np.sqrt(variances),
            expected_leads=kept * leads,
            chances=chances.round(DIGITS),
        )

    def images_for(self, split_half: float) -> int | None:
        """How many images would give that reliability (Spearman-Brown); None: no telling."""
        if not 0 < self.split_half < 1:
            return None
        odds = split_half / (1 - split_half) * (1 - self.split_half) / self.split_half
        return math.ceil(self.num_images * odds)


def _quarters(labels: np.ndarray, seed: int) -> np.ndarray:
    """SPLITS random divisions into quarters, as columns of 0 and 1: (images, SPLITS * 4)."""
    rng = np.random.default_rng((seed, 0x4A1F))
    order = np.argsort(labels + rng.random((SPLITS, len(labels))), axis=1)  # by class
    dealt = (np.arange(len(labels)) + rng.integers(4, size=(SPLITS, 1))) % 4
    found = np.zeros((len(labels), SPLITS, 4))
    found[order, np.arange(SPLITS)[:, None], dealt] = 1
    return found.reshape(len(labels), -1)


def _split_half(parts: np.ndarray) -> float:
    """Spearman-Brown's reliability, from the mean correlation of two halves of the images."""
    halves = parts[..., 0] + parts[..., 2], parts[..., 1] + parts[..., 3]
    first, second = (half - half.mean(axis=0) for half in halves)
    norms = np.sqrt((first**2).sum(axis=0) * (second**2).sum(axis=0))
    products = (first * second).sum(axis=0)
    correlation = np.divide(products, norms, out=np.zeros(SPLITS), where=norms > 1e-12).mean()
    return round(float(2 * correlation / (1 + correlation)), DIGITS) if correlation > 0 else 0.0


def _top_spread(parts: np.ndarray, number: int) -> float:
    """The true variance among the better candidates: (candidates, SPLITS, 4) -> mean of splits."""
    # Rounded, so that the last bits of sums do not tell equal candidates apart.
    chosen_by = (parts[..., 0] + parts[..., 2]).round(9)
    better = np.argsort(-chosen_by, axis=0, kind="stable")[:number]
    first, second = (np.take_along_axis(parts[..., part], better, axis=0) for part in (1, 3))
    products = (first - first.mean(axis=0)) * (second - second.mean(axis=0))
    return float(products.sum(axis=0).mean() / (number - 1))


def _ratio(spread: float, noise: float) -> float:
    return max(spread / noise, -0.9) if noise > 0 else 0.0


def _posterior(
    leads: np.ndarray, variances: np.ndarray, typical: float, excess: float
) -> tuple[np.ndarray, np.ndarray]:
    """P(really better) for each lead, and the share of the lead that is to be expected.

    `variances` of the leads are `typical` for unrelated candidates, whose spread exceeds the noise
    by `excess`, in units of the noise.
    """
    degrees = len(leads) - 1  # by which (1 + excess) (1 - k) is distributed as chi-squared
    likelihood = degrees / 2 * (np.log1p(-GRID) - (1 - GRID) * (1 + excess))
    weights = np.exp(likelihood - likelihood.max())
    weights /= weights.sum()
    differs = variances > 1e-12 * leads**2  # but for rounding
    relative = np.divide(variances, typical, out=np.zeros_like(variances), where=differs)
    odds = (GRID / (1 - GRID))[:, None] * relative
    shares = odds / (1 + odds)
    z = np.divide(leads, np.sqrt(variances), out=np.zeros_like(leads), where=differs)
    chances, kept = weights @ _normal_cdf(np.sqrt(shares) * z), weights @ shares
    certain = ~differs & (leads > 0)  # every image says the same
    return np.where(certain, 1.0, chances), np.where(certain, 1.0, kept)
