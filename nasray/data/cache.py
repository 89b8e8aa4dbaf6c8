"""Images decoded once per node and shared by all its processes, for BN recalibration
and evaluation.

The file is a plain .npy, memory-mapped, so processes share its pages through the page cache.
After the images follows their CRC-32, which readers of .npy ignore, because a failing disk may
return zeros. Caches are kept until their folder is removed.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

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
                _build(path, shape, dataset, split, indices, make_decoder(decoder, background))
                images = np.load(path, mmap_mode="r")
    return images, dataset.labels(split)[indices].astype(np.int64)


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
    whole = (
        (images.shape, images.dtype) == (shape, np.uint8)
        and len(checksum) == CHECKSUM_BYTES
        and zlib.crc32(images) == int.from_bytes(checksum)
    )
    return images if whole else None


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
