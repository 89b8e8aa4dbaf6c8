"""Images decoded once per node."""

import logging
import os
import resource
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from zlib import crc32 as zlib_crc32

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from nasray.cli.main import main
from nasray.config import DataConfig
from nasray.data import cache
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


@contextmanager
def in_use(path) -> Iterator[None]:
    """Use a cache as a process does until it ends."""
    cache._hold(str(path))
    yield
    cache._HELD.pop(str(path)).close()


def end_uses() -> None:
    """Use no cache, as if the process had ended."""
    while cache._HELD:
        cache._HELD.popitem()[1].close()


def test_a_cache_is_read_whole_once_after_each_restart(dataset, tmp_path, monkeypatch):
    sums = []
    monkeypatch.setattr(cache.zlib, "crc32", lambda *given: sums.append(1) or zlib_crc32(*given))
    monkeypatch.setattr(cache, "BOOT_ID", str(tmp_path / "boot"))
    folder = tmp_path / "cache"

    def checked(boot: str) -> int:
        (tmp_path / "boot").write_text(boot)
        sums.clear()
        cached(dataset, folder)
        return len(sums)

    assert checked("one") == len(INDICES)  # built
    assert [checked("one"), checked("one"), checked("two"), checked("two")] == [1, 0, 1, 0]
    [file] = cache_files(folder)
    os.utime(file, ns=(1, 1))  # written again
    assert [checked("two"), checked("two")] == [1, 0]


def test_caches_are_listed_and_removed_by_age_but_for_those_in_use(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("NASRAY_CACHE", str(tmp_path))
    for resolution in (8, 12, 16):
        cached(dataset, tmp_path, resolution=resolution)
    end_uses()
    old, held, new = sorted(cache_files(tmp_path), key=lambda each: int(each.name.split("-")[1]))
    for file in (old, held):
        os.utime(file.with_suffix(".json"), (1, 1))
    with in_use(held):
        listed = CliRunner().invoke(main, ["cache"], catch_exceptions=False).stdout
        rows = listed.splitlines()
        assert len(rows) == 4 and f"5 train images at 16  {dataset.path}  " in rows[0]
        assert rows[0].endswith(str(new))
        result = CliRunner().invoke(main, ["cache", "clear", "--older-than", "30d"])
        assert "removed 1 caches" in result.stdout and "1 are in use" in result.stdout
    assert set(cache_files(tmp_path)) == {held, new}
    assert CliRunner().invoke(main, ["cache", "clear"]).exit_code == 0
    assert cache_files(tmp_path) == [] and not list(tmp_path.glob("*.json"))
    result = CliRunner().invoke(main, ["cache", "clear", "--older-than", "3 days"])
    assert "--older-than 3 days: give hours, days or weeks, such as 12h" in result.stderr


def test_what_was_used_longest_ago_makes_room(dataset, tmp_path, monkeypatch, caplog):
    for age, resolution in ((1, 8), (2, 10), (3, 12)):
        cached(dataset, tmp_path, resolution=resolution)
        [note] = tmp_path.glob(f"train-{resolution}-*.json")
        os.utime(note, (1000 - age, 1000 - age))
    end_uses()
    [held] = tmp_path.glob("train-12-*.npy")
    taken = sum(file.stat().st_size for file in cache_files(tmp_path))
    monkeypatch.setenv("NASRAY_CACHE_GB", str((taken + 10) / 1e9))
    with in_use(held):
        cached(dataset, tmp_path, resolution=9)
    end_uses()
    resolutions = [int(file.name.split("-")[1]) for file in cache_files(tmp_path)]
    assert sorted(resolutions) == [8, 9, 12]
    monkeypatch.setenv("NASRAY_CACHE_GB", "1e-9")
    cached(dataset, tmp_path, resolution=16)
    assert len(cache_files(tmp_path)) == 1 and "raise NASRAY_CACHE_GB" in caplog.text
    monkeypatch.setenv("NASRAY_CACHE_GB", "lots")
    with pytest.raises(UserError, match="NASRAY_CACHE_GB = 'lots': must be a positive number"):
        cached(dataset, tmp_path, resolution=17)
