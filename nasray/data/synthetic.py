"""Source "synthetic": drawn pictures of coloured shapes, for demos without a download.

The class is the shape with its pattern. Position, size, angle, colours, background, light, blur
and clutter are random, and every shape covers the same area on average, so colour statistics
hardly predict the class. A shape is lighter than its background and roughly upright, so that a
small network learns the ten classes in a few hundred steps, not thousands.
"""

import io
from collections.abc import Callable, Iterator
from functools import cache, partial

import numpy as np
from PIL import Image, ImageFilter

from nasray.config import DataConfig
from nasray.data.source import SPLITS, Pictures, Record, shuffled

AREA = (0.15, 0.35)  # of the picture, covered by the shape
MIN_CONTRAST = 50.0  # between the luma of shape and background, 0..255
LUMA = np.array([0.299, 0.587, 0.114])
TURN = np.pi / 4  # either way
JPEG_QUALITY = 90

# A shape is a function of coordinates in about [-1, 1]: how far inside a point lies,
# negative outside, in the same unit.
Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def shapes(config: DataConfig, seed: int) -> Pictures:
    """List pictures of the first `num_classes` shapes; each is drawn when it is loaded."""
    classes = tuple(sorted(list(SHAPES)[: config.num_classes]))
    per_class = {"train": config.train_per_class, "val": config.val_per_class}

    def records() -> Iterator[Record]:
        for split in SPLITS:
            order = shuffled(per_class[split] * len(classes), seed, split)
            for position in order.tolist():
                label, number = divmod(position, per_class[split])
                name = classes[label]
                key = (seed, SPLITS.index(split), list(SHAPES).index(name), number)
                load = partial(draw, name, config.image_side, key)
                yield Record(split, label, f"{split}/{name}/{number:05d}.jpg", load)

    return Pictures(classes, len(classes) * sum(per_class.values()), records())


def draw(shape: str, side: int, key: tuple[int, ...]) -> bytes:
    """Draw a JPEG of `shape`, `side` pixels square; the same `key` gives the same bytes."""
    rng = np.random.default_rng(key)
    background_color, shape_color = _two_colors(rng)
    pixels = _background(background_color, side, rng)
    for _ in range(rng.integers(0, 5)):
        _paint_clutter(pixels, rng)
    color = _texture(shape_color, side, rng)
    mask = _shape_mask(shape, side, rng)[..., None]
    pixels += mask * (color - pixels)
    pixels *= _light(side, rng)
    pixels += rng.normal(0, rng.uniform(2, 12), pixels.shape)  # sensor noise
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, side / 64)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def _two_colors(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw two colours that can be told apart, the lighter one last."""
    colors = rng.uniform(20, 235, (16, 3))
    lumas = colors @ LUMA
    distances = abs(lumas[1:] - lumas[0])
    far = np.flatnonzero(distances >= MIN_CONTRAST)
    # The first that is far enough; the farthest of 15 if there is none.
    other = 1 + (far[0] if len(far) else distances.argmax())
    darker, lighter = (0, other) if lumas[0] < lumas[other] else (other, 0)
    return colors[darker], colors[lighter]


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return x and y of every pixel, in [-1, 1]."""
    axis = (np.arange(side) + 0.5) * 2 / side - 1
    return axis[None, :], axis[:, None]


def _background(color: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a gradient under smooth noise, (side, side, 3)."""
    x, y = _grid(side)
    slope_x, slope_y = rng.normal(0, 15, (2, 3))
    gradient = x[..., None] * slope_x + y[..., None] * slope_y
    return color + gradient + _smooth_noise(side, rng.uniform(5, 25), rng)


def _texture(color: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
    return color + _smooth_noise(side, rng.uniform(0, 20), rng)


def _smooth_noise(side: int, strength: float, rng: np.random.Generator) -> np.ndarray:
    cells = int(rng.integers(3, 13))
    coarse = rng.normal(0, strength, (cells, cells)).astype(np.float32)
    fine = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(fine)[..., None] * rng.uniform(0.5, 1, 3)


def _light(side: int, rng: np.random.Generator) -> np.ndarray:
    """Brighten one side of the scene and darken the other."""
    x, y = _grid(side)
    angle = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0, 0.3) * (np.cos(angle) * x + np.sin(angle) * y)
    return (rng.uniform(0.7, 1.2) * (1 + slope))[..., None]


def _paint_clutter(pixels: np.ndarray, rng: np.random.Generator) -> None:
    """Paint a soft ellipse, smaller than the shape, anywhere."""
    x, y = _grid(len(pixels))
    u, v = _turn(x - rng.uniform(-1, 1), y - rng.uniform(-1, 1), rng.uniform(0, np.pi))
    radius_u, radius_v = rng.uniform(0.06, 0.2, 2)
    depth = 1 - np.hypot(u / radius_u, v / radius_v)
    mask = (depth * rng.uniform(1.5, 6)).clip(0, 1)[..., None]
    pixels += mask * (rng.uniform(20, 235, 3) - pixels)


def _shape_mask(shape: str, side: int, rng: np.random.Generator) -> np.ndarray:
    """Draw how much of each pixel the shape covers, (side, side) in 0..1."""
    # Areas are out of the 4 of the whole square [-1, 1] x [-1, 1].
    scale = np.sqrt(4 * rng.uniform(*AREA) / _unit_area(shape))
    reach = max(0.0, 1 - scale * 1.05)  # keeps most of it inside the picture
    x, y = _grid(side)
    x, y = x - rng.uniform(-reach, reach), y - rng.uniform(-reach, reach)
    squeeze = rng.uniform(0.85, 1 / 0.85)
    u, v = _turn(x, y, rng.uniform(-TURN, TURN))
    depth = SHAPES[shape](u / scale * squeeze, v / scale / squeeze)
    return (depth * scale * side / 2 + 0.5).clip(0, 1)  # one pixel wide edge


@cache
def _unit_area(shape: str) -> float:
    return float(4 * np.mean(SHAPES[shape](*_grid(256)) > 0))


def _turn(x: np.ndarray, y: np.ndarray, angle: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = np.cos(angle), np.sin(angle)
    return cos * x + sin * y, cos * y - sin * x


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1 - np.hypot(x, y)


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return 1 - np.maximum(abs(x), abs(y))


def _polygon(x: np.ndarray, y: np.ndarray, num_sides: int) -> np.ndarray:
    angles = np.arange(num_sides) * 2 * np.pi / num_sides
    edges = [np.cos(angle) * x + np.sin(angle) * y for angle in angles]
    return np.cos(np.pi / num_sides) - np.max(edges, axis=0)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Within one of ten mirrored sectors, from a tip at radius 1 to a notch at 0.45.
    sector = np.pi / 5
    angle = np.abs((np.arctan2(y, x) + sector) % (2 * sector) - sector)
    radius = np.hypot(x, y)
    notch = 0.45 * np.array([np.cos(sector), np.sin(sector)])
    normal = np.array([notch[1], 1 - notch[0]]) / np.hypot(notch[1], 1 - notch[0])
    return normal[0] - normal[0] * radius * np.cos(angle) - normal[1] * radius * np.sin(angle)


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    long, short = np.maximum(abs(x), abs(y)), np.minimum(abs(x), abs(y))
    return np.minimum(1 - long, 0.32 - short)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    radius = np.hypot(x, y)
    return np.minimum(1 - radius, radius - 0.55)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_disc(x, y), np.hypot(x - 0.5, y) - 0.8)


def _rings(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_disc(x, y), np.cos(np.hypot(x, y) * 5 * np.pi) / 12)


def _stripes(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_disc(x, y), np.sin(x * 9) / 9)


def _checkers(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.minimum(_square(x, y), np.sin(x * 2 * np.pi) * np.sin(y * 2 * np.pi) / 6)


# In the order in which `num_classes` takes them.
SHAPES: dict[str, Field] = {
    "disc": _disc,
    "star": _star,
    "stripes": _stripes,
    "checkers": _checkers,
    "ring": _ring,
    "triangle": partial(_polygon, num_sides=3),
    "cross": _cross,
    "target": _rings,
    "crescent": _crescent,
    "square": _square,
}
