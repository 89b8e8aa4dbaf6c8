"""From decoded images to uint8 tensors: augmentation, the evaluation crop.

Images stay uint8 until they are on the device, where normalize() runs, so batches and caches
are four times smaller. Augmentation is a pure function of the image and a seed. It draws what
torchvision's RandomResizedCrop, RandomHorizontalFlip and ColorJitter draw from the same seed, but
from a generator of its own. torchvision itself is not used: it loads torch's compiler, which takes
each loader process seconds and 150 MB.
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image

from nasray.config import DataConfig
from nasray.data.crop import MEAN, STD, eval_box, eval_crop, is_giant
from nasray.data.decoding import Picture

# Principal components of ImageNet's RGB values (Krizhevsky et al., 2012), 0..255 scale.
EIGENVALUES = torch.tensor([55.46, 4.794, 1.148])
EIGENVECTORS = torch.tensor(  # (RGB, component)
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

RATIO = (3 / 4, 4 / 3)  # width / height of the training crop
LOG_RATIO = torch.tensor(RATIO).log().tolist()

EVAL_VERSION = 2  # of the pixels that `eval_transform` gives; caches of other versions are stale


def train_transform(config: DataConfig, resolution: int) -> Callable[[Picture, int], torch.Tensor]:
    """Return augment(picture, seed) -> uint8 tensor (3, resolution, resolution)."""
    return partial(_augment, config, resolution)


def _augment(config: DataConfig, resolution: int, picture: Picture, seed: int) -> torch.Tensor:
    # All draws, in torchvision's order, before any pixel is computed.
    generator = torch.Generator().manual_seed(seed)
    box = _draw_box(_size(picture), config.min_crop_area, generator)
    mirrored = torch.rand(1, generator=generator).item() < 0.5 and config.flip
    order = torch.randperm(4, generator=generator).tolist()  # 3 would be the hue
    jitter = config.color_jitter
    factors = [
        _uniform(max(0, 1 - jitter), 1 + jitter, generator) for _ in range(3 if jitter else 0)
    ]
    amounts = torch.randn(3, generator=generator) * config.lighting

    image = _scaled(_cropped(picture, *box), resolution, resolution)
    planes = image.to(torch.float32, memory_format=torch.contiguous_format)
    for index in order:
        if index < len(factors):
            JITTERS[index](planes, factors[index])
            if factors[index] > 1:  # only then can a level leave the range
                planes.clamp_(0, 255)
            planes.floor_()
    # All along the principal components of ImageNet's colors.
    planes.add_((EIGENVECTORS @ (amounts * EIGENVALUES))[:, None, None]).round_().clamp_(0, 255)
    image = planes.to(torch.int16).to(torch.uint8)  # four times as fast as in one step
    return image.flip(-1) if mirrored else image


def _draw_box(
    size: tuple[int, int], min_area: float, generator: torch.Generator
) -> tuple[int, int, int, int]:
    """Draw a part of an image of `size` (width, height): left, top, width, height.

    It is at least `min_area` of the image, with an aspect ratio in RATIO; if ten tries find none,
    the largest one at the center.
    """
    width, height = size
    for _ in range(10):
        area = width * height * _uniform(min_area, 1, generator)
        ratio = torch.empty(1).uniform_(*LOG_RATIO, generator=generator).exp_().item()
        columns, rows = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < columns <= width and 0 < rows <= height:
            top = torch.randint(height - rows + 1, (1,), generator=generator).item()
            left = torch.randint(width - columns + 1, (1,), generator=generator).item()
            return int(left), int(top), columns, rows
    ratio = min(max(width / height, RATIO[0]), RATIO[1])
    columns, rows = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (width - columns) // 2, (height - rows) // 2, columns, rows


def _uniform(low: float, high: float, generator: torch.Generator) -> float:
    return torch.empty(1).uniform_(low, high, generator=generator).item()


def _brightness(planes: torch.Tensor, factor: float) -> None:
    planes.mul_(factor)


def _contrast(planes: torch.Tensor, factor: float) -> None:
    # Sums of rows are exact in float32.
    mean = math.floor(_grey(planes).sum(1).mean(dtype=torch.float64).item() / planes.shape[2] + 0.5)
    planes.sub_(mean).mul_(factor).add_(mean)


def _saturation(planes: torch.Tensor, factor: float) -> None:
    grey = _grey(planes)
    planes.sub_(grey).mul_(factor).add_(grey)


# By torchvision's numbers. On float (3, height, width) in place: rounded down to whole levels, each
# gives what torchvision's ColorJitter gives with Pillow, in less than half the time.
JITTERS = (_brightness, _contrast, _saturation)


def _grey(planes: torch.Tensor) -> torch.Tensor:
    """Luma of whole levels (3, height, width), as Pillow rounds it: all sums are below 2^24."""
    red, green, blue = planes
    luma = (red * 19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return luma.add_(1 << 15).mul_(2.0**-16).floor_()


def eval_transform(resolution: int) -> Callable[[Picture], torch.Tensor]:
    """Return crop(picture) -> uint8 tensor (3, resolution, resolution)."""
    return partial(_center, resolution)


def _center(resolution: int, picture: Picture) -> torch.Tensor:
    if isinstance(picture, Image.Image):
        return torch.from_numpy(eval_crop(picture, resolution).copy())
    (width, height), (left, top) = eval_box(_size(picture), resolution)
    if is_giant((width, height)):
        return _center(resolution, Image.fromarray(picture.permute(1, 2, 0).numpy()))
    return _scaled(picture, width, height)[:, top : top + resolution, left : left + resolution]


def _size(picture: Picture) -> tuple[int, int]:
    """Return (width, height)."""
    if isinstance(picture, Image.Image):
        return picture.size
    return picture.shape[2], picture.shape[1]


def _cropped(picture: Picture, left: int, top: int, width: int, height: int) -> Picture:
    if isinstance(picture, Image.Image):
        return picture.crop((left, top, left + width, top + height))
    return picture[:, top : top + height, left : left + width]


def _scaled(picture: Picture, width: int, height: int) -> torch.Tensor:
    """Scale `picture` to uint8 (3, height, width), by Pillow or torch, whichever it belongs to."""
    if isinstance(picture, Image.Image):
        # A copy, because torch takes no read-only array.
        pixels = np.array(picture.resize((width, height), Image.Resampling.BILINEAR))
        return torch.from_numpy(pixels).permute(2, 0, 1)
    return torch.nn.functional.interpolate(
        picture[None], (height, width), mode="bilinear", align_corners=False, antialias=True
    )[0]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Turn uint8 images (n, 3, height, width) into the float32 input of a network.

    The result is channels last in memory: convolutions keep the format of their input, and
    these networks take about 1.5 times as long in the other one, on CPUs and GPUs alike.
    """
    mean, std = _statistics(images.device)
    planes = images.to(torch.float32).sub_(mean).div_(std)  # four times as fast as in channels last
    return planes.contiguous(memory_format=torch.channels_last)


@lru_cache
def _statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation on `device`; cached, as each copy to a GPU blocks the host."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (MEAN, STD))
    return mean, std


def resized(images: torch.Tensor, resolution: int) -> torch.Tensor:
    """Scale float images (n, 3, any, any) down to (n, 3, resolution, resolution)."""
    if images.shape[-1] == resolution:
        return images
    return torch.nn.functional.interpolate(
        images, (resolution, resolution), mode="bilinear", align_corners=False, antialias=True
    )
