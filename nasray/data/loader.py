"""Hold-out, calibration images, and the batches of an epoch.

Every choice is a pure function of (seed, epoch) and the image, so a resumed epoch is the
same epoch, on any number of workers. Knows no network and no Ray.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils import data

from nasray.config import DataConfig
from nasray.data.decoding import make_decoder
from nasray.data.shards import Dataset
from nasray.data.transforms import train_transform
from nasray.errors import UserError

WINDOW_BYTES = 512 << 20  # of encoded images, shuffled together
DECODED_TOGETHER = 8  # images, before they are augmented
MIN_CACHE_BYTES = 128 << 20  # of row groups, in each loading process

# Last elements of the seeds, so that no two draws share their random numbers.
HOLDOUT, CALIBRATION, ROW_GROUPS, IMAGES, AUGMENTATION, VALIDATION, BALANCE = range(7)


def holdout_split(
    labels: np.ndarray, per_class: int, seed: int, classes: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Set `per_class` images of each class aside: (training indices, hold-out), sorted.

    `labels` (n,) are those of the training set.

    Raises:
        UserError: a class has no more than `per_class` images.
    """
    rng = np.random.default_rng((seed, HOLDOUT))
    names = list(map(str, range(int(labels.max()) + 1))) if classes is None else classes
    held = []
    sizes = np.bincount(labels, minlength=len(names))
    if (least := int(sizes.min())) <= per_class:
        way_out = f"lower it to {least - 1}" if least > 1 else "leave it out"
        raise UserError(
            f"data.holdout_per_class = {per_class}: class {names[int(sizes.argmin())]!r} has only "
            f"{least} training images; {way_out}, or give data.holdout_share = 0.2 in its place, "
            "which leaves a class of one image in training"
        )
    for label in range(len(names)):
        members = np.flatnonzero(labels == label)
        held.append(rng.choice(members, per_class, replace=False))
    holdout = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), holdout, assume_unique=True), holdout


def share_split(
    labels: np.ndarray, pictures: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Set a `share` of each class aside: (positions kept, positions set aside), sorted.

    `labels` (n,). Images of the same number in `pictures` (n,) show the same, and stay together, in
    the class of the first of them. Of a class of two pictures or more, one at least is set aside
    and one is kept; of a class of one, none is set aside.
    """
    _, first, which = np.unique(pictures, return_index=True, return_inverse=True)
    sizes, classes = np.bincount(which), labels[first]
    aside = np.zeros(len(first), bool)
    for own in _by_class(classes).values():
        own = rng.permutation(own)
        wanted = max(1, round(share * sizes[own].sum()))
        own = own[np.argsort(sizes[own] > wanted, kind="stable")]  # large groups if nothing else
        number = np.searchsorted(np.cumsum(sizes[own]), wanted, side="right")
        aside[own[: min(max(1, number), len(own) - 1)]] = True
    return np.flatnonzero(~aside[which]), np.flatnonzero(aside[which])


def _by_class(labels: np.ndarray) -> dict[int, np.ndarray]:
    """Positions of each of the `labels` (n,), both ascending."""
    order = np.argsort(labels, kind="stable")
    found, starts = np.unique(labels[order], return_index=True)
    return dict(zip(found.tolist(), np.split(order, starts[1:]), strict=True))


def default_share(num_images: int, num_classes: int) -> float:
    """The share of `num_images` that is set aside where a job does not say.

    A fifth, or less if 500 images and 50 of each class are less.
    """
    return min(0.2, max(500, 50 * num_classes) / max(1, num_images))


def calibration_subset(indices: np.ndarray, num_images: int, seed: int) -> np.ndarray:
    """Draw `num_images` of `indices` (n,), or all if there are fewer; sorted."""
    if num_images >= len(indices):
        return np.sort(indices)
    rng = np.random.default_rng((seed, CALIBRATION))
    return np.sort(rng.choice(indices, num_images, replace=False))


def epoch_order(dataset: Dataset, indices: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Shuffle `indices` (n,) of the training set for one epoch, so that reads stay sequential.

    They may be those of balanced_draws().
    Row groups are shuffled across all shards, then images within windows of consecutive
    row groups, 512 MB together; a data set of one window is shuffled fully. As images were
    shuffled before they were stored, a window is a random sample, other ones every epoch.
    """
    window, _ = _windows(dataset, indices, seed=seed, epoch=epoch)
    keys = np.random.default_rng((seed, epoch, IMAGES)).random(len(indices))
    return indices[np.lexsort((keys, window))]


def balanced_draws(indices: np.ndarray, labels: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Draw as many of `indices` (n,) for one epoch, each class as often as any other.

    `labels` (m,) are those of the whole training set. The second draw of an image in an epoch is
    its index plus m, the third plus 2 m, and so on, so that each is augmented in its own way.
    """
    rng = np.random.default_rng((seed, epoch, BALANCE))
    positions, draws = _by_class(labels[indices]), []
    present = rng.permutation(list(positions))  # one more for the first ones if it does not divide
    for position, label in enumerate(present):
        members = rng.permutation(indices[positions[label]])
        number = len(indices) // len(present) + (position < len(indices) % len(present))
        repeat, place = np.divmod(np.arange(number), len(members))
        draws.append(members[place] + repeat * len(labels))
    return np.concatenate(draws)


def class_weights(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Weights of the loss by class, float32 (num_classes,), whose mean over `labels` (n,) is 1.

    Each class has the same sum; one without images has 0.
    """
    counts = np.bincount(labels, minlength=num_classes)
    shares = len(labels) / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return np.where(counts, shares, 0).astype(np.float32)


def _windows(
    dataset: Dataset, indices: np.ndarray, *, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the window of each image, and its row group's place in that window, in 0..1."""
    num_row_groups = dataset.num_row_groups("train")
    places = np.random.default_rng((seed, epoch, ROW_GROUPS)).permutation(num_row_groups)
    mean_bytes = dataset.image_bytes("train") / num_row_groups
    size = max(1, round(WINDOW_BYTES / mean_bytes))  # row groups
    groups = dataset.row_groups_of("train", indices % dataset.num("train"))
    window, place = np.divmod(places[groups], size)
    return window, place / np.minimum(size, num_row_groups - window * size)  # the last is smaller


def train_batches(
    dataset: Dataset,
    indices: np.ndarray,
    config: DataConfig,
    *,
    resolution: int,
    batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    epoch: int,
) -> "TrainBatches":
    """Return one rank's share of the batches of one epoch over `indices`.

    Yields (images uint8 (b, 3, resolution, resolution), labels int64 (b,)). `batch_size`
    counts the images of all ranks; ranks whose number does not divide it get one image
    more or less. The last incomplete batch is dropped, unless it is the only one.

    With data.balance = "sampling", images are drawn by balanced_draws().

    The global batches do not depend on the number of ranks and loader processes. Within
    a batch, images go to ranks and processes by row group, so that each process reads few
    of them. Cost, for ImageNet and batches of 1,024: one process reads every row group
    once, 32 together 2.6 times, 128 about 7 times (8 MB serve some 10 images then, still
    less work than decoding those). Memory: 768 MB of row groups, shared out over all
    processes, but 128 MB for each at least.

    With `loader_workers` = 0 this process decodes, without reading ahead.

    Raises:
        UserError: a rank's share of a batch is less than two images, of which BN has no statistics,
            or the decoder is not installed.
    """
    make_decoder(config.decoder)
    num_images = len(indices)
    if min(batch_size, num_images) < 2 * world_size:
        too_small = batch_size < 2 * world_size
        more = f"raise batch_size to {2 * world_size}" if too_small else "add images"
        raise UserError(
            f"a batch of {min(batch_size, num_images)} images cannot feed {world_size} training "
            "workers with two images each, without which batch normalisation has no statistics; "
            f"lower compute.num_workers (retraining: workers_per_trial) or {more}"
        )
    if config.balance == "sampling":
        indices = balanced_draws(indices, dataset.labels("train"), seed=seed, epoch=epoch)
    order = epoch_order(dataset, indices, seed=seed, epoch=epoch)
    window, place = _windows(dataset, order, seed=seed, epoch=epoch)
    num_parts = max(1, config.loader_workers)
    shares: list[list[np.ndarray]] = []
    for start in range(0, max(1, num_images - batch_size + 1), batch_size):
        batch = np.arange(start, min(start + batch_size, num_images))
        batch = batch[np.argsort(place[batch], kind="stable")]
        share = np.array_split(batch, world_size)[rank]
        parts = np.array_split(share, num_parts)
        # A part of two windows reads the older one's row groups first, for the last time.
        shares.append([order[part[np.argsort(window[part], kind="stable")]] for part in parts])
    cache_bytes = max(MIN_CACHE_BYTES, WINDOW_BYTES * 3 // 2 // (world_size * num_parts))
    images = _AugmentedImages(
        replace(dataset, cache_bytes=cache_bytes), config, resolution, seed, epoch
    )
    return TrainBatches(images, dataset.labels("train"), shares, config.loader_workers)


@dataclass(frozen=True)
class _AugmentedImages(data.Dataset[torch.Tensor]):
    """Loads and augments the images at given indices; it is sent to the loader processes."""

    dataset: Dataset
    config: DataConfig
    resolution: int
    seed: int
    epoch: int

    def __getitem__(self, draws: np.ndarray) -> torch.Tensor:
        repeats, indices = np.divmod(draws, self.dataset.num("train"))
        decode = make_decoder(self.config.decoder, self.config.background)
        augment = train_transform(self.config, self.resolution)
        encoded, images = self.dataset.read("train", indices), []
        # Several are decoded, then augmented: 5 % less time than one by one, since each of the two
        # finds its code and tables in the processor's cache.
        for start in range(0, len(indices), DECODED_TOGETHER):
            group = slice(start, start + DECODED_TOGETHER)
            pictures = [decode(image) for image in encoded[group]]
            drawn = zip(indices[group].tolist(), repeats[group].tolist(), pictures, strict=True)
            for index, repeat, picture in drawn:
                again = (repeat,) if repeat else ()
                key = np.random.SeedSequence((self.seed, self.epoch, index, AUGMENTATION, *again))
                images.append(augment(picture, int(key.generate_state(1)[0])))
        if not images:  # fewer images than loader processes
            return torch.empty((0, 3, self.resolution, self.resolution), dtype=torch.uint8)
        # In a loader process this stacks in memory that the training process shares.
        stacked: torch.Tensor = data.default_collate(images)
        return stacked


class TrainBatches:
    """A sized iterable of batches; iterating again gives the same ones."""

    def __init__(
        self,
        images: _AugmentedImages,
        labels: np.ndarray,
        shares: list[list[np.ndarray]],
        num_workers: int,
    ) -> None:
        self.images, self.labels, self.shares = images, labels, shares
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Part i of every batch goes to process i, because a DataLoader assigns its items to
        # processes in turn, and returns them in order.
        parts = iter(
            data.DataLoader(
                self.images,
                batch_size=None,
                sampler=[part for share in self.shares for part in share],
                num_workers=self.num_workers,
                multiprocessing_context=_context() if self.num_workers else None,
                generator=torch.Generator(),  # else it draws from the global one
            )
        )
        for share in self.shares:
            images = [next(parts) for _ in share]
            indices = np.concatenate(share) % len(self.labels)
            labels = torch.from_numpy(self.labels[indices].astype(np.int64))
            yield images[0] if len(images) == 1 else torch.cat(images), labels


def _context() -> multiprocessing.context.BaseContext:
    # fork is unsafe where threads run, as in a Ray actor. The fork server imports torch
    # once (seconds), then starts each epoch's processes at no cost.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nasray.data.loader", "torch"])
    return context
