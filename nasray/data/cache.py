"""Images decoded once per node and shared by all its processes, for BN recalibration
and evaluation.

The file is a plain .npy, memory-mapped, so processes share its pages through the page cache.
After the images follows their CRC-32, which readers of .npy ignore, because a failing disk may
return zeros; it is computed once after each restart of the machine. Beside it, a .json says what
the images are. The caches used longest ago are removed when a new one needs their room.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import ImageColor

from nasray.data.decoding import DEFAULT_BACKGROUND, Picture, make_decoder
from nasray.data.shards import Dataset
from nasray.data.transforms import EVAL_VERSION, eval_transform
from nasray.errors import UserError
from nasray.storage.cpus import usable_cpus
from nasray.storage.files import DISK_FULL

CHUNK_IMAGES = 256  # decoded between two writes
CHECKSUM_BYTES = 4
DISK_SHARE = 0.2  # of the disk, for all caches in one folder
BOOT_ID = "/proc/sys/kernel/random/boot_id"

_HELD: dict[str, BinaryIO] = {}  # caches that this process uses, locked

log = logging.getLogger(__name__)


def cached_images(
    dataset: Dataset,
    split: str,
    indices: np.ndarray,
    *,
    resolution: int,
    decoder: str,
    background: str = DEFAULT_BACKGROUND,
    folder: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the evaluation crops of `indices` and their labels.

    Images are uint8 (n, 3, resolution, resolution), memory-mapped and read-only; labels
    int64 (n,). `decoder` and `background` are those of [data]; each has caches of its own. `folder`
    is on this node.
    The first process that asks decodes, others wait.

    Raises:
        UserError: `folder` cannot be written, its disk is full, or the decoder is not installed.
    """
    shape = (len(indices), 3, resolution, resolution)
    key = _key(dataset, split, indices, resolution, decoder, background)
    path = os.path.join(folder, f"{key}.npy")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: decoded images cannot be kept there ({error.strerror}); set NASRAY_CACHE "
            "to a folder that may be written"
        ) from None
    with _locked(f"{path}.lock", fcntl.LOCK_SH):
        images = _open(path, shape)
    if images is None:
        with _locked(f"{path}.lock", fcntl.LOCK_EX):
            images = _open(path, shape)  # another process may have built it meanwhile
            if images is None:
                if os.path.exists(path):
                    log.warning("%s is damaged, or too old; decoding its images again", path)
                make_room(folder, int(np.prod(shape)))
                _build(path, shape, dataset, split, indices, make_decoder(decoder, background))
                about = {"data_set": dataset.path, "split": split, "resolution": resolution}
                _write_note(path, about | {"images": len(indices)})
                images = np.load(path, mmap_mode="r")
    _hold(path)
    return images, dataset.labels(split)[indices].astype(np.int64)


@dataclass(frozen=True)
class Cache:
    """One file of decoded images."""

    path: str
    data_set: str  # the folder of the import; empty: recorded by an earlier version
    split: str
    resolution: int  # pixels; 0: not recorded
    images: int
    num_bytes: int
    used: float  # when it was last opened, seconds since 1970


def caches(folder: str) -> list[Cache]:
    """Return the caches in `folder`, those used last first."""
    found = []
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        path = os.path.join(folder, name)
        if name.endswith(".npy"):
            with suppress(FileNotFoundError):  # removed meanwhile
                status, note = os.stat(path), _read_note(path)
                with suppress(FileNotFoundError):
                    note["used"] = os.stat(_note(path)).st_mtime
                found.append(
                    Cache(
                        path,
                        note.get("data_set", ""),
                        note.get("split", ""),
                        note.get("resolution", 0),
                        note.get("images", 0),
                        status.st_size,
                        note.get("used", status.st_mtime),
                    )
                )
    return sorted(found, key=lambda each: -each.used)


def remove(cache: Cache) -> bool:
    """Remove a cache unless a process of this node uses it; whether it was removed."""
    try:
        with open(cache.path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.remove(cache.path)
    except (BlockingIOError, FileNotFoundError):
        return False
    with suppress(FileNotFoundError):
        os.remove(_note(cache.path))
    return True


def limit_bytes(folder: str) -> int:
    """The most that the caches in `folder` may take: NASRAY_CACHE_GB, or a share of its disk.

    Raises:
        UserError: NASRAY_CACHE_GB is no positive number.
    """
    given = os.environ.get("NASRAY_CACHE_GB")
    if given is None:
        return int(DISK_SHARE * shutil.disk_usage(folder).total)
    try:
        limit = float(given)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise UserError(f"NASRAY_CACHE_GB = {given!r}: must be a positive number of GB, such as 50")
    return int(limit * 1e9)


def make_room(folder: str, num_bytes: int) -> None:
    """Remove the caches used longest ago until another of `num_bytes` is within the limit.

    And until the disk has room for it. Those in use stay.
    """
    found = caches(folder)
    taken, limit = sum(each.num_bytes for each in found), limit_bytes(folder)
    limit = min(limit, taken + shutil.disk_usage(folder).free)
    while found and taken + num_bytes > limit:
        oldest = found.pop()
        if remove(oldest):
            taken -= oldest.num_bytes
            log.info("removed %s, not used since %s", oldest.path, time.ctime(oldest.used))
    if taken + num_bytes > limit:
        log.warning(
            "%s: %.1f GB of decoded images are needed, above the limit of %.1f GB; raise "
            "NASRAY_CACHE_GB, or set NASRAY_CACHE to another disk",
            folder,
            (taken + num_bytes) / 1e9,
            limit / 1e9,
        )


def _hold(path: str) -> None:
    """Tell others that this process uses the cache, until it ends."""
    if path not in _HELD:
        with suppress(FileNotFoundError):  # removed meanwhile; its pages stay
            _HELD[path] = open(path, "rb")  # noqa: SIM115  held open
            fcntl.flock(_HELD[path], fcntl.LOCK_SH)


def _note(path: str) -> str:
    return f"{path.removesuffix('.npy')}.json"


def _read_note(path: str) -> dict[str, Any]:
    """What is recorded of a cache; its time is that of the last use."""
    try:
        with open(_note(path)) as file:
            found = json.load(file)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_note(path: str, note: dict[str, Any]) -> None:
    with suppress(OSError):  # only means that it is checked again
        partial = f"{_note(path)}.{os.getpid()}"
        with open(partial, "w") as file:
            json.dump(note, file)
        os.replace(partial, _note(path))


def _stamp(path: str) -> list[int | str]:
    """What differs once a file has been written again, or the machine has been restarted."""
    status = os.stat(path)
    with open(BOOT_ID) as file:
        return [status.st_size, status.st_mtime_ns, status.st_ino, file.read().strip()]


def _key(
    dataset: Dataset,
    split: str,
    indices: np.ndarray,
    resolution: int,
    decoder: str,
    background: str,
) -> str:
    made_of: list[object] = [dataset.fingerprint, split, resolution, EVAL_VERSION]
    made_of += [decoder, ImageColor.getrgb(background)]
    digest = hashlib.sha256(json.dumps(made_of).encode())
    digest.update(np.asarray(indices, "<i8").tobytes())
    return f"{split}-{resolution}-{digest.hexdigest()[:24]}"


@contextmanager
def _locked(path: str, how: int) -> Iterator[None]:
    """Hold a lock among the processes of this node; the kernel releases that of a dead one."""
    with open(path, "a+") as file:  # a shared lock needs one that may be read, on NFS
        fcntl.flock(file, how)
        yield


def _open(path: str, shape: tuple[int, ...]) -> np.ndarray | None:
    """Map the cache file; None if it is absent or not as it was written."""
    try:
        images = np.load(path, mmap_mode="r")
        with open(path, "rb") as file:
            file.seek(images.offset + images.nbytes)
            checksum = file.read(CHECKSUM_BYTES + 1)
    except (OSError, ValueError, EOFError):
        return None
    if (images.shape, images.dtype) != (shape, np.uint8) or len(checksum) != CHECKSUM_BYTES:
        return None
    note, stamp = _read_note(path), None
    with suppress(OSError):
        stamp = _stamp(path)
        if note.get("verified") == stamp:
            os.utime(_note(path))
            return images
    if zlib.crc32(images) != int.from_bytes(checksum):
        return None
    _write_note(path, note | {"verified": stamp})
    return images


def _build(
    path: str,
    shape: tuple[int, ...],
    dataset: Dataset,
    split: str,
    indices: np.ndarray,
    decode: Callable[[bytes], Picture],
) -> None:
    partial = f"{path}.partial"
    crop = eval_transform(shape[-1])
    checksum = 0
    try:
        # Written, not mapped: on a full disk a write raises, a store into a map kills the process.
        with open(partial, "wb") as file, ThreadPoolExecutor(usable_cpus()) as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(indices), CHUNK_IMAGES):
                encoded = dataset.read(split, indices[start : start + CHUNK_IMAGES])
                for image in pool.map(lambda each: crop(decode(each)), encoded):
                    content = image.numpy().tobytes()
                    checksum = zlib.crc32(content, checksum)
                    file.write(content)
            file.write(checksum.to_bytes(CHECKSUM_BYTES))
        os.replace(partial, path)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(
            f"{os.path.dirname(path)}: no room for {int(np.prod(shape)):,} bytes of decoded images "
            f"({errno.errorcode[error.errno]}); free some or set NASRAY_CACHE to another folder"
        ) from None
    finally:
        if os.path.exists(partial):
            os.remove(partial)
