"""What the import records of each decoded image, to find doubles and odd sizes by."""

import zlib
from typing import NamedTuple

import numpy as np
from PIL import Image

NOISE = 2  # levels of brightness, by which encodings of an even ground differ


class Look(NamedTuple):
    """What the import records of a decoded image."""

    picture: int  # equal for equal pixels
    gradients: bytes  # 256 bits, few of which differ between two encodings of one picture
    width: int  # pixels
    height: int


def look_at(image: Image.Image) -> Look:
    """Describe an RGB image by its size, a hash of its pixels, and a difference hash.

    The bits of the latter say where brightness grows from left to right, in 16 rows of 17 fields.
    """
    pixels = image.tobytes()
    hashes = zlib.crc32(pixels, image.width).to_bytes(4) + zlib.adler32(pixels).to_bytes(4)
    small = np.asarray(image.resize((17, 16), Image.Resampling.BOX).convert("L")).astype(int)
    grows = np.packbits(small[:, 1:] > small[:, :-1] + NOISE).tobytes()
    return Look(int.from_bytes(hashes, signed=True), grows, *image.size)
