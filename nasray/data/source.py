"""What a source of images returns: class names, and one record per image, shuffled."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

SPLITS = ("train", "val")


@dataclass(frozen=True)
class Record:
    """One image of a source. `load` reads (or draws) its encoded bytes, from any thread."""

    split: str  # "train" or "val"
    label: int
    name: str  # where the user finds it in the source
    load: Callable[[], bytes]


@dataclass(frozen=True)
class Pictures:
    """An opened source: `records` are made lazily, all of train before all of val."""

    classes: tuple[str, ...]
    num_images: int
    records: Iterable[Record]

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def pooled(pictures: Pictures, seed: int) -> Pictures:
    """Return the same images, shuffled anew and all of split "train"."""
    records = list(pictures)
    order = shuffled(len(records), seed, "train")
    together = [replace(records[position], split="train") for position in order]
    return Pictures(pictures.classes, len(together), together)


def shuffled(num_images: int, seed: int, split: str) -> np.ndarray:
    """Return the order in which the `num_images` images of a split are stored: int64 (n,)."""
    return np.random.default_rng((seed, SPLITS.index(split))).permutation(num_images)
