"""From encoded images to uint8 tensors: decoding, augmentation, the evaluation crop.

Images stay uint8 until they are on the device, where normalize() runs, so batches and caches
are four times smaller. Augmentation is a pure function of the image and a seed. torchvision is
imported in functions because it loads torch's compiler: an evaluator that finds its images
cached starts in two thirds of the time without them, and uses 150 MB less.
"""

import io
import math
import struct
import zlib
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np
import torch
from PIL import Image

from nasray.config import DataConfig

# ImageNet, RGB, on the 0..255 scale.
MEAN = (123.68, 116.779, 103.939)
STD = (58.393, 57.12, 57.375)

# Principal components of ImageNet's RGB values (Krizhevsky et al., 2012), 0..255 scale.
EIGENVALUES = torch.tensor([55.46, 4.794, 1.148])
EIGENVECTORS = torch.tensor(  # (RGB, component)
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
)

EVAL_VERSION = 1  # of the pixels that `eval_transform` gives; caches of other versions are stale
EVAL_CROP = 0.875  # side of the evaluation crop, of the short side

# The exceptions of Pillow's decoders on damaged files.
UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    LookupError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)

ORIENTATION_TAG = 0x0112  # EXIF
# ImageOps.exif_transpose does the same, but also writes all EXIF tags again, and raises if
# another one of them is malformed, as in many photographs.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(image: bytes) -> Image.Image:
    """Decode an image of any mode to RGB, and turn it upright.

    Raises:
        One of UNDECODABLE: the file is damaged or no image.
    """
    with Image.open(io.BytesIO(image)) as picture:
        picture.load()  # the whole file, and with it a PNG's late EXIF
        orientation = picture.getexif().get(ORIENTATION_TAG)
        rgb = _to_rgb(picture)
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey; convert() would clip it, not scale it
        grey = np.asarray(picture).astype(np.float64) / 257  # 65535 = 255 * 257
        picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # transparency per colour warns otherwise
    return picture.convert("RGB")  # CMYK of JPEG: Pillow undid Adobe's inversion


def train_transform(
    config: DataConfig, resolution: int
) -> Callable[[Image.Image, int], torch.Tensor]:
    """Return augment(picture, seed) -> uint8 tensor (3, resolution, resolution)."""
    from torchvision.transforms import v2

    jitter = config.color_jitter
    steps = [
        v2.RandomResizedCrop(
            resolution, scale=(config.min_crop_area, 1), ratio=(3 / 4, 4 / 3), antialias=True
        ),
        v2.RandomHorizontalFlip(p=0.5 if config.flip else 0),
        v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter),
        v2.PILToTensor(),
    ]
    return partial(_augment, v2.Compose(steps), config.lighting)


def _augment(
    steps: Callable[[Image.Image], torch.Tensor], lighting: float, picture: Image.Image, seed: int
) -> torch.Tensor:
    # torchvision draws from torch's global generator. It is seeded and restored around the
    # call, so that the result depends on the seed only, and no other draw changes.
    # (torch.manual_seed would also reseed the GPUs, which fork_rng does not restore.)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        image = steps(picture)
        if lighting:
            image = _light(image, torch.randn(3) * lighting)
    return image


def _light(image: torch.Tensor, amounts: torch.Tensor) -> torch.Tensor:
    """Shift all pixels along the principal components of ImageNet's colours."""
    shift = EIGENVECTORS @ (amounts * EIGENVALUES)
    return (image + shift[:, None, None]).round_().clamp_(0, 255).to(torch.uint8)


def eval_transform(resolution: int) -> Callable[[Image.Image], torch.Tensor]:
    """Return crop(picture) -> uint8 tensor (3, resolution, resolution)."""
    from torchvision.transforms import v2

    steps = [
        v2.Resize([math.ceil(resolution / EVAL_CROP)], antialias=True),
        v2.CenterCrop([resolution, resolution]),
        v2.PILToTensor(),
    ]
    return v2.Compose(steps)


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
