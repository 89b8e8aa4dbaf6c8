"""What a data set looks like: sizes, doubles, imbalance, and how sure a top-1 on it can be."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from nasray.config import DataConfig
from nasray.data import IMPORTED, check_source
from nasray.data.importing import looked_at, open_source
from nasray.data.look import Look
from nasray.data.shards import Dataset, open_dataset
from nasray.data.source import SPLITS, Pictures
from nasray.data.splits import Parts
from nasray.errors import UserError

MAX_PAIRS = 5  # named for each finding
MAX_COMPARED = 10_000  # images, each with each other by their difference hashes
ALIKE_BITS = 14  # of 256, by which the hashes of one picture may differ
PLAIN_BITS = 40  # set or not set at least, or pictures are too plain to be told apart
SIDES = ("width", "height")
TOP1 = (0.5, 0.9)  # of which the standard error is said
UNBALANCED = 3  # times as many images in one class as in another
DOUBLES = {
    "alike": "pairs of images of two classes or splits look alike",
    "same_in_two_splits": "pictures lie in both train and val",
    "same_in_two_classes": "pictures lie in two classes",
}


@dataclass(frozen=True)
class Survey:
    """The images of a data set: an element of each array per image, in any order."""

    classes: Sequence[str]
    splits: np.ndarray  # position in SPLITS
    labels: np.ndarray  # position in `classes`
    names: Sequence[str]
    pictures: np.ndarray  # int64, as of Look; all differ where they are not recorded
    gradients: np.ndarray  # uint64 (n, 4), likewise
    sizes: np.ndarray  # width and height (n, 2), pixels
    has_looks: bool = True

    @classmethod
    def of(cls, dataset: Dataset) -> "Survey":
        """Survey an imported data set; reads no image."""
        columns = {
            name: [chunk for split in SPLITS for chunk in dataset.column(split, name).chunks]
            for name in ("name", *Look._fields)
        }
        joined = {name: pa.chunked_array(chunks) for name, chunks in columns.items()}
        size = len(joined["name"])
        recorded = not any(joined[name].null_count for name in Look._fields)
        gradients = b"".join(joined["gradients"].to_pylist()) if recorded else bytes(32 * size)
        return cls(
            dataset.classes,
            np.repeat([0, 1], [dataset.num(split) for split in SPLITS]),
            np.concatenate([dataset.labels(split) for split in SPLITS]),
            joined["name"].to_pylist(),
            joined["picture"].to_numpy() if recorded else np.arange(size),
            np.frombuffer(gradients, np.uint64).reshape(size, 4),
            np.stack([joined[side].to_numpy() for side in SIDES], axis=1),
            recorded,
        )

    @classmethod
    def of_source(cls, pictures: Pictures, show: Callable[[int, int], None]) -> "Survey":
        """Survey a source, all of whose images are decoded; as looked_at()."""
        found = [
            (record.split, record.label, record.name, *look)
            for record, look in looked_at(pictures, show)
        ]
        splits, labels, names, *looks = zip(*found, strict=True) if found else [()] * 7
        own, gradients, *sizes = looks
        return cls(
            pictures.classes,
            np.array([SPLITS.index(split) for split in splits], np.int64),
            np.array(labels, np.int64),
            names,
            np.array(own, np.int64),
            np.frombuffer(b"".join(gradients), np.uint64).reshape(-1, 4),
            np.array(sizes, np.int64).T,
        )

    def findings(self, config: DataConfig, seed: int) -> dict[str, Any]:
        """Return what `nasray data check --json` prints; `config` says how images are divided."""
        counts = np.zeros((2, len(self.classes)), np.int64)
        np.add.at(counts, (self.splits, self.labels), 1)
        found: dict[str, Any] = {
            "images": dict(zip(SPLITS, counts.sum(1).tolist(), strict=True)),
            "classes": {
                name: dict(zip(SPLITS, both, strict=True))
                for name, both in zip(self.classes, counts.T.tolist(), strict=True)
            },
        }
        totals = counts.sum(0)
        found["imbalance"] = float(totals.max() / max(1, totals.min()))
        if self.has_looks and len(self.names):
            found |= self._found_by_looks()
        return found | self._parts(config, seed)

    def _found_by_looks(self) -> dict[str, Any]:
        quantiles = np.quantile(self.sizes, (0, 0.5, 1), axis=0).astype(int).T.tolist()
        sizes = {
            side: dict(zip(("min", "median", "max"), own, strict=True))
            for side, own in zip(SIDES, quantiles, strict=True)
        }
        others = {"classes": self.labels, "splits": self.splits}
        doubles = {
            f"same_in_two_{what}": self._named(_neighbours(self.pictures, apart))
            for what, apart in others.items()
        }
        alike = _alike(self.gradients, self.pictures)
        apart = np.any([own[alike[:, 0]] != own[alike[:, 1]] for own in others.values()], axis=0)
        copies = len(self.pictures) - len(np.unique(self.pictures))
        return {**sizes, "copies": copies, **doubles, "alike": self._named(alike[apart])}

    def _named(self, pairs: np.ndarray) -> dict[str, Any]:
        first = [[self.names[one], self.names[other]] for one, other in pairs[:MAX_PAIRS].tolist()]
        return {"number": len(pairs), "first": first}

    def _parts(self, config: DataConfig, seed: int) -> dict[str, Any]:
        own = self.splits == 0
        labels = self.labels[own]
        num_val = int(np.sum(~own))
        try:
            parts = Parts.of(labels, self.pictures[own], num_val, config, seed, self.classes)
        except UserError as error:
            return {"problem": str(error)}
        sizes = {
            "training": len(parts.training),
            "holdout": len(parts.holdout),
            "validation": len(parts.validation),
        }
        held = set(labels[parts.holdout].tolist())
        return {
            "parts": sizes,
            "not_held_out": [name for label, name in enumerate(self.classes) if label not in held],
            "standard_error": {
                part: {str(top1): standard_error(top1, sizes[part]) for top1 in TOP1}
                for part in ("holdout", "validation")
            },
        }


def survey(
    config: DataConfig, seed: int, show: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Return the findings on the images that `config` names, imported ones or a source.

    Of a source, "skipped" says what an import would leave out, as dataset.json does.
    `show(done, total)` is called with the number of images of a source done.

    Raises:
        UserError: they are not there, are no data set, or no image of it can be used.
    """
    check_source(config)
    if config.source == IMPORTED:
        dataset = open_dataset(config.path)
        return Survey.of(dataset).findings(config, seed)
    pictures = open_source(config, seed)
    surveyed, skipped = Survey.of_source(pictures, show), pictures.skipped
    if not np.any(surveyed.splits == SPLITS.index("train")):
        raise UserError(skipped.refusal or "data.path: holds no images")
    found = surveyed.findings(config, seed) | {"skipped": skipped.recorded()}
    return found | ({"refused": skipped.refusal} if skipped.refusal else {})


def standard_error(top1: float, num_images: int) -> float:
    """The standard error of a `top1`, a fraction, that was measured on `num_images`."""
    return float(np.sqrt(top1 * (1 - top1) / num_images))


def _neighbours(pictures: np.ndarray, apart: np.ndarray) -> np.ndarray:
    """Pairs (n, 2) of images with equal `pictures` that differ in `apart`; one for each picture."""
    order = np.lexsort((apart, pictures))
    same = pictures[order[1:]] == pictures[order[:-1]]
    places = np.flatnonzero(same & (apart[order[1:]] != apart[order[:-1]]))
    _, first = np.unique(pictures[order[places]], return_index=True)
    return np.stack([order[places[first]], order[places[first] + 1]], axis=1)


def _alike(gradients: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """Pairs (n, 2) of different pictures whose difference hashes are near; plain ones left out."""
    bits = np.bitwise_count(gradients).sum(1)
    telling = np.flatnonzero((bits >= PLAIN_BITS) & (bits <= 256 - PLAIN_BITS))
    own = gradients[telling]
    found = np.empty((0, 2), np.int64)
    if len(telling) > MAX_COMPARED:  # equal ones only
        order = np.lexsort(own.T)
        same = np.all(own[order[1:]] == own[order[:-1]], axis=1)
        found = np.stack([order[:-1], order[1:]], axis=1)[same]
    for start in range(0, len(own), 128) if len(telling) <= MAX_COMPARED else ():
        block = own[start : start + 128, None]
        # Most pairs differ enough in the first quarter of the bits.
        one, other = np.nonzero(np.bitwise_count(block[..., 0] ^ own[:, 0]) <= ALIKE_BITS)
        near = np.bitwise_count(own[one + start] ^ own[other]).sum(1) <= ALIKE_BITS
        pairs = np.stack([one + start, other], axis=1)[near]
        found = np.concatenate([found, pairs[pairs[:, 0] < pairs[:, 1]]])
    pairs = telling[found]
    return pairs[pictures[pairs[:, 0]] != pictures[pairs[:, 1]]]


def sentences(found: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Say what the findings of a survey are: plain facts, and what somebody should look at."""
    images, classes = found["images"], found["classes"]
    totals = {name: sum(both.values()) for name, both in classes.items()}
    least, most = min(totals, key=totals.__getitem__), max(totals, key=totals.__getitem__)
    facts = [
        f"{images['train']:,} images in train, {images['val']:,} in val, of {len(classes)} classes",
        f"images of a class: {totals[least]:,} ({least}) to {totals[most]:,} ({most})",
    ]
    if "width" in found:
        facts.append(
            "size, pixels: "
            + ", ".join(
                f"{side} {found[side]['min']} to {found[side]['max']} "
                f"(median {found[side]['median']})"
                for side in SIDES
            )
        )
    else:
        facts.append("imported by an earlier version: sizes and equal pictures are not recorded")
    problems = [f"an import refuses this: {found['refused']}"] if "refused" in found else []
    for reason, own in found.get("skipped", {}).items():
        names = ", ".join(own["first"][:MAX_PAIRS])
        problems.append(f"skipped: {own['number']:,} {reason}" + (f" ({names})" if names else ""))
    if found["imbalance"] >= UNBALANCED:
        problems.append(
            f"unbalanced: {most} has {found['imbalance']:.0f} times the images of {least}; see "
            "data.balance"
        )
    if "parts" in found:
        for part, what in (("holdout", "to choose by"), ("validation", "to report on")):
            errors = [
                f"{100 * error:.1f} at {float(top1):.0%}"
                for top1, error in found["standard_error"][part].items()
            ]
            facts.append(
                f"{found['parts'][part]:,} images {what}: standard error of a top-1, points: "
                f"{', '.join(errors)}"
            )
        if names := found["not_held_out"]:
            problems.append(
                f"{len(names)} classes have no image to choose by: {', '.join(names[:MAX_PAIRS])}"
            )
    else:
        problems.append(found["problem"])
    for key, what in DOUBLES.items():
        if number := found.get(key, {}).get("number", 0):
            pairs = "; ".join(" = ".join(pair) for pair in found[key]["first"][:2])
            problems.append(f"{number:,} {what}, first {pairs}")
    return facts, problems
