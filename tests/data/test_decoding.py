"""Decoding awkward files, by Pillow and by torchcodec."""

import io
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nasray.data.decoding import (
    FRAMES,
    SCALED,
    TRANSPARENT,
    Undecodable,
    decode,
    decode_with_notes,
    make_decoder,
)
from nasray.errors import UserError
from tests.data.test_transforms import FULLSIZE, encode, noise


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.array([[0, 257, 51400, 65535]], np.uint16)
    picture = decode(encode(Image.fromarray(grey), "PNG"))
    assert picture.mode == "RGB"
    assert np.asarray(picture)[0].tolist() == [[0] * 3, [1] * 3, [200] * 3, [255] * 3]


def test_a_cmyk_jpeg_keeps_its_colors():
    # Pillow writes them as Adobe does: inverted, with Adobe's marker.
    image = encode(Image.new("RGB", (16, 16), (250, 30, 20)).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in image and Image.open(io.BytesIO(image)).mode == "CMYK"
    assert np.allclose(np.asarray(decode(image)), (250, 30, 20), atol=6)


def test_a_palette_with_transparency_keeps_its_colors():
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    image = encode(picture, "PNG", transparency=b"\x00\xff")
    assert np.asarray(decode(image))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize(
    "mode, kind", [("L", "JPEG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG")]
)
def test_other_modes_become_rgb(mode, kind):
    picture = Image.new("L", (6, 5), 255).convert(mode)
    decoded = decode(encode(picture, kind))
    assert decoded.mode == "RGB" and decoded.size == (6, 5)
    assert np.asarray(decoded).min() > 250


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(values: np.ndarray, colours: int, bits: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of samples (height, width, channels), which Pillow cannot write in every depth."""
    height, width = values.shape[:2]
    planes = values.astype(">u2" if bits == 16 else "u1").reshape(height, -1)
    if bits < 8:
        planes = np.packbits(np.unpackbits(planes[..., None], axis=2)[..., -bits:], axis=None)
        planes = planes.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, bits, colours, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + line.tobytes() for line in planes))
    body = [(b"IHDR", header), *chunks, (b"IDAT", lines), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in body)


def tiff(
    values: np.ndarray,
    photometric: int = 1,
    kind: int = 1,
    order: str = "<",
    packed: bool = False,
    planar: int = 1,
) -> bytes:
    """An uncompressed or deflated TIFF of samples (height, width[, channels])."""
    height, width, channels = (*values.shape, 1)[:3]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    data = zlib.compress(data) if packed else data
    bits = values.dtype.itemsize * 8
    tags = [(256, [width]), (257, [height]), (258, [bits] * channels), (259, [8 if packed else 1])]
    tags += [(262, [photometric]), (273, [8]), (277, [channels]), (278, [height])]
    tags += [(279, [len(data)]), (284, [planar]), (339, [kind] * channels)]
    if channels in (2, 4) and photometric != 5:
        tags.insert(10, (338, [2]))
    start, entries, long = 8 + len(data), b"", b""
    for tag, numbers in tags:
        content = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            where = start + 6 + 12 * len(tags) + len(long)
            long, content = long + content, struct.pack(f"{order}I", where)
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers)) + content
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + long
    return magic + struct.pack(f"{order}I", start) + data + directory


def pixels(image: bytes, **options) -> list:
    return np.asarray(decode(image, **options))[0].tolist()


WHITE, BLACK, RED = [255] * 3, [0] * 3, [255, 0, 0]
RAMP = np.array([[0, 1, 2, 3]])
BLACK_AND_CLEAR = Image.merge("LA", [Image.new("L", (2, 1)), Image.fromarray(np.uint8([[255, 0]]))])
PALETTE_AND_CLEAR = Image.new("PA", (2, 1))
PALETTE_AND_CLEAR.putpalette(bytes(768))
PALETTE_AND_CLEAR.putalpha(BLACK_AND_CLEAR.getchannel("A"))
TWO = np.array([[0, 1]])
CLEAR = {  # pictures of a black pixel and a transparent one
    "LA PNG": encode(BLACK_AND_CLEAR, "PNG"),
    "RGBA PNG": encode(BLACK_AND_CLEAR.convert("RGBA"), "PNG"),
    "RGBA WebP": encode(BLACK_AND_CLEAR.convert("RGBA"), "WEBP", lossless=True),
    "RGBA TIFF": encode(BLACK_AND_CLEAR.convert("RGBA"), "TIFF"),
    "PA TIFF": encode(PALETTE_AND_CLEAR, "TIFF"),
    "palette PNG": png(TWO, 3, 8, (b"PLTE", bytes(6)), (b"tRNS", b"\xff\0")),
    "GIF": encode(BLACK_AND_CLEAR.convert("RGBA"), "GIF"),
    "grey key": png(TWO, 0, 8, (b"tRNS", struct.pack(">H", 1))),
    "grey key, 4 bits": png(TWO, 0, 4, (b"tRNS", struct.pack(">H", 1))),
    "grey key, 1 bit": png(TWO, 0, 1, (b"tRNS", struct.pack(">H", 1))),
    "grey key, 16 bits": png(TWO * 65535, 0, 16, (b"tRNS", b"\xff\xff")),
    "colour key": png(np.stack([TWO] * 3, 2), 2, 8, (b"tRNS", struct.pack(">HHH", 1, 1, 1))),
    "colour key, 16 bits": png(np.stack([TWO * 65535] * 3, 2), 2, 16, (b"tRNS", b"\xff" * 6)),
    "RGBA, 16 bits": png(np.uint16([[[0, 0, 0, 65535], [0] * 4]]), 6, 16),
    "LA, 16 bits": png(np.uint16([[[0, 65535], [0, 0]]]), 4, 16),
    "RGBA TIFF, 16 bits": tiff(np.uint16([[[0, 0, 0, 65535], [0] * 4]]), 2),
}


@pytest.mark.parametrize("kind", CLEAR)
def test_transparent_pixels_show_the_background(kind):
    assert pixels(CLEAR[kind]) == [BLACK, WHITE]
    assert pixels(CLEAR[kind], background="#ff0000") == [BLACK, RED]
    assert plain(make_decoder("pillow", "red")(CLEAR[kind]))[0].tolist() == [BLACK, RED]


def test_half_transparent_pixels_are_blended():
    picture = Image.new("RGBA", (1, 1), (200, 0, 0, 51))
    assert pixels(encode(picture, "PNG")) == [[244, 204, 204]]


U16, U32 = np.uint16(RAMP), np.uint32(RAMP)
GREYS = {  # the second is what the four levels 0 to 3 of each become
    "8 bits in 16": (png(U16 * 85, 0, 16), 85),
    "12 bits in 16": (png(U16 * 1365, 0, 16), 85),
    "16 bits": (png(U16 * 21845, 0, 16), 85),
    "a mask of two values": (png(U16 // 2, 0, 16), [0, 0, 255, 255]),
    "TIFF, 12 bits in 16": (tiff(U16 * 1365, order=">"), 85),
    "zero is white": (tiff(U16 * 21845, 0), [255, 170, 85, 0]),
    "signed 8 bits": (tiff(np.int8(RAMP * 60 - 90), 1, 2), 85),
    "signed 16 bits": (tiff(np.int16(RAMP * 1000 - 1024), 1, 2), 85),
    "signed 32 bits": (tiff(np.int32(RAMP * 85), 1, 2), 85),
    "unsigned 32 bits": (tiff(U32 * 1431655765), 85),
    "floats up to 1": (tiff(np.float32(RAMP / 3), 1, 3), 85),
    "floats up to 255": (tiff(np.float32(RAMP * 85), 1, 3, ">"), 85),
    "floats up to 65535": (tiff(np.float32(RAMP * 21845), 1, 3), 85),
    "floats up to 0.001": (tiff(np.float32(RAMP / 3000), 1, 3), 85),
    "integers of 17 bits": (tiff(np.int32(RAMP * 43691), 1, 2), 85),
    "floats round zero": (tiff(np.float32(RAMP / 3 - 0.5), 1, 3), 85),
    "PFM": (b"Pf\n4 1\n-1.0\n" + np.float32(RAMP / 3).tobytes(), 85),
    "PGM of 12 bits": (b"P5 4 1 4095\n" + (U16 * 1365).astype(">u2").tobytes(), 85),
    "a dark PGM of 16 bits": (b"P5 4 1 65535\n" + (U16 * 257).astype(">u2").tobytes(), 1),
    "colours of 12 bits in 16": (png(np.stack([U16 * 1365] * 3, 2), 2, 16), 85),
    "TIFF, colours of 8 bits in 16": (tiff(np.stack([U16 * 85] * 3, 2), 2), 85),
    "the same, big-endian": (tiff(np.stack([U16 * 85] * 3, 2), 2, order=">"), 85),
    "the same, deflated": (tiff(np.stack([U16 * 85] * 3, 2), 2, packed=True), 85),
    "colours of 16 bits": (tiff(np.stack([U16 * 21845] * 3, 2), 2), 85),
    "LA, 12 bits in 16": (png(np.stack([U16 * 1365, U16 * 0 + 4095], 2), 4, 16), 85),
}


@pytest.mark.parametrize("kind", GREYS)
def test_integers_and_floats_are_scaled_by_their_range(kind):
    image, levels = GREYS[kind]
    levels = [level * levels for level in range(4)] if isinstance(levels, int) else levels
    assert pixels(image) == [[level] * 3 for level in levels]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_floats_that_are_not_finite_are_refused(value):
    with pytest.raises(Undecodable, match="values that are not finite"):
        decode(tiff(np.float32([[0, 1, value]]), 1, 3))


def test_lab_becomes_the_colours_that_it_stands_for():
    red = np.array([[[138, 81, 70]]], np.uint8)  # of sRGB, seen in D50: L 54.3, a 80.8, b 69.9
    assert np.allclose(pixels(tiff(red, 8)), RED, atol=6)


def test_other_colour_spaces_become_rgb():
    picture = Image.new("RGB", (16, 16), (250, 30, 20))
    for mode in ("CMYK", "YCbCr", "RGBX"):
        image = encode(picture.convert(mode), "TIFF")
        assert np.allclose(pixels(image), (250, 30, 20), atol=8), mode
    assert pixels(encode(picture.quantize(2), "PNG"))[0] == [250, 30, 20]


def test_what_is_worth_a_word_is_said():
    pages = [noise(seed=seed) for seed in range(3)]
    for kind in ("TIFF", "GIF", "WEBP", "PNG"):
        image = encode(pages[0], kind, save_all=True, append_images=pages[1:], lossless=True)
        picture, notes = decode_with_notes(image)
        assert notes == [FRAMES]
        if kind != "GIF":
            assert np.array_equal(np.asarray(picture), np.asarray(pages[0]))
    assert decode_with_notes(GREYS["8 bits in 16"][0])[1] == [SCALED]
    assert decode_with_notes(CLEAR["LA PNG"])[1] == [TRANSPARENT]
    for plain_one in (pages[0], pages[0].convert("RGBA")):
        assert decode_with_notes(encode(plain_one, "TIFF"))[1] == []


def test_damage_after_the_first_frame_does_no_harm():
    pages = [noise(seed=seed) for seed in range(2)]
    image = encode(pages[0], "GIF", save_all=True, append_images=pages[1:], duration=100)
    second = image.rindex(b"!\xf9\x04")  # its graphic control
    for size in range(second + 1, second + 30, 3):
        assert np.array_equal(np.asarray(decode_with_notes(image[:size])[0]), decode(image))


def test_a_large_colour_profile_and_long_texts_are_no_damage():
    profile = b"big\0\0" + zlib.compress(bytes(2 << 20))
    text = b"Comment\0\0" + zlib.compress(bytes(900_000))
    image = png(TWO * 255, 0, 8, (b"iCCP", profile), *[(b"zTXt", text)] * 80)
    assert pixels(image) == [BLACK, WHITE]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encode(noise(24, 32), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
    assert np.array_equal(np.asarray(decode(image)), np.asarray(expected))
    assert decode(image).size == ((32, 24) if orientation < 5 else (24, 32))


def test_the_oldest_pillow_allowed_turns_a_tiff_once():
    """Up to 10.0, its load() turned a TIFF and left the tag, so that decode() turned it again."""
    assert '"pillow>=10.1"' in (Path(__file__).parents[2] / "setup.py").read_text()


def test_orientation_is_applied_although_other_tags_are_malformed():
    """PIL.ImageOps.exif_transpose writes all tags again, and raises on this file."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 1.5
    malformed = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    assert malformed != exif.tobytes()
    image, plain = encode(noise(24, 32), "PNG", exif=malformed), noise(24, 32)
    expected = plain.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode(image)), np.asarray(expected))


def test_damaged_files_are_told_by_one_error():
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM", "TIFF", "JPEG2000", "AVIF", "TGA"):
        image = encode(noise(), kind)
        for size in (0, 1, 5, 30, len(image) // 2):
            with pytest.raises(Undecodable):
                decode(image[:size])
        for seed in range(20):  # whatever the decoder raises
            damaged = np.frombuffer(image, np.uint8).copy()
            rng = np.random.default_rng(seed)
            damaged[rng.integers(0, len(damaged), 9)] = rng.integers(0, 256, 9)
            try:
                decode(damaged.tobytes())
            except Undecodable as error:
                assert str(error)


@pytest.mark.parametrize(
    "image, reason",
    [
        (b"", "is empty"),
        (bytes(1000), "zero bytes only"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "b'version https://git-lfs"),
        (b"<!DOCTYPE html>", "begins with b'<!DOCTYPE html>'"),
        (encode(noise(), "JPEG")[:900], "truncated"),
        (tiff(np.zeros((1, 1)), 1, 3), "cut short, or of a kind that Pillow does not read"),
        (tiff(np.zeros((3, 3, 3), np.uint16), 2, planar=2), "has planes of 16 bits"),
    ],
)
def test_the_reason_is_told(image, reason):
    with pytest.raises(Undecodable, match=reason):
        decode(image)


def test_a_picture_too_large_for_the_memory_is_undecodable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(Undecodable, match="exceeds limit of 2000 pixels"):
        decode(encode(noise(), "PNG"))


@pytest.mark.skipif(not FULLSIZE.exists(), reason="needs the shared pictures beside the repository")
def test_full_size_imagenet_files_decode_to_upright_rgb():
    num_grey = num_turned = 0
    files = sorted(FULLSIZE.rglob("*.JPEG"))
    for file in files:
        with Image.open(file) as raw:
            picture = decode(file.read_bytes())
            orientation = raw.getexif().get(0x0112, 1)
            size = raw.size if orientation < 5 else raw.size[::-1]
            assert (picture.mode, picture.size) == ("RGB", size)
            num_grey += raw.mode == "L"
            if orientation != 1:
                num_turned += 1
                upright = ImageOps.exif_transpose(raw)
                assert np.array_equal(np.asarray(picture), np.asarray(upright))
    assert (len(files), num_grey, num_turned) == (240, 15, 3)


def plain(picture) -> np.ndarray:
    """The pixels of a picture of either decoder, (height, width, 3)."""
    return (
        picture.permute(1, 2, 0).numpy() if isinstance(picture, torch.Tensor) else np.array(picture)
    )


def oriented(tag: int, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = tag
    return encode(noise(24, 32), "JPEG", exif=exif, **options)


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/" xmlns:tiff="http://ns.adobe.com/tiff/1.0/">'
    b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)
AWKWARD = {
    "RGB": encode(noise(), "JPEG"),
    "grey": encode(noise().convert("L"), "JPEG"),
    "progressive": encode(noise(), "JPEG", progressive=True),
    "CMYK": encode(noise().convert("CMYK"), "JPEG"),
    "PNG": encode(noise(), "PNG"),
    "data after its end": encode(noise(), "JPEG") + bytes(100),
    "turned": oriented(6),
    "turned as XMP says": encode(noise(24, 32), "JPEG", xmp=XMP),
    "upright": oriented(1),
    "orientation that there is not": oriented(9),
}


@pytest.mark.parametrize("kind", AWKWARD)
def test_torchcodec_gives_the_pictures_of_pillow(kind):
    pytest.importorskip("torchcodec")
    picture = make_decoder("torchcodec")(AWKWARD[kind])
    by_torchcodec = kind in ("RGB", "grey", "progressive", "data after its end", "upright")
    assert isinstance(picture, torch.Tensor) == by_torchcodec
    expected = plain(decode(AWKWARD[kind]))
    assert plain(picture).shape == expected.shape
    # Versions of libjpeg may round differently.
    assert np.abs(plain(picture).astype(int) - expected).max() <= 2


@pytest.mark.skipif(not FULLSIZE.exists(), reason="needs the shared pictures beside the repository")
def test_torchcodec_gives_the_full_size_imagenet_files_as_pillow_does():
    pytest.importorskip("torchcodec")
    by_torchcodec = make_decoder("torchcodec")
    for file in sorted(FULLSIZE.rglob("*.JPEG"))[::4]:
        found, expected = (plain(each(file.read_bytes())) for each in (by_torchcodec, decode))
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected).mean() < 0.5


def test_torchcodec_is_given_plain_jpegs_only_and_may_refuse_them(monkeypatch):
    """A stand-in for it, which refuses all: also where it is not installed, and only it would."""
    given = []

    def refuse(source: torch.Tensor) -> torch.Tensor:
        given.append(bytes(source.numpy()))
        raise RuntimeError("Unsupported")

    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(decode_jpeg=refuse))
    by_torchcodec = make_decoder("torchcodec")
    for image in AWKWARD.values():
        assert np.array_equal(plain(by_torchcodec(image)), plain(decode(image)))
    kinds = [kind for kind, image in AWKWARD.items() if image in given]
    assert kinds == ["RGB", "grey", "progressive", "data after its end", "upright"]


def test_without_torchcodec_one_line_names_the_key_and_what_to_do(monkeypatch):
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError) as caught:
        make_decoder("torchcodec")
    message = str(caught.value)
    assert message.startswith("data.decoder = 'torchcodec': ") and "\n" not in message
    assert "pip install 'torchcodec>=0.17'" in message and 'set it to "pillow"' in message


def test_a_torchcodec_that_cannot_be_loaded_is_one_line(monkeypatch, tmp_path):
    """As with a torch that it was not built for."""
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise RuntimeError('No ABI\\nlong text')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(UserError, match=r"^data\.decoder = 'torchcodec': No ABI; .*pip install.*$"):
        make_decoder("torchcodec")
