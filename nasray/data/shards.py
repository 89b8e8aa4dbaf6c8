"""The imported form of a data set: shards of encoded images in Parquet, and dataset.json.

importing.py writes it once; Dataset reads it at random.
"""

import logging
import os
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nasray.data.source import UNDECODABLE
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import layout

INFO_NAME = layout.DATASET
SCHEMA = pa.schema(
    [
        ("image", pa.binary()),  # encoded
        ("label", pa.int32()),
        ("name", pa.string()),
        ("picture", pa.int64()),  # hash of the decoded pixels
        ("gradients", pa.binary(32)),  # look.Look
        ("width", pa.int32()),  # pixels, upright
        ("height", pa.int32()),
    ]
)
CACHE_BYTES = 768 << 20  # row groups one reader keeps

log = logging.getLogger(__name__)

Stamps = dict[str, tuple[int, int]]  # path in the source -> bytes, ns of the last change


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
    options: dict[str, int | str]  # what decides, besides the source, what it holds
    classes: list[str]  # a label is a position in this list
    num_train: int
    num_val: int
    num_skipped: int  # images, for any reason
    skipped: dict[str, dict[str, Any]]  # reason -> "number" of files, "first" of their names
    shards: dict[str, dict[str, Shard]]  # split -> file name -> shard
    fingerprint: str  # of labels, names and images, in their order
    notes: dict[str, int] = field(default_factory=dict)  # what images have, and how many


def read_info(path: str) -> DatasetInfo:
    """Read dataset.json of the imported data set at `path`, a folder or a URI.

    Raises:
        UserError: there is none, or it is damaged.
    """
    where = storage.join(path, INFO_NAME)
    if not storage.exists(where):
        raise UserError(f"{path}: no imported data set (no {INFO_NAME}); run `nasray data import`")
    values = storage.read_json(where)
    try:
        for shards in values["shards"].values():
            shards.update({name: Shard(**shard) for name, shard in shards.items()})
        if isinstance(values["skipped"], list):  # of an earlier version
            names = {"number": values["num_skipped"], "first": values["skipped"]}
            values["skipped"] = {UNDECODABLE: names}
        return DatasetInfo(**values)
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{where}: not written by this nasray ({error}); import again") from None


def write_stamps(data_path: str, found: Stamps) -> None:
    """Record the stamps of the files that were imported to `data_path`."""
    sizes, times = zip(*found.values(), strict=True) if found else ((), ())
    table = pa.table(
        {
            "name": pa.array(map(os.fsencode, found), pa.binary()),  # of any bytes
            "size": pa.array(sizes, pa.int64()),
            "time": pa.array(times, pa.int64()),
        }
    )
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    storage.write(storage.join(data_path, layout.SOURCE_FILES), buffer.getvalue().to_pybytes())


def read_stamps(data_path: str) -> Stamps:
    """Return the stamps recorded with an import; none if it was made by an earlier version."""
    path = storage.join(data_path, layout.SOURCE_FILES)
    if not storage.exists(path):
        return {}
    columns = pq.read_table(pa.BufferReader(storage.read(path))).to_pydict()
    names = map(os.fsdecode, columns["name"])
    return dict(zip(names, zip(columns["size"], columns["time"], strict=True), strict=True))


def open_dataset(path: str) -> "Dataset":
    """Open the imported data set at `path`, a folder or a URI; as read_info() raises."""
    return Dataset(storage.absolute(path), read_info(path))


@dataclass
class Dataset:
    """Random access to an imported data set.

    Files are opened when first read, in each process, so it can be sent to another one. The row
    groups last read are kept, up to `cache_bytes`. Not for several threads at once.
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
        empty: dict[str, Any] = {"_row_groups": OrderedDict(), "_labels": {}, "_footers": {}}
        return self.__dict__ | empty

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a label is a position among them."""
        return tuple(self.info.classes)

    @property
    def fingerprint(self) -> str:
        """A hash of all labels, names and images, in their order."""
        return self.info.fingerprint

    def num(self, split: str) -> int:
        """Count the images of `split`."""
        return {"train": self.info.num_train, "val": self.info.num_val}[split]

    def labels(self, split: str) -> np.ndarray:
        """Return the int32 labels of `split`; reads no image."""
        if split not in self._labels:
            self._labels[split] = self.column(split, "label").to_numpy().astype(np.int32)
            self._labels[split].setflags(write=False)  # shared with all callers
        return self._labels[split]

    def pictures(self, split: str) -> np.ndarray:
        """Return an int64 (n,) that is equal for images of `split` with equal pixels.

        All differ in a data set that was imported before such hashes were recorded.
        """
        found = self.column(split, "picture")
        if found.null_count:
            log.warning(
                "%s was imported by an earlier version, which did not record equal pictures: they "
                "may lie on both sides of a division; import it again to keep them together",
                self.path,
            )
            return np.arange(len(found))
        return found.to_numpy()

    def column(self, split: str, name: str) -> pa.ChunkedArray:
        """Return a column of SCHEMA for all images of `split`; nulls where it is not recorded."""
        parts = [pa.array([], SCHEMA.field(name).type)]
        for shard in self.info.shards[split]:
            with self._open(shard) as parquet:
                if name in parquet.schema_arrow.names:
                    parts += parquet.read(columns=[name]).column(name).chunks
                else:
                    parts.append(pa.nulls(parquet.metadata.num_rows, SCHEMA.field(name).type))
        return pa.chunked_array(parts)

    def read(self, split: str, indices: np.ndarray) -> list[bytes]:
        """Return the encoded images at `indices` (n,), in that order.

        Raises:
            IndexError: an index is not below num(split).
            UserError: a shard is missing or damaged.
        """
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self.num(split):
            raise IndexError(f"{split} has {self.num(split)} images, asked for {indices}")
        groups = self.row_groups_of(split, indices)
        rows = indices - self._row_group_starts(split)[groups]
        images: list[bytes] = [b""] * len(indices)
        # Group by group: however small the cache, none is read twice in one call. In order of
        # first use, so that the cache drops those that a shuffled epoch has finished with.
        _, first, which = np.unique(groups, return_index=True, return_inverse=True)
        for position in np.argsort(first[which], kind="stable").tolist():
            group = self._read_row_group(split, int(groups[position]))
            images[position] = group[int(rows[position])].as_py()
        return images

    def row_groups_of(self, split: str, indices: np.ndarray) -> np.ndarray:
        """Return the row group of each image, counted over all shards of `split`."""
        return np.searchsorted(self._row_group_starts(split), indices, side="right") - 1

    def num_row_groups(self, split: str) -> int:
        """Count the row groups of all shards of `split`."""
        return sum(len(shard.row_groups) for shard in self.info.shards[split].values())

    def image_bytes(self, split: str) -> int:
        """Sum the sizes of the encoded images of `split`, bytes."""
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
