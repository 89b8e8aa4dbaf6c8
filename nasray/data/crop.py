"""The evaluation crop of a Pillow image, and the numbers that describe it. Imports no torch."""

import math

import numpy as np
from PIL import Image

# ImageNet, RGB, on the 0..255 scale.
MEAN = (123.68, 116.779, 103.939)
STD = (58.393, 57.12, 57.375)

EVAL_CROP = 0.875  # side of the evaluation crop, of the short side
MOST_PIXELS = 1 << 22  # of a whole scaled image; of a longer one, only the square is computed
LONG = 16  # times its short side: a picture of which little is cut out
RESAMPLING = Image.Resampling.BILINEAR  # widened by the factor by which it scales down


def short_side(resolution: int) -> int:
    """The pixels to which the short side is scaled before a square of `resolution` is cut out."""
    return math.ceil(resolution / EVAL_CROP)


def eval_box(
    size: tuple[int, int], resolution: int, short: int | None = None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """How an image of `size`, (width, height), is cropped, its short side scaled to `short`.

    Returns the size that it is scaled to, and the left and upper edge of the square there.
    """
    short = short or short_side(resolution)
    width, height = (int(short * side / min(size)) for side in size)
    return (width, height), (round((width - resolution) / 2), round((height - resolution) / 2))


def eval_crop(picture: Image.Image, resolution: int, short: int | None = None) -> np.ndarray:
    """Scale and crop an RGB image as eval_box() says: uint8 (3, resolution, resolution)."""
    size, (left, top) = eval_box(picture.size, resolution, short)
    if is_giant(size):
        return _cropped_first(picture, size, left, top, resolution).transpose(2, 0, 1)
    scaled = np.asarray(picture.resize(size, RESAMPLING))
    return scaled[top : top + resolution, left : left + resolution].transpose(2, 0, 1)


def is_giant(size: tuple[int, int]) -> bool:
    """Whether an image of `size` should not be held as a whole, only to cut a square out of it."""
    return size[0] * size[1] > MOST_PIXELS and max(size) > LONG * min(size)


def _cropped_first(
    picture: Image.Image, size: tuple[int, int], left: int, top: int, resolution: int
) -> np.ndarray:
    """The square that picture.resize(size) has at (left, top), its long axis scaled there only.

    uint8 (resolution, resolution, 3). Pillow scales the width first, unless a tall picture shrinks,
    and so does this: both round to whole levels.
    """
    square = slice(top, top + resolution), slice(left, left + resolution)
    pixels = np.asarray(picture)
    if size[0] > size[1]:
        band = _scaled_part(pixels.transpose(1, 0, 2), size[0], left, resolution)
        part = Image.fromarray(band.transpose(1, 0, 2)).resize((resolution, size[1]), RESAMPLING)
        return np.asarray(part)[square[0]]
    if size[1] < picture.height:
        band = _scaled_part(pixels, size[1], top, resolution)
        part = Image.fromarray(band).resize((size[0], resolution), RESAMPLING)
        return np.asarray(part)[:, square[1]]
    part = picture.resize((size[0], picture.height), RESAMPLING)
    return _scaled_part(np.asarray(part), size[1], top, resolution)[:, square[1]]


def _scaled_part(lines: np.ndarray, length: int, start: int, number: int) -> np.ndarray:
    """Lines `start` to `start + number` of what Pillow's BILINEAR gives for `length` lines.

    `lines` are uint8 (n, any, 3). To the bit: its weights are whole numbers of 2^-22.
    """
    scale = len(lines) / length
    support = max(scale, 1.0)
    scaled = []
    for position in range(start, start + number):
        center = (position + 0.5) * scale
        low, high = max(0, int(center - support + 0.5)), int(center + support + 0.5)
        near = lines[low:high].astype(np.int64)
        distances = (np.arange(low, low + len(near)) - center + 0.5) * (1 / support)
        weights = np.maximum(1 - abs(distances), 0)
        fixed = (weights / weights.sum() * (1 << 22) + 0.5).astype(np.int64)
        scaled.append((np.tensordot(fixed, near, 1) + (1 << 21)) >> 22)
    return np.stack(scaled).astype(np.uint8)
