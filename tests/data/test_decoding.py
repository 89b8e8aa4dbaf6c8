"""Decoding awkward files, by Pillow and by torchcodec."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nasray.data.decoding import UNDECODABLE, decode, make_decoder
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
    image = encode(picture, "PNG", transparency=b"\x00\x80")
    assert np.asarray(decode(image))[0, 0].tolist() == [10, 200, 30]


@pytest.mark.parametrize(
    "mode, kind", [("L", "JPEG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG")]
)
def test_other_modes_become_rgb(mode, kind):
    picture = Image.new("L", (6, 5), 255).convert(mode)
    decoded = decode(encode(picture, kind))
    assert decoded.mode == "RGB" and decoded.size == (6, 5)
    assert np.asarray(decoded).min() > 250


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, kind):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = encode(noise(24, 32), kind, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(image))).convert("RGB")
    assert np.array_equal(np.asarray(decode(image)), np.asarray(expected))
    assert decode(image).size == ((32, 24) if orientation < 5 else (24, 32))


def test_orientation_is_applied_although_other_tags_are_malformed():
    """PIL.ImageOps.exif_transpose writes all tags again, and raises on this file."""
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 1.5
    malformed = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x02")
    assert malformed != exif.tobytes()
    image, plain = encode(noise(24, 32), "PNG", exif=malformed), noise(24, 32)
    expected = plain.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(decode(image)), np.asarray(expected))


def test_damaged_files_raise_one_of_the_named_errors():
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "PPM"):
        image = encode(noise(), kind)
        for size in (0, 1, 5, 30, len(image) // 2):
            with pytest.raises(UNDECODABLE):
                decode(image[:size])


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
