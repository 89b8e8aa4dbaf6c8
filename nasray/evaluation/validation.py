"""What a trained network says of the validation and the hold-out images. Plain torch."""

import io

import numpy as np
import pyarrow as pa
from PIL import Image
from torch import nn

from nasray.data.splits import JobImages
from nasray.evaluation.evaluate import correct_mask, predictions
from nasray.search.scores import FITNESS, Predictions

# Kept of the images that the network is most sure about and wrong; the longer side in pixels.
MOST_THUMBNAILS, THUMBNAIL_SIDE = 24, 112


def on_validation(subnet: nn.Module, images: JobImages, device: str) -> Predictions:
    """What `subnet`, which is on `device`, says of each validation image."""
    pixels, labels = images.validation
    predicted, probability = predictions(
        subnet.eval(), pixels, batch_size=images.job.search.batch_size, device=device
    )
    split, rows = images.parts.validation_split, images.parts.validation
    names = images.dataset.column(split, "name").take(pa.array(rows)).to_pylist()
    said = Predictions(
        classes=images.dataset.classes,
        names=names,
        labels=labels,
        predicted=predicted,
        probability=probability,
        thumbnails=[None] * len(labels),
    )
    for row in said.most_confident_errors(MOST_THUMBNAILS).tolist():
        said.thumbnails[row] = _thumbnail(pixels[row])
    return said


def _thumbnail(pixels: np.ndarray) -> bytes:
    """A JPEG of what the network sees, uint8 (3, side, side)."""
    picture, buffer = Image.fromarray(pixels.transpose(1, 2, 0)), io.BytesIO()
    picture.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    picture.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def on_holdout(subnet: nn.Module, images: JobImages, device: str) -> dict[str, float | None]:
    """How good `subnet`, on `device`, is on the hold-out: top-1, and balanced if asked for."""
    pixels, labels = images.holdout
    config = images.job.search
    correct = correct_mask(
        subnet.eval(), pixels, labels, batch_size=config.batch_size, device=device
    )
    names = dict.fromkeys(("top1", config.accuracy))
    return {f"holdout_{name}": FITNESS[name].of(correct, labels) for name in names}
