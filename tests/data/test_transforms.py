"""Augmentation and the evaluation crop, of pictures of either decoder."""

import io
import math
import resource
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from nasray.config import DataConfig
from nasray.data import crop
from nasray.data.transforms import (
    EIGENVALUES,
    EIGENVECTORS,
    MEAN,
    STD,
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


def test_the_evaluation_crop_is_the_center_of_the_resized_image():
    picture = noise(300, 500)
    image = eval_transform(224)(picture)
    assert (image.shape, image.dtype) == ((3, 224, 224), torch.uint8)
    resized = picture.resize((math.floor(500 * 256 / 300), 256), Image.Resampling.BILINEAR)
    left = round((resized.width - 224) / 2)
    expected = np.asarray(resized)[16:240, left : left + 224].transpose(2, 0, 1)
    assert np.array_equal(image.numpy(), expected)


SIZES = [(5, 400), (400, 5), (20, 20), (1, 1), (97, 131), (375, 500)]


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"color_jitter": 1.7, "min_crop_area": 0.7},
        {"color_jitter": 0.0, "flip": False, "lighting": 0.5},
    ],
    ids=["defaults", "strong jitter", "no jitter"],
)
@pytest.mark.parametrize("resolution", [32, 288])
def test_augmentation_is_that_of_torchvision_with_pillow(changed, resolution):
    """Pixel by pixel, from the same seed: what has been trained with it stays comparable."""
    config = SYNTHETIC.model_copy(update=changed)
    jitter = config.color_jitter
    steps = v2.Compose(
        [
            v2.RandomResizedCrop(resolution, scale=(config.min_crop_area, 1), antialias=True),
            v2.RandomHorizontalFlip(0.5 if config.flip else 0),
            v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter),
            v2.PILToTensor(),
        ]
    )
    augment = train_transform(config, resolution)
    for seed in range(20):
        for size in SIZES:
            picture = noise(*size, seed)
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                image = steps(picture)
                shift = EIGENVECTORS @ (torch.randn(3) * config.lighting * EIGENVALUES)
            expected = (image + shift[:, None, None]).round().clamp(0, 255).to(torch.uint8)
            assert torch.equal(augment(picture, seed), expected), (seed, size)


@pytest.mark.parametrize("size", SIZES)
def test_the_evaluation_crop_is_that_of_torchvision_with_pillow(size):
    steps = v2.Compose([v2.Resize([256]), v2.CenterCrop([224, 224]), v2.PILToTensor()])
    assert torch.equal(eval_transform(224)(noise(*size)), steps(noise(*size)))


@pytest.mark.parametrize("size", SIZES)
def test_tensors_become_what_pictures_become_but_for_rounding(size):
    """torch scales with fewer bits than Pillow."""
    picture = noise(*size)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    for transform in (eval_transform(64), partial(train_transform(PLAIN, 64), seed=3)):
        found, expected = transform(tensor), transform(picture)
        assert (found.shape, found.dtype) == (expected.shape, torch.uint8)
        assert (found.int() - expected.int()).abs().max() <= 1
    augment = train_transform(SYNTHETIC, 64)
    differences = (augment(tensor, 3).int() - augment(picture, 3).int()).abs()
    assert differences.float().mean() < 0.2  # jitter takes those levels further


@pytest.mark.parametrize("size", [(64, 9000), (9000, 64), (20, 9000), (9000, 300), (1, 2000)])
def test_of_an_extreme_image_only_the_crop_is_scaled(size, monkeypatch):
    picture = noise(*size)
    scaled = []
    monkeypatch.setattr(crop, "MOST_PIXELS", 1 << 40)
    expected = eval_transform(64)(picture)
    monkeypatch.setattr(crop, "MOST_PIXELS", 1000)
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda *args: scaled.append(args[1]) or resize(*args)
    )
    assert torch.equal(eval_transform(64)(picture), expected)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    assert torch.equal(eval_transform(64)(tensor), expected)
    assert all(min(each) <= 74 for each in scaled) and scaled


def test_the_largest_evaluation_crop_takes_little_memory():
    """As a whole, it would be scaled to 256 x 2,560,000 pixels."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((1, 10000), (10000, 1)):
        assert eval_transform(224)(noise(*size)).shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10


@pytest.mark.parametrize("size", SIZES)
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
