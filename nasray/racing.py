"""Racing: judge a candidate on growing slices of the images, drop it once it cannot win.

After Maron and Moore (1994) and Moore and Lee (1994), paired: candidate and bar, the one
that it would have to displace, are compared on the same images. Two networks of one
supernet mostly err on the same ones, so their difference is known long before either top-1.
"""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FEWEST = 64  # images of the first slice
FIRST, GROWTH = 16, 2


def slice_ends(number: int) -> tuple[int, ...]:
    """After how many of `number` images a race looks; the last is all of them."""
    ends = []
    end = max(FEWEST, number // FIRST)
    while end < number:
        ends.append(end)
        end = round(end * GROWTH)
    return (*ends, number)


def slice_top1(correct: np.ndarray, number: int) -> tuple[float, ...]:
    """The top-1 on each slice alone, of the first of `number` images judged: bool (m,)."""
    ends = [end for end in slice_ends(number) if end < len(correct)]
    return tuple(float(part.mean()) for part in np.split(correct, ends))


@dataclass(frozen=True)
class Race:
    """Against `bar`: which of all images the candidate to beat has right, bool (n,)."""

    bar: np.ndarray
    confidence: float  # that a candidate which is dropped would not have reached the bar

    def is_lost(self, correct: np.ndarray) -> bool:
        """Whether a candidate with these first images `correct` is all but sure to stay below.

        The mean difference over all n images, given that over the first m, is taken as
        normal: its standard deviation is s sqrt((n - m) / (n m)), s that of one difference,
        estimated with one image more won and one more lost.
        """
        seen, total = len(correct), len(self.bar)
        if seen == total:
            return False
        won = int((correct & ~self.bar[:seen]).sum())
        lost = int((~correct & self.bar[:seen]).sum())
        mean = (won - lost) / seen
        variance = (won + lost + 2) / (seen + 2) - ((won - lost) / (seen + 2)) ** 2
        deviation = (variance * (total - seen) / (total * seen)) ** 0.5
        # Every look may be wrong; together they are allowed what one would be.
        allowed = (1 - self.confidence) / max(1, len(slice_ends(total)) - 1)
        return NormalDist().cdf(mean / deviation) < allowed

    def fitness(self, correct: np.ndarray) -> float:
        """Top-1 on all images; of a dropped candidate, estimated from what it is behind."""
        if len(correct) == len(self.bar):
            return float(correct.mean())
        behind = correct.mean() - self.bar[: len(correct)].mean()
        return float(max(0.0, self.bar.mean() + behind))


def pack(correct: np.ndarray) -> bytes:
    """`correct`, bool (images,), in one bit each."""
    return np.packbits(correct).tobytes()


def unpack(packed: bytes, number: int) -> np.ndarray:
    """The `number` bools that pack() was given."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=number).astype(bool)
