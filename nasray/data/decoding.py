"""From encoded images to upright RGB pictures, by Pillow or by torchcodec.

Pillow is the reference: it decides at the import which images are readable, and decodes what
torchcodec cannot. Without torchcodec, torch is not imported.
"""

import io
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from PIL import Image, ImageCms, ImageColor, ImageFile, PngImagePlugin

from nasray.errors import UserError, first_line

if TYPE_CHECKING:
    import torch

DEFAULT_DECODER = "pillow"
DEFAULT_BACKGROUND = "white"
Picture: TypeAlias = "Image.Image | torch.Tensor"  # a tensor is uint8 (3, height, width), RGB

# Colour profiles and texts of more than 1 MB are legal, and scanners write them.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 256 << 20

# The usual formats are tried first. Left out: those that Pillow only identifies, and those that it
# hands to other programs; and last, those that are told by no signature at their beginning.
FIRST_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM")
NO_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
UNSIGNED_FORMATS = ("IM", "IMT", "PCD", "SPIDER", "TGA")

# A grey picture of integers or floats is scaled by the smallest usual depth that holds its largest
# value: 12 bits in a file of 16, 1 for floats up to 1.
DEPTHS = (1, 2, 4, 8, 10, 12, 14, 16, 24, 32)  # bits

Opaque = tuple[Image.Image, "np.ndarray | None"]  # RGB, and its alpha (height, width), 0..255

# What is worth a word about a picture that is readable.
FRAMES = "has several frames or pages, of which the first is taken"
TRANSPARENT = "has transparent pixels, which show data.background"
SCALED = "has integers or floats, scaled by the bits that its largest value needs"

# Tags of TIFF.
SAMPLE_FORMAT, PHOTOMETRIC, PLANAR, BITS, COMPRESSION = 339, 262, 284, 258, 259
UNSIGNED, SIGNED = 1, 2  # of SAMPLE_FORMAT
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


class Undecodable(ValueError):
    """An image that is damaged, or whose pixels have no meaning; the message says why."""


def make_decoder(name: str, background: str = DEFAULT_BACKGROUND) -> Callable[[bytes], Picture]:
    """Return the function that decodes images for `data.decoder` = `name`.

    Transparent pixels show `background`, a colour as Pillow names it. Both decoders give the same
    pictures, as far as the versions of libjpeg that they bring along agree. With "torchcodec",
    plain JPEGs are tensors; all others, and those that it refuses, go to Pillow.

    Raises:
        UserError: torchcodec is not installed, or does not work here.
    """
    by_pillow = partial(decode, background=background)
    if name == DEFAULT_DECODER:
        return by_pillow
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"data.decoder = {name!r}: {first_line(error)}; "
            "`pip install 'torchcodec>=0.17'` on every node, or set it to \"pillow\""
        ) from None
    return partial(_decode_with, decode_jpeg, by_pillow)


def _decode_with(
    decode_jpeg: Callable[..., Any], by_pillow: Callable[[bytes], Picture], image: bytes
) -> Picture:
    import torch

    with Image.open(io.BytesIO(image), formats=formats()) as picture:  # reads the header only
        is_plain = picture.format == "JPEG" and picture.mode in ("RGB", "L")
        # The two find the orientation in different places, such as XMP.
        if is_plain and _orientation(picture) in (None, 1):
            try:
                # A copy, because torch warns of a buffer that cannot be written.
                pixels: torch.Tensor = decode_jpeg(
                    torch.frombuffer(bytearray(image), dtype=torch.uint8)
                )
                return pixels
            except RuntimeError:  # Pillow may read it all the same
                pass
    return by_pillow(image)


def decode(image: bytes, background: str = DEFAULT_BACKGROUND) -> Image.Image:
    """Decode an image of any mode to RGB on `background`, and turn it upright.

    Raises:
        Undecodable: the file is damaged or no image, or its values are not finite.
    """
    return _decode(image, background)[0]


def decode_with_notes(
    image: bytes, background: str = DEFAULT_BACKGROUND
) -> tuple[Image.Image, list[str]]:
    """Decode as decode() does, and say what is worth a word: FRAMES, SCALED, TRANSPARENT."""
    picture, notes = _decode(image, background)
    return picture, [FRAMES, *notes] if _has_frames(image) else notes


def _decode(image: bytes, background: str) -> tuple[Image.Image, list[str]]:
    ground = ImageColor.getrgb(background)
    try:
        with Image.open(io.BytesIO(image), formats=formats()) as picture:
            notes: list[str] = []
            rawmode = _rawmode(picture)  # which load() forgets
            _refuse_misread(picture, image)
            picture.load()  # the whole file, and with it a PNG's late EXIF
            orientation = _orientation(picture)
            wide = _wide(picture, rawmode, image)
            alpha = None
            if wide is not None:
                notes += [SCALED] if wide.max() < 1 << 14 else []
                rgb, alpha = _from_wide(wide, picture.info.get("transparency"))
            elif picture.mode[0] in "IF" or _tag(picture, SAMPLE_FORMAT) == SIGNED:
                notes += [SCALED] if picture.format != "PPM" else []
                rgb, alpha = _from_values(picture)
            elif picture.has_transparency_data:
                rgb, alpha = _from_transparent(picture, rawmode)
            else:
                rgb = picture if picture.mode == "RGB" else _to_rgb(picture)
            if alpha is not None and alpha.min(initial=255) < 255:
                notes.append(TRANSPARENT)
                opaque, rgb = rgb, Image.new("RGB", rgb.size, ground)
                rgb.paste(opaque, mask=Image.fromarray(alpha.astype(np.uint8)))
            if 0 in rgb.size:
                raise Undecodable("has no pixels")
        return rgb.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else rgb, notes
    except (MemoryError, Undecodable):
        raise
    except Image.UnidentifiedImageError:
        raise Undecodable(_what_it_is(image)) from None
    except Exception as error:  # Pillow's decoders raise of all kinds on damaged files
        raise Undecodable(first_line(error)) from error


def _refuse_misread(picture: ImageFile.ImageFile, image: bytes) -> None:
    """Refuse the kinds of TIFF that Pillow reads without an error, and wrongly.

    Raises:
        Undecodable: it is one of them.
    """
    bits, is_packed = _tag(picture, BITS) or 1, _tag(picture, COMPRESSION) not in (None, 1)
    if _tag(picture, PLANAR) == 2 and (bits > 8 or (picture.mode == "LA" and is_packed)):
        raise Undecodable(f"has planes of {bits} bits, which Pillow misreads; interleave them")
    is_number = picture.mode in ("I", "F") or _tag(picture, SAMPLE_FORMAT) == SIGNED
    if picture.format == "TIFF" and image[:2] == b"MM" and is_packed and is_number and bits > 8:
        raise Undecodable(
            f"is a compressed TIFF of {bits} bits in big-endian order, which Pillow misreads; save "
            "it without compression or in little-endian order"
        )


def _orientation(picture: Image.Image) -> int | None:
    """EXIF's orientation; None where there is none, or the EXIF data are malformed."""
    try:
        return picture.getexif().get(ORIENTATION_TAG)
    except Exception:  # Pillow raises of all kinds
        return None


@cache
def formats() -> list[str]:
    """The names of the formats that are read, in the order in which they are tried."""
    Image.init()
    others = sorted(set(Image.OPEN) - NO_FORMATS - {*FIRST_FORMATS, *UNSIGNED_FORMATS})
    return [name for name in (*FIRST_FORMATS, *others, *UNSIGNED_FORMATS) if name in Image.OPEN]


def _what_it_is(image: bytes) -> str:
    """Say why no format of Pillow's knows `image`."""
    if not any(image):
        return "holds zero bytes only" if image else "is empty"
    if image[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return (
            "a TIFF that is cut short, or of a kind that Pillow does not read; save it again, with "
            "8 bits a channel"
        )
    if image.startswith(b"\x89PNG"):
        return "a damaged PNG; save it again"
    return f"no image that Pillow reads, it begins with {image[:24]!r}"


def _has_frames(image: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(image), formats=formats()) as picture:
            # The other formats of several frames keep previews, layers or sizes of one picture.
            several = picture.format in ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
            return several and getattr(picture, "is_animated", False)
    except Exception:  # the second is damaged, and not used
        return False


def _rawmode(picture: ImageFile.ImageFile) -> str:
    """How the samples lie in the file, in Pillow's words: "RGB;16B"; "" if they are not raw."""
    args = picture.tile[0][3] if picture.tile else ""
    first = args[0] if isinstance(args, tuple) and args else args
    return first if isinstance(first, str) else ""


def _tag(picture: Image.Image, number: int) -> Any:
    """The first value of a TIFF's tag; None of other formats."""
    value = picture.tag_v2.get(number) if picture.format == "TIFF" else None  # type: ignore[attr-defined]
    return value[0] if isinstance(value, tuple) else value


def _wide(picture: Image.Image, rawmode: str, image: bytes) -> np.ndarray | None:
    """The samples of a picture with several channels of 16 bits: uint16 (height, width, channels).

    None for others. Pillow keeps the upper bytes, which are black if a camera gave 12 bits; the
    lower ones come from reading the file again in the other byte order.
    """
    channels, _, depth = rawmode.partition(";")
    if picture.format not in ("PNG", "TIFF") or channels not in ("LA", "RGB", "RGBA", "RGBX"):
        return None
    if not depth.startswith("16"):
        return None
    swapped = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}
    other = "RGBA" if channels == "LA" else f"{channels};{swapped[depth]}"
    with Image.open(io.BytesIO(image), formats=[str(picture.format)]) as again:
        make_tile = getattr(ImageFile, "_Tile", lambda *parts: parts)  # a tuple up to Pillow 10
        again.tile = [
            make_tile(*tile[:3], (other, *tile[3][1:]) if isinstance(tile[3], tuple) else other)
            for tile in again.tile
        ]
        again.load()
        lower = np.asarray(again)
    if channels == "LA":  # all four bytes
        return np.ascontiguousarray(lower).view(">u2").astype(np.uint16)
    return np.asarray(picture).astype(np.uint16) << 8 | lower


def _from_wide(wide: np.ndarray, key: Any) -> Opaque:
    has_alpha = wide.shape[-1] in (2, 4)
    levels = _levels(wide[..., :-1] if has_alpha else wide)
    rgb = Image.fromarray(np.broadcast_to(levels, (*wide.shape[:2], 3)).copy())
    if has_alpha:
        # Alpha is of 16 bits, unless its largest value is that of fewer.
        alpha = wide[..., -1]
        most = float(alpha.max(initial=0))
        of_fewer_bits = most in [2.0**bits - 1 for bits in DEPTHS if bits >= 8]
        return rgb, _levels(alpha, most if of_fewer_bits else 65535)
    return rgb, None if key is None else np.where((wide == key).all(-1), 0, 255)


def _from_values(picture: Image.Image) -> Opaque:
    """Scale grey integers and floats to RGB."""
    values, kind = np.asarray(picture), _tag(picture, SAMPLE_FORMAT)
    if picture.mode == "L":
        values = values.view(np.int8)
    elif picture.mode == "I" and kind == UNSIGNED:
        values = values.view(np.uint32)  # Pillow keeps them as signed ones
    # Pillow has scaled those of a PPM from the range that its header gives.
    largest = 65535.0 if picture.format == "PPM" and picture.mode == "I" else None
    if kind == SIGNED and largest is None:
        own = 2.0 ** (_tag(picture, BITS) - 1) - 1  # one bit is the sign
        largest = own if own / 2 < values.max(initial=0) and values.min(initial=0) >= 0 else None
    levels = _levels(values, largest)
    if picture.mode[0] in "IF" and _tag(picture, PHOTOMETRIC) == 0:
        levels = 255 - levels  # zero is white
    rgb, key = Image.fromarray(levels).convert("RGB"), picture.info.get("transparency")
    return rgb, None if key is None else np.where(values == key, 0, 255)


def _levels(values: np.ndarray, largest: float | None = None) -> np.ndarray:
    """Scale samples to 0..255, from 0..`largest`, or from a range that holds them; uint8.

    That is the one of the smallest of DEPTHS. It is their own if samples are negative, or the
    largest is so small a part of that one that the picture would be black.

    Raises:
        Undecodable: a sample is not finite.
    """
    # Of 16 bits, float32 gives the same levels in half the memory.
    values = values.astype(np.float32 if values.dtype.itemsize <= 2 else np.float64)
    if not np.isfinite(values).all():
        raise Undecodable("holds values that are not finite")
    low, high = float(min(values.min(initial=0), 0)), float(values.max(initial=0))
    if largest is None:
        ranges = [2.0**bits - 1 for bits in DEPTHS if 2.0**bits - 1 >= high]
        is_within = ranges and not low and high > ranges[0] / 16
        largest = ranges[0] if is_within else (high - low) or 1
    return ((values - low) / largest * 255).round().astype(np.uint8)


def _from_transparent(picture: Image.Image, rawmode: str) -> Opaque:
    key: Any = picture.info.get("transparency")
    if picture.mode in ("1", "L", "RGB") and not isinstance(key, bytes):  # one colour of a PNG
        pixels = np.asarray(picture.convert("L") if picture.mode == "1" else picture)
        if rawmode in ("L;2", "L;4"):  # Pillow scales the pixels, but not this
            key = key * 255 // (3 if rawmode == "L;2" else 15)
        elif picture.mode == "1":
            key = 255 if key else 0
        same = pixels == key
        return picture.convert("RGB"), np.where(same.all(-1) if same.ndim == 3 else same, 0, 255)
    rgba = picture.convert("RGBA")
    return rgba.convert("RGB"), np.asarray(rgba.getchannel("A"))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        to_srgb = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
        return cast(Image.Image, ImageCms.applyTransform(picture, to_srgb))
    return picture.convert("RGB")  # CMYK of JPEG: Pillow undid Adobe's inversion
