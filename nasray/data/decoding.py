"""From encoded images to upright RGB pictures, by Pillow or by torchcodec.

Pillow is the reference: it decides at the import which images are readable, and decodes what
torchcodec cannot. Without torchcodec, torch is not imported.
"""

import io
import struct
import zlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from PIL import Image

from nasray.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

DEFAULT_DECODER = "pillow"
Picture: TypeAlias = "Image.Image | torch.Tensor"  # a tensor is uint8 (3, height, width), RGB

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


def make_decoder(name: str) -> Callable[[bytes], Picture]:
    """Return the function that decodes images for `data.decoder` = `name`.

    Both give the same pictures, as far as the versions of libjpeg that they bring along agree. With
    "torchcodec", plain JPEGs are tensors; all others, and those that it refuses, go to Pillow.

    Raises:
        UserError: torchcodec is not installed, or does not work here.
    """
    if name == DEFAULT_DECODER:
        return decode
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"data.decoder = {name!r}: {first_line(error)}; "
            "`pip install 'torchcodec>=0.17'` on every node, or set it to \"pillow\""
        ) from None
    return partial(_decode_with, decode_jpeg)


def _decode_with(decode_jpeg: Callable[..., Any], image: bytes) -> Picture:
    import torch

    with Image.open(io.BytesIO(image)) as picture:  # reads the header only
        is_plain = picture.format == "JPEG" and picture.mode in ("RGB", "L")
        # The two find the orientation in different places, such as XMP.
        if is_plain and picture.getexif().get(ORIENTATION_TAG, 1) == 1:
            try:
                # A copy, because torch warns of a buffer that cannot be written.
                pixels: torch.Tensor = decode_jpeg(
                    torch.frombuffer(bytearray(image), dtype=torch.uint8)
                )
                return pixels
            except RuntimeError:  # Pillow may read it all the same
                pass
    return decode(image)


def decode(image: bytes) -> Image.Image:
    """Decode an image of any mode to RGB, and turn it upright.

    Raises:
        One of UNDECODABLE: the file is damaged or no image.
    """
    with Image.open(io.BytesIO(image)) as picture:
        picture.load()  # the whole file, and with it a PNG's late EXIF
        orientation = picture.getexif().get(ORIENTATION_TAG)
        rgb = picture if picture.mode == "RGB" else _to_rgb(picture)
    return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey; convert() would clip it, not scale it
        grey = np.asarray(picture).astype(np.float64) / 257  # 65535 = 255 * 257
        picture = Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))
    if picture.mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # transparency per colour warns otherwise
    return picture.convert("RGB")  # CMYK of JPEG: Pillow undid Adobe's inversion
