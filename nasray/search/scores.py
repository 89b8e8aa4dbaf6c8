"""How good predicted classes are: top-1, each class by itself, and the mean over the classes.

Also the file of the predictions for the validation images, which the report shows.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nasray.errors import UserError
from nasray.storage import files as storage


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What a network says of n images of known classes.

    A label is a position among `classes`; so is a prediction, or -1 where the network's outputs
    are not finite.
    """

    classes: tuple[str, ...]
    names: list[str]  # of the images, in the source of the data set
    labels: np.ndarray  # int64 (n,)
    predicted: np.ndarray  # int64 (n,)
    probability: np.ndarray  # float32 (n,), of the predicted class
    thumbnails: list[bytes | None]  # JPEG, of the most confident errors

    @property
    def correct(self) -> np.ndarray:
        """Which are right: bool (n,)."""
        return self.predicted == self.labels

    @property
    def top1(self) -> float:
        """The fraction that is right."""
        return top1(self.correct, self.labels)

    @property
    def balanced_top1(self) -> float:
        """The mean of the top-1 of each class."""
        return balanced_top1(self.correct, self.labels)

    def confusion(self, shown: np.ndarray) -> np.ndarray:
        """How many images of class shown[i] are taken for class shown[j]: int64 (n, n).

        `shown` are labels, sorted. Not of all classes at once, of which there may be 20,000.
        """
        both = np.isin(self.labels, shown) & np.isin(self.predicted, shown)
        rows, columns = (np.searchsorted(shown, x[both]) for x in (self.labels, self.predicted))
        number = len(shown)
        return np.bincount(rows * number + columns, minlength=number**2).reshape(number, number)

    def confused_pairs(self) -> np.ndarray:
        """The pairs of different classes that are confused, the most frequent first.

        Rows of the label, the prediction, and the number of images: int64 (pairs, 3).
        """
        wrong = ~self.correct & (self.predicted >= 0)
        pairs = np.stack([self.labels[wrong], self.predicted[wrong]], axis=1)
        found, counts = np.unique(pairs, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return np.concatenate([found, counts[:, None]], axis=1)[order]

    def most_confident_errors(self, number: int) -> np.ndarray:
        """Positions of up to `number` wrong images, the greatest probability first."""
        wrong = np.flatnonzero(~self.correct & (self.predicted >= 0))
        return wrong[np.argsort(-self.probability[wrong], kind="stable")][:number]

    def write(self, path: str) -> None:
        """Write a Parquet file: a row for each image, the class names in the schema's metadata."""
        columns = {
            "name": pa.array(self.names, pa.string()),
            "label": pa.array(self.labels, pa.int32()),
            "predicted": pa.array(self.predicted, pa.int32()),
            "probability": pa.array(self.probability, pa.float32()),
            "thumbnail": pa.array(self.thumbnails, pa.binary()),
        }
        table = pa.table(columns, metadata={"classes": json.dumps(self.classes)})
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        storage.write(path, buffer.getvalue())

    @classmethod
    def read(cls, path: str) -> "Predictions":
        """Read what write() has written.

        Raises:
            UserError: it is damaged, or another file.
        """
        try:
            table = pq.read_table(io.BytesIO(storage.read(path)))
            return cls(
                classes=tuple(json.loads(table.schema.metadata[b"classes"])),
                names=table["name"].to_pylist(),
                labels=table["label"].to_numpy().astype(np.int64),
                predicted=table["predicted"].to_numpy().astype(np.int64),
                probability=table["probability"].to_numpy(),
                thumbnails=table["thumbnail"].to_pylist(),
            )
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: damaged ({error}); remove the file") from None


def by_class(correct: np.ndarray, labels: np.ndarray, number: int) -> tuple[np.ndarray, np.ndarray]:
    """The top-1 of each of `number` classes, NaN of one without images, and their images.

    Takes bool (n,) and int (n,); returns float64 and int64 (number,).
    """
    images = np.bincount(labels, minlength=number)
    right = np.bincount(labels, weights=correct, minlength=number)
    return np.divide(right, images, out=np.full(number, np.nan), where=images > 0), images


def top1(correct: np.ndarray, labels: np.ndarray) -> float:
    """The fraction of images that is right."""
    return float(correct.mean())


def balanced_top1(correct: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the top-1 of each class, over the classes that have images."""
    found, images = by_class(correct, labels, int(labels.max()) + 1)
    return float(found[images > 0].mean())


def mean_log_likelihood(scores: np.ndarray, labels: np.ndarray) -> float:
    """The mean of the log-probabilities of the right classes, (n,)."""
    return float(scores.mean(dtype=np.float64))


@dataclass(frozen=True)
class Fitness:
    """What a search may maximise on the hold-out images, and how its values are told."""

    title: str
    of: Callable[[np.ndarray, np.ndarray], float]  # the scores of n images and their labels
    scale: int = 100  # by which values are multiplied to be told
    unit: str = "%"
    unit_of_differences: str = "points"

    def text(self, value: float) -> str:
        """0.5 is "50.00 %"."""
        return f"{self.scale * value:.2f} {self.unit}"

    def difference(self, value: float) -> str:
        """0.012 is "1.2 points"."""
        digits = 1 if self.scale == 100 else 3
        return f"{self.scale * value:.{digits}f} {self.unit_of_differences}"


# By the value of search.fitness. The score of an image is whether it is right, or the
# log-probability of its class.
LOG_LIKELIHOOD = "log_likelihood"
FITNESS = {
    "top1": Fitness("top-1", top1),
    "balanced": Fitness("balanced top-1", balanced_top1),
    LOG_LIKELIHOOD: Fitness("log-likelihood", mean_log_likelihood, 1, "nats", "nats"),
}
