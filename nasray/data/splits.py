"""Which images of a data set play which part in a job: training, hold-out, calibration, test.

Search never sees the validation folder: subnets are judged on a hold-out of the training
images, and calibrated on the others (design: spec 6.4, item 5).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nasray.config import Job
from nasray.data.cache import cached_images, default_folder
from nasray.data.loader import TrainBatches, calibration_subset, holdout_split, train_batches
from nasray.data.shards import Dataset, open_dataset

Images = tuple[np.ndarray, np.ndarray]  # uint8 (n, 3, height, width), int64 labels (n,)


@dataclass(frozen=True)
class JobImages:
    """The images of one job's data set, at that job's resolution or `other_resolution`, pixels."""

    job: Job
    data_path: str
    other_resolution: int | None = None

    @property
    def resolution(self) -> int:
        return self.other_resolution or self.job.space.resolution

    @cached_property
    def dataset(self) -> Dataset:
        return open_dataset(self.data_path)

    def training_batches(
        self, batch_size: int, epoch: int, *, rank: int, world_size: int
    ) -> TrainBatches:
        """This worker's augmented part of every batch of `epoch`."""
        return train_batches(
            self.dataset,
            self._split[0],
            self.job.data,
            resolution=self.resolution,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=self.job.seed,
            epoch=epoch,
        )

    def calibration(self, num_images: int) -> np.ndarray:
        """Un-augmented training images for BN recalibration; all if there are fewer."""
        if num_images not in self._calibrations:
            chosen = calibration_subset(self._split[0], num_images, self.job.seed)
            self._calibrations[num_images] = self._cached("train", chosen)[0]
        return self._calibrations[num_images]

    @cached_property
    def holdout(self) -> Images:
        """What subnets and recipes compete on."""
        return self._cached("train", self._split[1])

    @cached_property
    def validation(self) -> Images:
        """The validation folder: for final reports only."""
        return self.first_validation(self.dataset.num("val"))

    def first_validation(self, num_images: int) -> Images:
        """The first images of the validation folder, or all if there are fewer."""
        return self._cached("val", np.arange(min(self.dataset.num("val"), num_images)))

    @cached_property
    def _calibrations(self) -> dict[int, np.ndarray]:
        return {}  # by their number of images; opening them takes reading them

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        return holdout_split(
            self.dataset.labels("train"),
            self.job.data.holdout_per_class,
            self.job.seed,
            self.dataset.classes,
        )

    def _cached(self, split: str, indices: np.ndarray) -> Images:
        return cached_images(
            self.dataset,
            split,
            indices,
            resolution=self.resolution,
            folder=default_folder(),
        )
