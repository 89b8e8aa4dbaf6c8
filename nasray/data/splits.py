"""Which images of a data set a job uses for training, hold-out, calibration and validation.

Search never sees the validation images: subnets are evaluated on a hold-out of the training
images, and calibrated on the others (docs/spec.md, OneShot 6.4).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nasray.config import DataConfig, Job
from nasray.data.cache import cached_images
from nasray.data.loader import (
    HOLDOUT,
    VALIDATION,
    TrainBatches,
    calibration_subset,
    class_weights,
    default_share,
    holdout_split,
    share_split,
    train_batches,
)
from nasray.data.shards import Dataset, open_dataset
from nasray.errors import UserError
from nasray.storage.files import cache_folder

Images = tuple[np.ndarray, np.ndarray]  # uint8 (n, 3, height, width), int64 labels (n,)


@dataclass(frozen=True)
class Parts:
    """Which images play which part: positions among those stored as "train", sorted.

    `validation` are positions among those stored as `validation_split`.
    """

    training: np.ndarray
    holdout: np.ndarray
    validation: np.ndarray
    validation_split: str

    @classmethod
    def of(
        cls,
        labels: np.ndarray,
        pictures: np.ndarray,
        num_val: int,
        config: DataConfig,
        seed: int,
        classes: Sequence[str],
    ) -> "Parts":
        """Divide the images stored as "train", of these `labels` (n,), as a job says.

        `pictures` as of share_split(); `num_val` images are stored as "val".

        Raises:
            UserError: a class is too small for data.holdout_per_class, no class can be divided,
                or there are validation images already and data.val_share asks for others.
        """
        if num_val and config.val_share:
            raise UserError(
                f"data.val_share = {config.val_share}: {config.path} was imported with "
                f"{num_val} validation images; leave it out, or name the source that was imported"
            )
        rest, validation = np.arange(len(labels)), np.arange(num_val)
        if not num_val:
            share = config.val_share or default_share(len(labels), len(classes))
            rng = np.random.default_rng((seed, VALIDATION))
            rest, validation = share_split(labels, pictures, share, rng)
        if config.holdout_per_class:
            chosen = holdout_split(labels[rest], config.holdout_per_class, seed, classes)
        else:
            share = config.holdout_share or default_share(len(rest), len(classes))
            rng = np.random.default_rng((seed, HOLDOUT))
            chosen = share_split(labels[rest], pictures[rest], share, rng)
        training, holdout = (rest[positions] for positions in chosen)
        given = config.val_share or config.holdout_share
        if not len(validation) or not len(holdout):
            raise UserError(
                f"data.path = {config.path!r}: no class has enough different images to set one "
                "aside; add images, three of a class at least"
                + (", or lower data.val_share or data.holdout_share" if given else "")
            )
        return cls(training, holdout, validation, "val" if num_val else "train")


@dataclass(frozen=True)
class JobImages:
    """The images of one job's data set, at that job's resolution or `other_resolution`, pixels."""

    job: Job
    data_path: str
    other_resolution: int | None = None
    fingerprint: str = ""  # that the data set must have; empty: any

    @property
    def resolution(self) -> int:
        """The resolution of all images that this object returns, pixels."""
        return self.other_resolution or self.job.space.resolution

    @cached_property
    def dataset(self) -> Dataset:
        """The imported data set.

        Raises:
            UserError: there is none at `data_path`, or on this node another one.
        """
        dataset = open_dataset(self.data_path)
        if self.fingerprint not in ("", dataset.fingerprint):
            raise UserError(
                f"{self.data_path} on node {os.uname().nodename} is not the data set of this run: "
                "it was imported from other images or another time; copy the run's there, or keep "
                "one copy where all nodes see it"
            )
        return dataset

    def training_batches(
        self, batch_size: int, epoch: int, *, rank: int, world_size: int
    ) -> TrainBatches:
        """Return this worker's part of every augmented batch of `epoch`."""
        return train_batches(
            self.dataset,
            self.parts.training,
            self.job.data,
            resolution=self.resolution,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.job.seed,
            epoch=epoch,
        )

    def check_batches(self) -> None:
        """Check that the workers of all the job's trainings, retraining included, can be fed.

        Raises:
            UserError: there are too few images, or a batch is too small for the workers.
        """
        job, compute = self.job, self.job.compute
        shares = [(job.supernet.batch_size, compute.num_workers)]
        ways = [way for way in job.retrain.ways if way.epochs]
        shares += [(way.batch_size, compute.workers_per_trial) for way in ways]
        for batch_size, num_workers in shares:
            self.training_batches(batch_size, 0, rank=0, world_size=num_workers)

    @property
    def class_weights(self) -> np.ndarray | None:
        """Weights of the training loss, float32 (classes,); None unless data.balance asks so."""
        if self.job.data.balance != "weights":
            return None
        labels = self.dataset.labels("train")[self.parts.training]
        return class_weights(labels, len(self.dataset.classes))

    def calibration(self, num_images: int) -> np.ndarray:
        """Return training images for BN recalibration, not augmented; all if there are fewer.

        They are uint8 (num_images, 3, resolution, resolution).
        """
        if num_images not in self._calibrations:
            chosen = calibration_subset(self.parts.training, num_images, self.job.seed)
            self._calibrations[num_images] = self._cached("train", chosen)[0]
        return self._calibrations[num_images]

    @cached_property
    def holdout(self) -> Images:
        """The training images set aside to evaluate subnets and training recipes on."""
        return self._cached("train", self.parts.holdout)

    @property
    def holdout_labels(self) -> np.ndarray:
        """The classes of the hold-out images, int64 (n,), in their order; no image is decoded."""
        return self.dataset.labels("train")[self.parts.holdout]

    @cached_property
    def validation(self) -> Images:
        """The images for final reports only: those of val/, or a part of all."""
        return self.first_validation(len(self.parts.validation))

    def first_validation(self, num_images: int) -> Images:
        """The first `num_images` of the validation images, or all if there are fewer."""
        return self._cached(self.parts.validation_split, self.parts.validation[:num_images])

    @cached_property
    def _calibrations(self) -> dict[int, np.ndarray]:
        return {}  # by their number of images; opening them takes reading them

    @cached_property
    def parts(self) -> Parts:
        """Which images play which part; errors as of Parts.of()."""
        labels = self.dataset.labels("train")
        # With val/ and data.holdout_per_class, nothing is divided by them.
        published = self.dataset.num("val") and self.job.data.holdout_per_class
        return Parts.of(
            labels,
            np.arange(len(labels)) if published else self.dataset.pictures("train"),
            self.dataset.num("val"),
            self.job.data,
            self.job.seed,
            self.dataset.classes,
        )

    def _cached(self, split: str, indices: np.ndarray) -> Images:
        return cached_images(
            self.dataset,
            split,
            indices,
            resolution=self.resolution,
            decoder=self.job.data.decoder,
            background=self.job.data.background,
            folder=cache_folder(),
        )
