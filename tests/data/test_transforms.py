"""Decoding awkward files, and augmentation."""

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from nasray.config import DataConfig
from nasray.data.transforms import (
    EIGENVALUES,
    EIGENVECTORS,
    MEAN,
    STD,
    UNDECODABLE,
    decode,
    eval_transform,
    normalize,
    train_transform,
)

FULLSIZE = Path(__file__).parents[3] / "shared" / "data" / "imagenet_fullsize" / "images"
SYNTHETIC = DataConfig(source="synthetic")
PLAIN = SYNTHETIC.model_copy(
    update={"color_jitter": 0.0, "lighting": 0.0, "flip": False, "min_crop_area": 1.0}
)


def encode(picture: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(height: int = 40, width: int = 60, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


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


def test_the_evaluation_crop_is_the_center_of_the_resized_image():
    picture = noise(300, 500)
    image = eval_transform(224)(picture)
    assert (image.shape, image.dtype) == ((3, 224, 224), torch.uint8)
    resized = picture.resize((math.floor(500 * 256 / 300), 256), Image.Resampling.BILINEAR)
    left = round((resized.width - 224) / 2)
    expected = np.asarray(resized)[16:240, left : left + 224].transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), expected)


@pytest.mark.parametrize("size", [(5, 400), (400, 5), (20, 20)])
def test_extreme_images_become_full_crops(size):
    picture = noise(*size)
    assert eval_transform(64)(picture).shape == (3, 64, 64)
    assert train_transform(SYNTHETIC, 64)(picture, 0).shape == (3, 64, 64)


def test_augmentation_is_a_function_of_the_seed_and_disturbs_nobody():
    augment = train_transform(SYNTHETIC, 32)
    state = torch.get_rng_state()
    first, other = augment(noise(), 1), augment(noise(), 2)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(augment(noise(), 1), first) and not torch.equal(first, other)
    assert (first.dtype, first.shape) == (torch.uint8, (3, 32, 32))


def test_without_augmentation_the_picture_is_only_resized():
    picture = noise(32, 32)
    image = train_transform(PLAIN, 32)(picture, 5)
    assert np.array_equal(image.numpy(), np.asarray(picture).transpose(2, 0, 1))


def test_flip_turns_about_half_of_the_pictures():
    ramp = Image.fromarray(np.tile(np.arange(32, dtype=np.uint8), (32, 1))).convert("RGB")
    augment = train_transform(PLAIN.model_copy(update={"flip": True}), 32)
    turned = [bool(augment(ramp, seed)[0, 0, 0] > 15) for seed in range(60)]
    assert 15 < sum(turned) < 45


def test_crops_keep_the_area_and_aspect_asked_for():
    # Where a pixel came from is written in it: red is its column, green its row.
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    picture = Image.fromarray(np.stack([columns, rows, rows], 2))
    augment = train_transform(PLAIN.model_copy(update={"min_crop_area": 0.25}), 64)
    areas = []
    for seed in range(60):
        red, green, _ = augment(picture, seed).float()
        width = (red.max() - red.min()).item() * 64 / 63
        height = (green.max() - green.min()).item() * 64 / 63
        areas.append(width * height / 200**2)
        assert 0.7 < width / height < 1.4
    assert 0.22 < min(areas) < 0.4 and max(areas) > 0.8


def test_color_jitter_changes_brightness_within_its_bounds():
    grey = Image.new("RGB", (32, 32), (100, 100, 100))
    augment = train_transform(PLAIN.model_copy(update={"color_jitter": 0.4}), 32)
    levels = [augment(grey, seed)[0, 0, 0].item() for seed in range(50)]
    assert 58 <= min(levels) < 75 and 125 < max(levels) <= 141


def test_lighting_shifts_colors_as_alexnet_did():
    # Shifts of a flat image are N(0, V diag((std * eigenvalue)^2) V^T).
    grey = Image.new("RGB", (8, 8), (128, 128, 128))
    augment = train_transform(PLAIN.model_copy(update={"lighting": 0.2}), 8)
    shifts = torch.stack([augment(grey, seed)[:, 0, 0].float() - 128 for seed in range(400)])
    expected = EIGENVECTORS @ torch.diag((0.2 * EIGENVALUES) ** 2) @ EIGENVECTORS.T
    assert torch.allclose(torch.cov(shifts.T), expected, rtol=0.25)
    assert shifts.mean(0).abs().max() < 1
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    assert min(augment(white, seed).min() for seed in range(20)) > 200  # clipped, not wrapped


def test_normalize_gives_imagenet_statistics_in_float32():
    image = torch.tensor([[0, 255], [124, 124], [104, 1]], dtype=torch.uint8)[None, :, :, None]
    expected = (np.asarray(image)[0, :, 0, 0] - np.array(MEAN)) / np.array(STD)
    result = normalize(image)
    assert (result.dtype, result.shape) == (torch.float32, image.shape)
    assert np.allclose(result[0, :, 0, 0], expected, atol=1e-5)
    assert image[0, 0, 1, 0] == 255  # the batch itself stays as it was
    batch = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    assert normalize(batch).is_contiguous(memory_format=torch.channels_last)
