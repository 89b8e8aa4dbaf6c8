"""The imported form of a data set: shards of encoded images in Parquet, and dataset.json.

`write_shards` writes it once, streaming; `Dataset` reads it at random. Records arrive
shuffled, so every shard and every row group is a random sample of its split.
dataset.json is written last: a folder without it holds no data set.
"""

import hashlib
import json
import logging
import re
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nasray.data.source import SPLITS, Pictures, Record
from nasray.data.transforms import UNDECODABLE, decode
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage.cpus import usable_cpus
from nasray.storage.files import DISK_FULL

INFO_NAME = "dataset.json"
SCHEMA = pa.schema([("image", pa.binary()), ("label", pa.int32()), ("name", pa.string())])
ROW_GROUP_BYTES = 8 << 20  # of image; what reading one image costs at worst
ROW_GROUP_IMAGES = (64, 4096)  # at least (but for the last) and at most
SHARD_BYTES = 256 << 20
CACHE_BYTES = 768 << 20  # row groups one reader keeps
MAX_SKIPPED = 0.01  # of all images; more undecodable ones point to a broken data set
MAX_NAMED = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One Parquet file."""

    row_groups: list[int]  # images in each
    image_bytes: int


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of dataset.json."""

    source: str
    seed: int
    options: dict[str, int | str]  # what, beside the source, decides what it holds
    classes: list[str]  # a label is a position in this list
    num_train: int
    num_val: int
    num_skipped: int  # could not be decoded
    skipped: list[str]  # the first of them
    shards: dict[str, dict[str, Shard]]  # split -> file name -> shard
    fingerprint: str  # of labels, names and images, in their order


def read_info(path: str) -> DatasetInfo:
    """Read dataset.json of the imported data set at `path`."""
    where = storage.join(path, INFO_NAME)
    if not storage.exists(where):
        raise UserError(f"{path}: no imported data set (no {INFO_NAME}); run `nasray data import`")
    values = storage.read_json(where)
    try:
        for shards in values["shards"].values():
            shards.update({name: Shard(**shard) for name, shard in shards.items()})
        return DatasetInfo(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not written by this nasray ({error}); import again") from None


def open_dataset(path: str) -> "Dataset":
    """Open the imported data set at `path`, a folder or a URI."""
    return Dataset(storage.absolute(path), read_info(path))


@dataclass
class Dataset:
    """Random access to an imported data set.

    Opens files when first asked, per process, so it may be sent to another one. Keeps the
    row groups last read, up to `cache_bytes`. Not for several threads at once.
    """

    path: str
    info: DatasetInfo
    cache_bytes: int = CACHE_BYTES
    _row_groups: OrderedDict[tuple[str, int], pa.BinaryArray] = field(
        init=False, repr=False, compare=False, default_factory=OrderedDict
    )
    _labels: dict[str, np.ndarray] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )
    _footers: dict[str, pq.FileMetaData] = field(
        init=False, repr=False, compare=False, default_factory=dict
    )

    def __getstate__(self) -> dict[str, Any]:
        empty = {"_row_groups": OrderedDict(), "_labels": {}, "_footers": {}}
        return self.__dict__ | empty

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.info.classes)

    @property
    def fingerprint(self) -> str:
        return self.info.fingerprint

    def num(self, split: str) -> int:
        return {"train": self.info.num_train, "val": self.info.num_val}[split]

    def labels(self, split: str) -> np.ndarray:
        """Return the int32 labels of `split`; reads no image."""
        if split not in self._labels:
            parts = [np.empty(0, np.int32)]
            for name in self.info.shards[split]:
                with self._open(name) as parquet:
                    parts.append(parquet.read(columns=["label"]).column("label").to_numpy())
            self._labels[split] = np.concatenate(parts)
            self._labels[split].setflags(write=False)  # shared with all callers
        return self._labels[split]

    def read(self, split: str, indices: np.ndarray) -> list[bytes]:
        """Return the encoded images at `indices`, in that order."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num(split):
            raise IndexError(f"{split} has {self.num(split)} images, asked for {indices}")
        groups = self.row_groups_of(split, indices)
        rows = indices - self._row_group_starts(split)[groups]
        images: list[bytes] = [b""] * len(indices)
        # Group by group: however small the cache, none is read twice in one call. The one
        # met first goes first, so that what a shuffled epoch has left behind is dropped.
        _, first, which = np.unique(groups, return_index=True, return_inverse=True)
        for position in np.argsort(first[which], kind="stable").tolist():
            group = self._read_row_group(split, int(groups[position]))
            images[position] = group[int(rows[position])].as_py()
        return images

    def row_groups_of(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Return the row group of each image, counted over all shards of `split`."""
        return np.searchsorted(self._row_group_starts(split), indices, side="right") - 1

    def num_row_groups(self, split: str) -> int:
        return sum(len(shard.row_groups) for shard in self.info.shards[split].values())

    def image_bytes(self, split: str) -> int:
        return sum(shard.image_bytes for shard in self.info.shards[split].values())

    def _row_group_starts(self, split: str) -> np.ndarray:
        sizes = [size for shard in self.info.shards[split].values() for size in shard.row_groups]
        return np.cumsum([0, *sizes[:-1]])

    def _read_row_group(self, split: str, group: int) -> pa.BinaryArray:
        key = (split, group)
        if key not in self._row_groups:
            name, position = self._locate(split, group)
            with self._open(name) as parquet:
                table = parquet.read_row_group(position, columns=["image"], use_threads=False)
            self._row_groups[key] = table.column("image").combine_chunks()
            while len(self._row_groups) > 1 and self._num_cached_bytes() > self.cache_bytes:
                self._row_groups.popitem(last=False)
        self._row_groups.move_to_end(key)
        return self._row_groups[key]

    def _num_cached_bytes(self) -> int:
        return sum(group.nbytes for group in self._row_groups.values())

    def _locate(self, split: str, group: int) -> tuple[str, int]:
        for name, shard in self.info.shards[split].items():
            if group < len(shard.row_groups):
                return name, group
            group -= len(shard.row_groups)
        raise IndexError(f"{split} has {self.num_row_groups(split)} row groups")

    def _open(self, name: str) -> pq.ParquetFile:
        # Footers are kept, handles are not: ImageNet has more shards than one may open files.
        path = storage.join(self.path, name)
        filesystem, place = storage.resolve(path)
        try:
            parquet = pq.ParquetFile(
                place, metadata=self._footers.get(name), filesystem=filesystem, memory_map=False
            )
        except (FileNotFoundError, pa.ArrowInvalid) as error:
            raise UserError(f"{path}: missing or damaged ({error}); import again") from None
        self._footers[name] = parquet.metadata
        return parquet


def write_shards(
    destination: str,
    pictures: Pictures,
    *,
    source: str,
    seed: int,
    options: dict[str, int | str],
    show: Callable[[int, int], None],
) -> DatasetInfo:
    """Write all decodable `pictures` to `destination`, removing what is left there."""
    _remove_shards(destination)
    storage.make_folder(destination)
    complete = False
    try:
        written, skipped, fingerprint = _stream(destination, pictures, show)
        info = DatasetInfo(
            source=source,
            seed=seed,
            options=options,
            classes=list(pictures.classes),
            num_train=sum(sum(shard.row_groups) for shard in written["train"].values()),
            num_val=sum(sum(shard.row_groups) for shard in written["val"].values()),
            num_skipped=len(skipped),
            skipped=skipped[:MAX_NAMED],
            shards=written,
            fingerprint=fingerprint,
        )
        storage.write_json(storage.join(destination, INFO_NAME), asdict(info))
        complete = True
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise UserError(f"{destination}: {error}; free some space or import elsewhere") from None
    finally:
        if not complete:
            _remove_shards(destination)
    if skipped:
        log.warning("Skipped %d undecodable images: %s", len(skipped), _name_some(skipped))
    return info


def _stream(
    destination: str, pictures: Pictures, show: Callable[[int, int], None]
) -> tuple[dict[str, dict[str, Shard]], list[str], str]:
    """Return the shards of each split, the names of undecodable images, and the fingerprint."""
    digest = hashlib.sha256(json.dumps(pictures.classes).encode())
    skipped: list[str] = []
    with ExitStack() as stack:
        writers = {split: _SplitWriter(destination, split) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        for done, (record, image) in enumerate(_load_checked(pictures), start=1):
            show(done, len(pictures))
            if image is None:
                skipped.append(record.name)
                if len(skipped) > MAX_NAMED:  # else the end is waited for, to name them all
                    _refuse_many(skipped, len(pictures))
                continue
            writers[record.split].add(image, record.label, record.name)
            row = [record.split, record.label, record.name, len(image), zlib.crc32(image)]
            digest.update(json.dumps(row).encode())
        _refuse_many(skipped, len(pictures))
    return {split: writers[split].shards for split in SPLITS}, skipped, digest.hexdigest()


def _load_checked(pictures: Pictures) -> Iterator[tuple[Record, bytes | None]]:
    """Load every image in a thread pool, in order; None for one that cannot be decoded."""
    num_threads = usable_cpus()
    waiting: deque[tuple[Record, Any]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for record in pictures:
            waiting.append((record, pool.submit(_load_if_decodable, record)))
            if len(waiting) > 8 * num_threads:  # so that memory stays bounded
                oldest, loading = waiting.popleft()
                yield oldest, loading.result()
        for oldest, loading in waiting:
            yield oldest, loading.result()


def _load_if_decodable(record: Record) -> bytes | None:
    try:
        image = record.load()
    except (FileNotFoundError, IsADirectoryError):  # a link to nowhere
        return None
    try:
        decode(image)
    except UNDECODABLE:
        return None
    return image


def _refuse_many(skipped: list[str], num_images: int) -> None:
    if len(skipped) > MAX_SKIPPED * num_images:
        raise UserError(
            f"data.path: more than {MAX_SKIPPED:.0%} of the {num_images} images cannot be decoded: "
            f"{_name_some(skipped)}; mend or remove them"
        )


def _name_some(names: list[str]) -> str:
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more} more" if more > 0 else "")


def _remove_shards(destination: str) -> None:
    for name in storage.list_names(destination):
        if re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{5}}\.parquet", name):
            storage.remove(storage.join(destination, name))


class _SplitWriter:
    """Appends the images of one split to its shards."""

    def __init__(self, destination: str, split: str) -> None:
        self.destination, self.split = destination, split
        self.shards: dict[str, Shard] = {}
        self.rows: list[tuple[bytes, int, str]] = []  # of the row group to come
        self.num_bytes = 0  # of image, in `rows`
        self.writer: pq.ParquetWriter | None = None

    def add(self, image: bytes, label: int, name: str) -> None:
        self.rows.append((image, label, name))
        self.num_bytes += len(image)
        fewest, most = ROW_GROUP_IMAGES
        large = self.num_bytes >= ROW_GROUP_BYTES and len(self.rows) >= fewest
        if large or len(self.rows) >= most:
            self._flush()

    def close(self) -> None:
        if self.rows:
            self._flush()
        self._close_shard()

    def _flush(self) -> None:
        if self.writer is None:
            self._open_shard()
        columns = [list(column) for column in zip(*self.rows, strict=True)]
        arrays = [pa.array(*pair) for pair in zip(columns, SCHEMA.types, strict=True)]
        self.writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
        name, shard = self.shards.popitem()
        self.shards[name] = Shard(
            row_groups=[*shard.row_groups, len(self.rows)],
            image_bytes=shard.image_bytes + self.num_bytes,
        )
        self.rows, self.num_bytes = [], 0
        if self.shards[name].image_bytes >= SHARD_BYTES:
            self._close_shard()

    def _open_shard(self) -> None:
        name = f"{self.split}-{len(self.shards):05d}.parquet"
        filesystem, place = storage.resolve(storage.join(self.destination, name))
        # Encoded images do not compress; their statistics would only swell the footer.
        self.writer = pq.ParquetWriter(
            place,
            SCHEMA,
            filesystem=filesystem,
            compression={"image": "NONE", "label": "ZSTD", "name": "ZSTD"},
            use_dictionary=["label"],
            write_statistics=["label"],
        )
        self.shards[name] = Shard(row_groups=[], image_bytes=0)

    def _close_shard(self) -> None:
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()
