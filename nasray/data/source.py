"""What a source of images returns: class names, one record per image, shuffled, what it skips."""

import errno
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

log = logging.getLogger(__name__)

SPLITS = ("train", "val")
# What people call them, in letters of any size; of the second, the first found counts.
TRAIN_NAMES = ("train", "training")
VAL_NAMES = ("val", "valid", "validation", "test", "testing")
# What is added to these: training_set, seg_test, test-images.
FILLERS = {"set", "data", "dataset", "images", "imgs", "folder", "split", "seg"}

# Why an image is skipped. The first four are images that should be there: more than a few of them
# are refused.
BROKEN_LINK = "behind a broken link"
UNREADABLE = "unreadable"
UNDECODABLE = "undecodable"
UNLABELLED = "without a label"
RAW_ADVICE = "a camera's raw image; convert it to JPEG"
FAULTS = (BROKEN_LINK, UNREADABLE, UNDECODABLE, UNLABELLED)
HIDDEN = "hidden"
SERVICE = "of other programs"
STRAY = "outside of the class folders"
NO_SPLIT = "of neither split"
LOOP = "links round in a circle"
NO_IMAGE = "files that are no images"
LOST = (*FAULTS, STRAY, NO_SPLIT, HIDDEN, SERVICE)  # images, most alarming first
HARMLESS = (LOOP, NO_IMAGE)  # of which no image is lost
MAX_NAMED = 10  # for each reason

# What reading a file raises that is there, but not for us; errors of a network are others.
UNREADABLE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
    *(errno.EIO, errno.ENXIO, errno.ESTALE, errno.ENAMETOOLONG),
)


def split_word(name: str) -> str:
    """Return `name` as TRAIN_NAMES and VAL_NAMES have it: of "Training_Set" "training"."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    left = [word for word in words if word not in FILLERS]
    return left[0].removesuffix("set") if len(left) == 1 else "-".join(words)


class Unusable(NamedTuple):
    """Stands in the listing of a source for a file that cannot be used."""

    reason: str  # one of the above
    detail: str = ""


class Skipped:
    """What an import leaves out: how many files by reason, and the first names of each."""

    def __init__(self) -> None:
        self.numbers: Counter[str] = Counter()
        self.first: dict[str, list[tuple[str, str]]] = {}  # name, and what is to be said of it
        self.refusal = ""  # why an import refuses the rest
        self._first_below: dict[str, str] = {}  # by the first two names of a path: why, and what

    def add(self, reason: str, name: str, detail: str = "") -> None:
        """Count the file `name`; `detail` says more than the reason."""
        self.numbers[reason] += 1
        names = self.first.setdefault(reason, [])
        if len(names) < MAX_NAMED:
            names.append((name, detail))
        if reason in FAULTS:
            below = "/".join(name.split("/")[:2])
            self._first_below.setdefault(below, f"{name}: {detail or reason}")

    def num_faults(self) -> int:
        """Count the images that should be there."""
        return sum(self.numbers[reason] for reason in FAULTS)

    def num_images(self) -> int:
        """Count all that may be images."""
        return sum(self.numbers[reason] for reason in LOST)

    def first_below(self, folder: str) -> str:
        """The first fault below `folder`, in words; "" if there is none."""
        below = (why for place, why in self._first_below.items() if f"{place}/".startswith(folder))
        return next(below, "")

    def described(self, reasons: Iterable[str]) -> str:
        """Say how many are skipped for each of `reasons`, the first names, and why the first is."""
        found = []
        for reason in reasons:
            if number := self.numbers[reason]:
                [(name, detail), *others] = self.first[reason]
                names = [f"{name} ({detail})" if detail else name, *(name for name, _ in others)]
                more = f" and {number - MAX_NAMED} more" if number > MAX_NAMED else ""
                found.append(f"{number} {reason}: {', '.join(names)}{more}")
        return "; ".join(found)

    def recorded(self) -> dict[str, dict[str, Any]]:
        """Return by reason the "number", and the "first" names with what is to be said of them."""
        return {
            reason: {
                "number": number,
                "first": [f"{name} ({why})" if why else name for name, why in self.first[reason]],
            }
            for reason, number in self.numbers.items()
        }


def why_unreadable(error: OSError) -> str | None:
    """Say why one file cannot be read; None if the error is not that file's."""
    if error.errno in UNREADABLE_ERRORS or isinstance(error, FileNotFoundError | PermissionError):
        return error.strerror or type(error).__name__
    return None


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
    skipped: Skipped = field(default_factory=Skipped)  # by the source, before anything is decoded

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def pooled(pictures: Pictures, seed: int) -> Pictures:
    """Return the same images, shuffled anew and all of split "train"."""
    records = list(pictures)
    if number := sum(record.split != "train" for record in records):
        log.info("data.val_share: %d images of val are divided anew with all others", number)
    order = shuffled(len(records), seed, "train")
    together = [replace(records[position], split="train") for position in order]
    return replace(pictures, num_images=len(together), records=together)


def shuffled(num_images: int, seed: int, split: str) -> np.ndarray:
    """Return the order in which the `num_images` images of a split are stored: int64 (n,)."""
    return np.random.default_rng((seed, SPLITS.index(split))).permutation(num_images)
