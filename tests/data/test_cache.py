"""Images decoded once per node."""

import logging
import os
import resource
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nasray.config import DataConfig
from nasray.data.cache import cached_images
from nasray.data.decoding import decode
from nasray.data.importing import import_dataset
from nasray.data.loader import train_batches
from nasray.data.shards import Dataset, open_dataset
from nasray.data.transforms import eval_transform
from nasray.errors import UserError

CONFIG = DataConfig(source="synthetic", train_per_class=30, val_per_class=3, image_side=24)
INDICES = np.array([5, 290, 17, 17, 100])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    folder = str(tmp_path_factory.mktemp("drawn"))
    import_dataset(CONFIG, folder, seed=0)
    return open_dataset(folder)


def cached(dataset, folder, indices=INDICES, split="train", resolution=16, **decoding):
    options = {"decoder": "pillow", **decoding}
    return cached_images(
        dataset, split, indices, resolution=resolution, folder=str(folder), **options
    )


def cache_files(folder) -> list:
    return sorted(file for file in folder.iterdir() if file.suffix == ".npy")


def test_cached_images_are_the_evaluation_crops_mapped_read_only(dataset, tmp_path):
    images, labels = cached(dataset, tmp_path / "deep" / "cache")
    assert isinstance(images, np.memmap) and not images.flags.writeable
    crop = eval_transform(16)
    expected = [crop(decode(image)).numpy() for image in dataset.read("train", INDICES)]
    assert images.dtype == np.uint8 and np.array_equal(images, expected)
    assert labels.dtype == np.int64
    assert np.array_equal(labels, dataset.labels("train")[INDICES])


def test_more_images_than_one_chunk_stay_in_order(dataset, tmp_path):
    images, _ = cached(dataset, tmp_path, np.arange(300))
    crop = eval_transform(16)
    last = crop(decode(dataset.read("train", np.array([299]))[0])).numpy()
    assert images.shape == (300, 3, 16, 16) and np.array_equal(images[299], last)


def test_the_second_call_reads_the_file_of_the_first(dataset, tmp_path):
    cached(dataset, tmp_path)
    [file] = cache_files(tmp_path)
    before = file.stat()
    images, _ = cached(dataset, tmp_path)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert str(images.filename) == str(file)


def test_other_images_splits_and_resolutions_have_files_of_their_own(dataset, tmp_path):
    few = np.array([5, 2])
    cached(dataset, tmp_path, few)
    cached(dataset, tmp_path, few[::-1])
    cached(dataset, tmp_path, few, split="val")
    cached(dataset, tmp_path, few, resolution=8)
    assert len(cache_files(tmp_path)) == 4


def test_each_decoder_has_files_of_its_own(dataset, tmp_path, monkeypatch):
    white = SimpleNamespace(decode_jpeg=lambda image: torch.full((3, 24, 24), 255).byte())
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", white)
    assert np.all(cached(dataset, tmp_path, decoder="torchcodec")[0] == 255)
    by_pillow, _ = cached(dataset, tmp_path)
    assert not np.any(np.all(by_pillow == 255, axis=(1, 2, 3)))
    assert np.all(cached(dataset, tmp_path, decoder="torchcodec")[0] == 255)
    assert len(cache_files(tmp_path)) == 2


def test_each_background_has_files_of_its_own_and_training_shows_it(tmp_path):
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "raw" / place).mkdir(parents=True)
        Image.new("RGBA", (8, 8)).save(tmp_path / "raw" / place / "clear.png")
    config = DataConfig(source="imagefolder", path=str(tmp_path / "raw"), lighting=0)
    import_dataset(config, str(tmp_path / "out"), seed=0)
    clear, cache = open_dataset(str(tmp_path / "out")), tmp_path / "cache"
    for background, green in (("white", 255), ("#f00", 0), ("red", 0)):
        shown, _ = cached(clear, cache, np.arange(2), background=background)
        config = config.model_copy(update={"background": background, "color_jitter": 0.0})
        [(trained, _)] = train_batches(
            clear,
            np.arange(2),
            config,
            resolution=16,
            batch_size=2,
            rank=0,
            world_size=1,
            seed=0,
            epoch=0,
        )
        for images in (shown, trained.numpy()):
            assert np.all(images[:, 0] == 255) and np.all(images[:, 1:] == green)
    assert len(cache_files(cache)) == 2


@pytest.mark.parametrize(
    "spoil", ["cut short", "too long", "no header", "empty", "zeros", "one bit"]
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(dataset, tmp_path, caplog, spoil):
    expected = np.array(cached(dataset, tmp_path)[0])
    [file] = cache_files(tmp_path)
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut short": content[:-1],
            "too long": content + b"x",
            "no header": b"x" * len(content),
            "empty": b"",
            "zeros": content[:-2000] + bytes(2000),
            "one bit": content[:-2000] + bytes([content[-2000] ^ 1]) + content[-1999:],
        }[spoil]
    )
    with caplog.at_level(logging.WARNING):
        images, _ = cached(dataset, tmp_path)
    assert np.array_equal(images, expected)
    assert "is damaged" in caplog.text and str(file) in caplog.text


def test_a_full_disk_names_folder_and_bytes_and_leaves_no_partial_file(dataset, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))  # bytes; writes beyond fail
    try:
        with pytest.raises(UserError, match=r"3,840 bytes") as caught:
            cached(dataset, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path) in str(caught.value)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []
    assert cached(dataset, tmp_path)[0].shape == (5, 3, 16, 16)


def test_two_that_ask_at_once_build_one_cache(dataset, tmp_path):
    # Threads stand for processes: flock keeps any two openings of the lock file apart.
    # Built twice, the second file would replace the first and have another inode.
    start = threading.Barrier(2)

    def ask(_) -> int:
        start.wait(timeout=10)
        images, _ = cached(open_dataset(dataset.path), tmp_path, np.arange(300))
        return os.stat(images.filename).st_ino

    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(ask, range(2)))) == 1
    assert len(cache_files(tmp_path)) == 1
