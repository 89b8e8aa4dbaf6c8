"""The evaluation crop of a Pillow image, and the numbers that describe it. Imports no torch."""

import math

import numpy as np
from PIL import Image

# ImageNet, RGB, on the 0..255 scale.
MEAN = (123.68, 116.779, 103.939)
STD = (58.393, 57.12, 57.375)

EVAL_CROP = 0.875  # side of the evaluation crop, of the short side
RESAMPLING = Image.Resampling.BILINEAR  # widened by the factor by which it scales down


def short_side(resolution: int) -> int:
    """The pixels to which the short side is scaled before a square of `resolution` is cut out."""
    return math.ceil(resolution / EVAL_CROP)


def eval_box(size: tuple[int, int], resolution: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """How an image of `size`, (width, height), is cropped.

    Returns the size that it is scaled to, and the left and upper edge of the square there.
    """
    width, height = (int(short_side(resolution) * side / min(size)) for side in size)
    return (width, height), (round((width - resolution) / 2), round((height - resolution) / 2))


def eval_crop(picture: Image.Image, resolution: int) -> np.ndarray:
    """Scale and crop an RGB image: uint8 (3, resolution, resolution)."""
    size, (left, top) = eval_box(picture.size, resolution)
    scaled = np.asarray(picture.resize(size, RESAMPLING))
    return scaled[top : top + resolution, left : left + resolution].transpose(2, 0, 1)
