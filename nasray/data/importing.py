"""Import of a data set: every image of a source is decoded once, then stored as it is encoded.

So training meets no image that it cannot read. Records arrive shuffled, so every shard and
every row group is a random sample of its split. dataset.json is written last: a folder without
it holds no data set.
"""

import hashlib
import json
import logging
import os
import pkgutil
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from nasray.config import DataConfig
from nasray.data import COLUMNS, GENERATED, IMPORTED, PUBLISHED, SOURCES, TABULAR, check_source
from nasray.data.decoding import Undecodable, decode_with_notes
from nasray.data.look import Look, look_at
from nasray.data.shards import (
    INFO_NAME,
    SCHEMA,
    DatasetInfo,
    Shard,
    Stamps,
    open_dataset,
    read_info,
    write_stamps,
)
from nasray.data.source import (
    FAULTS,
    HARMLESS,
    LOST,
    MAX_NAMED,
    SPLITS,
    UNDECODABLE,
    UNREADABLE,
    Pictures,
    Record,
    Skipped,
    pooled,
    why_unreadable,
)
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import locks
from nasray.storage.cpus import usable_cpus
from nasray.storage.files import DISK_FULL

ROW_GROUP_BYTES = 8 << 20  # of image; what reading one image costs at worst
ROW_GROUP_IMAGES = (64, 4096)  # at least (but for the last) and at most
SHARD_BYTES = 256 << 20
MAX_SKIPPED = 0.01  # of all images that should be there; more point to a broken data set

log = logging.getLogger(__name__)


def import_dataset(
    config: DataConfig,
    destination: str,
    *,
    seed: int,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> DatasetInfo:
    """Turn the source of `config` into shards at `destination`, a folder or a URI.

    `show(done, total)` is called with the number of images done. A complete import is returned
    as it is; an interrupted one starts again.

    Raises:
        UserError: the source is unknown or cannot be read, more than MAX_SKIPPED of its images or
            all of a class cannot be used, the disk is full, or `destination` holds another data
            set.
    """
    check_source(config)
    if config.source == IMPORTED:
        raise UserError(
            f"data.source = {IMPORTED!r} stands for a data set that is imported already; "
            f"name its source instead, one of {sorted(SOURCES)}"
        )
    options = made_of(config, seed)
    if storage.exists(storage.join(destination, INFO_NAME)):
        return _complete(config, destination, options)
    pictures = open_source(config, seed)
    before = {} if config.source in (*GENERATED, *PUBLISHED) else storage.stamps(config.path)
    with locks.held(destination):
        if storage.exists(storage.join(destination, INFO_NAME)):  # meanwhile, by another
            return _complete(config, destination, options)
        info = write_shards(
            destination, pictures, source=config.source, seed=seed, options=options, show=show
        )
        write_stamps(destination, before | stamps_beside(config, destination))
        return info


def stamps_beside(config: DataConfig, data_path: str) -> Stamps:
    """The stamps of the files that a table names, as far as they were imported to `data_path`."""
    if config.source not in ("csv", "table"):
        return {}
    dataset = open_dataset(data_path)
    names = [name for split in SPLITS for name in dataset.column(split, "name").to_pylist()]
    return storage.stamps(os.path.dirname(storage.absolute(config.path)), names)


def open_source(config: DataConfig, seed: int) -> Pictures:
    """Open the source that `config` names; with data.val_share, all its images are of "train".

    Raises:
        UserError: it cannot be read.
    """
    pictures: Pictures = pkgutil.resolve_name(SOURCES[config.source])(config, seed)
    return pooled(pictures, seed) if config.val_share else pictures


def made_of(config: DataConfig, seed: int) -> dict[str, int | str]:
    """Return what decides, besides the source, which images a data set holds."""
    split = {"pooled": 1} if config.val_share else {}  # val/ is no split of its own
    if config.source in TABULAR:
        return {"path": config.path, **{key: getattr(config, key) for key in COLUMNS}, **split}
    if config.source not in GENERATED:
        return {"path": config.path, **split}
    keys = GENERATED[config.source]
    return {"seed": seed, **{key: getattr(config, key) for key in keys}, **split}


def _complete(config: DataConfig, destination: str, options: dict[str, int | str]) -> DatasetInfo:
    """Return what the complete import at `destination` holds; refuse it if the job differs.

    The path of the source is not compared, because it may have moved since.
    """
    info = read_info(destination)
    found = {"source": info.source, **info.options}
    for key, value in {"source": config.source, **options}.items():
        if key != "path" and found.get(key) != value:
            raise UserError(
                f"{destination}: holds a data set made with {key} = {found.get(key)!r}, the job "
                f"says {value!r}; remove that folder or import into another one"
            )
    return info


def write_shards(
    destination: str,
    pictures: Pictures,
    *,
    source: str,
    seed: int,
    options: dict[str, int | str],
    show: Callable[[int, int], None],
) -> DatasetInfo:
    """Write all decodable `pictures` to `destination`, removing shards that are left there.

    Raises:
        UserError: the disk is full, or more than MAX_SKIPPED of the images, or all of a class,
            cannot be used.
    """
    _remove_shards(destination)
    storage.make_folder(destination)
    complete = False
    try:
        written, notes, fingerprint = _stream(destination, pictures, show)
        info = DatasetInfo(
            source=source,
            seed=seed,
            options=options,
            classes=list(pictures.classes),
            num_train=sum(sum(shard.row_groups) for shard in written["train"].values()),
            num_val=sum(sum(shard.row_groups) for shard in written["val"].values()),
            num_skipped=pictures.skipped.num_images(),
            skipped=pictures.skipped.recorded(),
            notes=dict(notes),
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
    _tell(pictures.skipped, notes)
    return info


def _tell(skipped: Skipped, notes: Counter[str]) -> None:
    """Log what was left out, and what is to be known of the rest."""
    if skipped.num_images():
        log.warning("Skipped %d images: %s", skipped.num_images(), skipped.described(LOST))
    for reason in HARMLESS:
        if number := skipped.numbers[reason]:
            log.info("Passed over %d %s", number, reason)
    for note, number in notes.items():
        log.info("%d images: each %s", number, note)


def _stream(
    destination: str, pictures: Pictures, show: Callable[[int, int], None]
) -> tuple[dict[str, dict[str, Shard]], Counter[str], str]:
    """Return the shards of each split, the notes on images with their numbers, the fingerprint.

    Adds to `pictures.skipped` what cannot be read or decoded.
    """
    digest = hashlib.sha256(json.dumps(pictures.classes).encode())
    usable, notes = _Usable(pictures), Counter[str]()
    usable.refuse_many()
    with ExitStack() as stack:
        writers = {split: _SplitWriter(destination, split) for split in SPLITS}
        for writer in writers.values():
            stack.callback(writer.close)
        for done, (record, loaded) in enumerate(_load_checked(pictures), start=1):
            show(done, len(pictures))
            usable.note(record, loaded)
            if loaded.look is None:
                if pictures.skipped.num_faults() > MAX_NAMED:  # fewer are refused at the end
                    usable.refuse_many()
                continue
            notes.update(loaded.notes)
            image = loaded.image
            writers[record.split].add(image, record.label, record.name, *loaded.look)
            row = [record.split, record.label, record.name, len(image), zlib.crc32(image)]
            digest.update(json.dumps(row).encode())
        usable.refuse_many()
    usable.refuse_lost_classes()
    return {split: writers[split].shards for split in SPLITS}, notes, digest.hexdigest()


@dataclass(frozen=True)
class _Loaded:
    """An image that was read and decoded; without a `look`, the reason why it was not."""

    image: bytes = b""
    look: Look | None = None
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    detail: str = ""


class _Usable:
    """Which images of a source can be used; refuses a source with too few of them."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures, self.skipped = pictures, pictures.skipped
        self.num_images = len(pictures) + self.skipped.num_faults()
        self.left: dict[tuple[str, int], str] = {}  # by split and class: "", or why none is left

    def note(self, record: Record, loaded: _Loaded) -> None:
        """Take note of an image; one that cannot be used is added to what is skipped."""
        if loaded.look is None:
            self.skipped.add(loaded.reason, record.name, loaded.detail)
            self.left.setdefault((record.split, record.label), f"{record.name}: {loaded.detail}")
        else:
            self.left[record.split, record.label] = ""

    def refuse_many(self) -> None:
        """Refuse a source of which more than a few images cannot be used."""
        if self.skipped.num_faults() > MAX_SKIPPED * self.num_images:
            raise UserError(
                f"data.path: more than {MAX_SKIPPED:.0%} of the {self.num_images} images cannot be "
                f"used: {self.skipped.described(FAULTS)}; mend or remove them"
            )

    def refuse_lost_classes(self) -> None:
        """Refuse a source of which no image of a class is left in a split."""
        for (split, label), why in self.left.items():
            if why:
                raise UserError(
                    f"data.path: no image of class {self.pictures.classes[label]!r} in {split} can "
                    f"be used ({why}); mend them, or remove the class"
                )


def looked_at(
    pictures: Pictures, show: Callable[[int, int], None]
) -> Iterator[tuple[Record, Look]]:
    """Decode every image as an import does, and keep none.

    Adds to `pictures.skipped` those that cannot be read or decoded, and why an import would refuse
    that, if it would.
    """
    usable = _Usable(pictures)
    for done, (record, loaded) in enumerate(_load_checked(pictures), start=1):
        show(done, len(pictures))
        usable.note(record, loaded)
        if loaded.look is not None:
            yield record, loaded.look
    try:
        usable.refuse_many()
        usable.refuse_lost_classes()
    except UserError as error:
        pictures.skipped.refusal = str(error)


def _load_checked(pictures: Pictures) -> Iterator[tuple[Record, _Loaded]]:
    """Load every image in a thread pool, in order."""
    num_threads = usable_cpus()
    waiting: deque[tuple[Record, Future[_Loaded]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        for record in pictures:
            waiting.append((record, pool.submit(_load, record)))
            if len(waiting) > 8 * num_threads:  # to bound the memory
                oldest, loading = waiting.popleft()
                yield oldest, loading.result()
        for oldest, loading in waiting:
            yield oldest, loading.result()


def _load(record: Record) -> _Loaded:
    try:
        image = record.load()
    except OSError as error:
        why = why_unreadable(error)
        if why is None:
            raise
        return _Loaded(reason=UNREADABLE, detail=why)
    except MemoryError:
        return _Loaded(reason=UNREADABLE, detail="larger than the memory")
    try:
        picture, notes = decode_with_notes(image)
    except Undecodable as error:
        return _Loaded(reason=UNDECODABLE, detail=str(error))
    except MemoryError:
        return _Loaded(reason=UNDECODABLE, detail="its pixels need more memory than there is")
    return _Loaded(image, look_at(picture), notes)


def decodable(record: Record) -> bool:
    """Whether the import would take the image of `record`."""
    return _load(record).look is not None


def _remove_shards(destination: str) -> None:
    for name in storage.list_names(destination):
        if re.fullmatch(rf"({'|'.join(SPLITS)})-\d{{5}}\.parquet", name):
            storage.remove(storage.join(destination, name))


class _SplitWriter:
    """Appends the images of one split to its shards."""

    def __init__(self, destination: str, split: str) -> None:
        self.destination, self.split = destination, split
        self.shards: dict[str, Shard] = {}
        self.rows: list[tuple[bytes | int | str, ...]] = []  # of the row group to come
        self.num_bytes = 0  # of image, in `rows`
        self.writer: pq.ParquetWriter | None = None

    def add(self, image: bytes, label: int, name: str, *look: bytes | int) -> None:
        self.rows.append((image, label, name, *look))
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
        writer = self.writer or self._open_shard()
        columns = [list(column) for column in zip(*self.rows, strict=True)]
        arrays = [pa.array(*pair) for pair in zip(columns, SCHEMA.types, strict=True)]
        writer.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA))
        name, shard = self.shards.popitem()
        self.shards[name] = Shard(
            row_groups=[*shard.row_groups, len(self.rows)],
            image_bytes=shard.image_bytes + self.num_bytes,
        )
        self.rows, self.num_bytes = [], 0
        if self.shards[name].image_bytes >= SHARD_BYTES:
            self._close_shard()

    def _open_shard(self) -> pq.ParquetWriter:
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
        return self.writer

    def _close_shard(self) -> None:
        if self.writer is not None:
            writer, self.writer = self.writer, None
            writer.close()
