"""Which images of a data set a job uses for training, hold-out, calibration and validation.

Search never sees the validation folder: subnets are evaluated on a hold-out of the training
images, and calibrated on the others (docs/spec.md, OneShot 6.4).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nasray.config import Job
from nasray.data.cache import cached_images
from nasray.data.loader import TrainBatches, calibration_subset, holdout_split, train_batches
from nasray.data.shards import Dataset, open_dataset
from nasray.storage.files import cache_folder

Images = tuple[np.ndarray, np.ndarray]  # uint8 (n, 3, height, width), int64 labels (n,)


@dataclass(frozen=True)
class JobImages:
    """The images of one job's data set, at that job's resolution or `other_resolution`, pixels."""

    job: Job
    data_path: str
    other_resolution: int | None = None

    @property
    def resolution(self) -> int:
        """The resolution of all images that this object returns, pixels."""
        return self.other_resolution or self.job.space.resolution

    @cached_property
    def dataset(self) -> Dataset:
        """The imported data set.

        Raises:
            UserError: there is none at `data_path`.
        """
        return open_dataset(self.data_path)

    def training_batches(
        self, batch_size: int, epoch: int, *, rank: int, world_size: int
    ) -> TrainBatches:
        """Return this worker's part of every augmented batch of `epoch`."""
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
        """Return training images for BN recalibration, not augmented; all if there are fewer.

        They are uint8 (num_images, 3, resolution, resolution).
        """
        if num_images not in self._calibrations:
            chosen = calibration_subset(self._split[0], num_images, self.job.seed)
            self._calibrations[num_images] = self._cached("train", chosen)[0]
        return self._calibrations[num_images]

    @cached_property
    def holdout(self) -> Images:
        """The training images set aside to evaluate subnets and training recipes on."""
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
            decoder=self.job.data.decoder,
            folder=cache_folder(),
        )
