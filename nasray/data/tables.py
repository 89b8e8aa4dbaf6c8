"""Sources "csv", "table" and "huggingface": a row for each image, with its path or its bytes.

"csv" is a text file, "table" one of Parquet, "huggingface" the folder that save_to_disk() of
Hugging Face's `datasets` writes. Paths are relative to the file, or to that folder.
"""

import csv as csv_module
import errno
import io
import json
import logging
import os
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nasray.config import DataConfig
from nasray.data import COLUMNS, kinds
from nasray.data.folders import refuse_absent, shown
from nasray.data.source import (
    NO_SPLIT,
    RAW_ADVICE,
    SPLITS,
    TRAIN_NAMES,
    UNDECODABLE,
    UNLABELLED,
    VAL_NAMES,
    Pictures,
    Record,
    Skipped,
    shuffled,
)
from nasray.errors import UserError, did_you_mean
from nasray.storage import files as storage

IMAGE_NAMES, LABEL_NAMES, SPLIT_NAMES = ("path", "image", "img"), ("label",), ("split",)
DELIMITERS = ",;\t|"
MAX_NAMED = 5  # labels or splits in one message
UNUSED_SPLITS = ("set", "subset", "fold", "partition")  # columns that may say a split

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """What a table says of its images, by row."""

    images: Sequence[Any]  # a path, bytes, or a struct of "bytes" and "path", or None
    labels: list[Any]  # a name, or a position in `classes`; None where there is none
    splits: list[Any] | None  # names; None: undivided
    classes: list[str] | None  # that the table names
    folder: str  # of relative paths


def csv(config: DataConfig, seed: int) -> Pictures:
    """Open the text file `config.path`, whose first line names its columns.

    Raises:
        UserError: it does not exist, is no such text, or lacks a column.
    """
    origin = _file(config.path)
    # Names of any bytes, as of a folder's files.
    text = storage.read(config.path).decode("utf-8-sig", "surrogateescape")
    header = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=header.count)
    lines = io.StringIO(text, newline="")
    options: dict[str, Any] = {"delimiter": delimiter, "skipinitialspace": True, "strict": True}
    reader = csv_module.reader(lines, **options)
    rows: list[list[str]] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        for row in reader:
            if row and len(row) != len(names):
                raise UserError(
                    f"{origin}: line {reader.line_num} has {len(row)} fields, the first line "
                    f'{len(names)}; put fields that hold {delimiter!r} between "'
                )
            rows += [row] if row else []
    except csv_module.Error as error:
        raise UserError(f"{origin}: line {reader.line_num}: {error}; mend that line") from None
    if not names:
        raise UserError(f"{origin}: begins with an empty line, where path,label should be")
    if any(map(kinds.has_image_suffix, names)):
        raise UserError(
            f"{origin}: its first line names no columns, but an image; put a line such as "
            f"path{delimiter}label above it"
        )
    image, label, split = _columns(names, config, origin)
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=False))
    return _pictures(
        Rows(
            columns.get(image, []),
            columns.get(label, []),
            columns.get(split, []) if split else None,
            None,
            os.path.dirname(storage.absolute(config.path)),
        ),
        seed=seed,
        origin=origin,
    )


def table(config: DataConfig, seed: int) -> Pictures:
    """Open the Parquet file `config.path`. Images that it holds itself are kept in memory.

    Raises:
        UserError: it does not exist, is no Parquet file, or lacks a column.
    """
    origin = _file(config.path)
    filesystem, place = storage.resolve(config.path)
    try:
        schema = pq.read_schema(place, filesystem=filesystem)
        image, label, split = _columns(schema.names, config, origin, schema)
        wanted = [name for name in (image, label, split) if name]
        found = pq.ParquetFile(filesystem.open_input_file(place)).read(columns=wanted)
    except (OSError, pa.ArrowInvalid) as error:
        if not _is_damage(error):
            raise
        raise UserError(f"{origin}: {error}; give a Parquet file that is whole") from None
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    return _pictures(
        Rows(
            found.column(image),
            found.column(label).to_pylist(),
            found.column(split).to_pylist() if split else None,
            features.get(label, {}).get("names"),
            os.path.dirname(storage.absolute(config.path)),
        ),
        seed=seed,
        origin=origin,
    )


def huggingface(config: DataConfig, seed: int) -> Pictures:
    """Open the folder `config.path`, which save_to_disk() of a Dataset or DatasetDict has written.

    Raises:
        UserError: it does not exist, is no such folder, or lacks a column of images or labels.
    """
    path, origin = config.path, f"data.path = {config.path!r}"
    refuse_absent(path)
    if storage.exists(storage.join(path, "dataset_dict.json")):
        splits = storage.read_json(storage.join(path, "dataset_dict.json"))["splits"]
        parts = {split: storage.join(path, split) for split in splits}
    elif storage.exists(storage.join(path, "state.json")):
        parts = {"": path}
    else:
        raise UserError(
            f"{origin}: is no folder of datasets.save_to_disk(): it has neither dataset_dict.json "
            'nor state.json; for a Parquet file, set source = "table"'
        )
    tables = {split: _arrow(part, origin) for split, part in parts.items()}
    about = storage.join(next(iter(parts.values())), "dataset_info.json")
    info = storage.read_json(about) if storage.exists(about) else {}
    features = info.get("features") or {}
    schema = next(iter(tables.values())).schema
    types = {name: feature.get("_type") for name, feature in features.items()}
    image, label, split = _columns(schema.names, config, origin, schema, types)
    if "" not in tables:
        splits = [name for name, part in tables.items() for _ in range(part.num_rows)]
    else:
        splits = tables[""].column(split).to_pylist() if split else None
    return _pictures(
        Rows(
            pa.chunked_array([c for part in tables.values() for c in part.column(image).chunks]),
            [value for part in tables.values() for value in part.column(label).to_pylist()],
            splits,
            features.get(label, {}).get("names"),
            storage.absolute(path),
        ),
        seed=seed,
        origin=origin,
    )


def _file(path: str) -> str:
    """Return how messages name the file `path`; refuse what is none."""
    refuse_absent(path)
    filesystem, place = storage.resolve(path)
    if not filesystem.get_file_info(place).is_file:
        is_folder = filesystem.type_name != "local" or os.path.isdir(place)
        what = "a folder; give the file in it" if is_folder else "no regular file"
        raise UserError(f"data.path = {path!r}: is {what}")
    return f"data.path = {path!r}"


def _arrow(folder: str, origin: str) -> pa.Table:
    """Map the Arrow files of one saved Dataset into memory."""
    path = storage.join(folder, "state.json")
    if not storage.exists(path):
        raise UserError(f"{origin}: {folder} has no state.json; save the data set again")
    state = storage.read_json(path)
    if not isinstance(state, dict) or "_data_files" not in state:
        raise UserError(f"{origin}: {path} names no data files; save the data set again")
    if state.get("_indices_data_files"):
        raise UserError(
            f"{origin}: was saved with a selection of rows; save dataset.flatten_indices() instead"
        )
    tables = []
    for file in state["_data_files"]:
        path = storage.join(folder, file["filename"])
        filesystem, place = storage.resolve(path)
        local = filesystem.type_name == "local"
        try:
            source = pa.memory_map(place) if local else filesystem.open_input_file(place)
            tables.append(pa.ipc.open_stream(source).read_all())
        except (OSError, pa.ArrowInvalid) as error:
            if not _is_damage(error):
                raise
            raise UserError(f"{path}: missing or damaged ({error}); save it again") from None
    return pa.concat_tables(tables)


def _is_damage(error: OSError | pa.ArrowInvalid) -> bool:
    """Whether a file is absent or damaged; Arrow's own errors have no number, a disk's have one."""
    return isinstance(error, FileNotFoundError | pa.ArrowInvalid) or error.errno is None


def _columns(
    names: list[str],
    config: DataConfig,
    origin: str,
    schema: pa.Schema | None = None,
    features: dict[str, str] | None = None,
) -> tuple[str, str, str]:
    """Choose the columns of images, labels and splits; "" if there is none of splits.

    `features` are those of Hugging Face: where one column alone is of images, it is taken, and
    where one alone is of labels. A table's images are rather taken from its bytes than from paths.
    """
    known, schema = features or {}, schema or pa.schema([])
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise UserError(f"{origin}: {twice[0]!r} names several columns; rename all but one")
    advice = {key: f"set data.{key} (--{key.replace('_', '-')})" for key in COLUMNS}
    images = [name for name, kind in known.items() if kind == "Image"]
    labels = [name for name, kind in known.items() if kind == "ClassLabel"]
    within = [
        name
        for name in IMAGE_NAMES
        if name in schema.names and _holds_bytes(schema.field(name).type)
    ]

    def chosen(key: str, what: str, candidates: Sequence[str]) -> str:
        wanted = getattr(config, key)
        asked_for = [wanted] if wanted else candidates
        found = [name for name in asked_for if name in names]
        if not wanted:
            found += [name for each in candidates for name in names if name.lower() == each]
        if found:
            return found[0]
        unused = [name for name in names if name.lower() in UNUSED_SPLITS]
        if what == "splits" and unused and not wanted:
            words = "%s: column %r is not used; %s to have it say the splits"
            log.warning(words, origin, unused[0], advice[key])
        if what == "splits" and not wanted:
            return ""
        hint = did_you_mean(wanted, names) if wanted else ""
        asked = (
            f"data.{key} = {wanted!r}: there is no such column"
            if wanted
            else (f"has no column {' or '.join(map(repr, candidates))} of {what}")
        )
        raise UserError(f"{origin}: {asked}{hint}; {advice[key]} to one of {names}")

    for several, key in ((images, "image_column"), (labels, "label_column")):
        if len(several) > 1 and not getattr(config, key):
            raise UserError(f"{origin}: {advice[key]} to one of {several}")
    image = chosen("image_column", "images", [*images, *within, *IMAGE_NAMES])
    kind = schema.field(image).type if schema.names else pa.string()
    if pa.types.is_dictionary(kind):  # categories of pandas
        kind = kind.value_type
    if not (_holds_bytes(kind) or kind in (pa.string(), pa.large_string())):
        raise UserError(
            f"{origin}: column {image!r} holds {kind}, neither paths nor encoded images; "
            f"{advice['image_column']} to one of {names}"
        )
    label = chosen("label_column", "labels", [*labels, *LABEL_NAMES])
    if schema.names and pa.types.is_nested(schema.field(label).type):
        raise UserError(
            f"{origin}: column {label!r} holds {schema.field(label).type}, not one class for each "
            f"image; {advice['label_column']} to one of {names}"
        )
    return (
        image,
        label,
        chosen("split_column", "splits", SPLIT_NAMES),
    )


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type may hold encoded images, not only their paths."""
    if pa.types.is_struct(kind):
        return {"bytes", "path"} & {field.name for field in kind} != set()
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _pictures(rows: Rows, *, seed: int, origin: str) -> Pictures:
    skipped = Skipped()
    split_of = _split_names(rows.splits, origin)
    found: dict[str, list[tuple[str, str, int]]] = {split: [] for split in split_of.values()}
    for row, (label, split) in enumerate(
        zip(rows.labels, rows.splits or [""] * len(rows.labels), strict=True)
    ):
        name = _name(rows.images[row], row, split)
        class_name = _class_name(label, rows.classes)
        if _cleaned(split) not in split_of:
            skipped.add(NO_SPLIT, name, f"split {split!r}")
        elif class_name is None:
            skipped.add(UNLABELLED, name, f"label {label!r}")
        elif kinds.is_raw(name):
            skipped.add(UNDECODABLE, name, RAW_ADVICE)
        else:
            found[split_of[_cleaned(split)]].append((class_name, name, row))
    classes = _classes(found, rows.classes, skipped, origin)
    position = {name: label for label, name in enumerate(classes)}

    def records() -> Iterator[Record]:
        for split in SPLITS:
            images = sorted(found.get(split, []))
            for place in shuffled(len(images), seed, split):
                class_name, name, row = images[place]
                load = partial(_load, rows.images, row, rows.folder)
                yield Record(split, position[class_name], name, load)

    return Pictures(classes, sum(map(len, found.values())), records(), skipped)


def _split_names(splits: list[Any] | None, origin: str) -> dict[str, str]:
    """Return which of SPLITS each name of a split stands for, as _cleaned()."""
    if splits is None:
        return {"": "train"}
    names = {_cleaned(split) for split in splits}
    train = [name for name in TRAIN_NAMES if name in names]
    val = [name for name in VAL_NAMES if name in names]
    if not train:
        raise UserError(
            f"{origin}: no row is of split 'train'; there are {sorted(names)[:MAX_NAMED]}; rename "
            "one, or leave the column out to have the images divided (data.split_column names it)"
        )
    return {name: "train" for name in train} | ({val[0]: "val"} if val else {})


def _cleaned(split: Any) -> str:
    return str(split or "").strip().lower()


def _class_name(label: Any, classes: list[str] | None) -> str | None:
    """Return the name of a class; None for a row without one."""
    if classes is not None and isinstance(label, int):
        return classes[label] if 0 <= label < len(classes) else None
    if label is None or label != label:  # NaN, of pandas
        return None
    if isinstance(label, float) and label.is_integer():
        label = int(label)  # as pandas has them where one is missing
    return unicodedata.normalize("NFC", shown(str(label).strip())) or None


def _classes(
    found: dict[str, list[tuple[str, str, int]]],
    named: list[str] | None,
    skipped: Skipped,
    origin: str,
) -> tuple[str, ...]:
    """Return the class names: in the table's order, or sorted; refuse splits that differ."""
    held = {split: {name for name, _, _ in images} for split, images in found.items()}
    train, val = held["train"], held.get("val", held["train"])
    if len(train) < 2:
        raise UserError(
            f"{origin}: its training rows are of {len(train)} classes, and a classifier needs two "
            "at least"
        )
    for split, others, own in (("train", val, train), ("val", train, val)):
        if others - own:
            lacking = ", ".join(map(repr, sorted(others - own)[:MAX_NAMED]))
            raise UserError(
                f"{origin}: split {split!r} has no rows of {len(others - own)} classes: {lacking}; "
                "both need some of every class"
                + (f" (left out: {lost})" if (lost := skipped.described((UNLABELLED,))) else "")
            )
    return tuple(name for name in named if name in train) if named else tuple(sorted(train))


def _name(image: Any, row: int, split: Any) -> str:
    """Return where the user finds the image of a row."""
    if isinstance(image, pa.StringScalar | pa.LargeStringScalar | pa.DictionaryScalar):
        image = image.as_py()
    if isinstance(image, str) and image:
        return shown(image)
    return f"{split}/{row}" if split else str(row)


def _load(images: Any, row: int, folder: str) -> bytes:
    value = images[row]
    value = value.as_py() if isinstance(value, pa.Scalar) else value
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    if not value:
        raise FileNotFoundError(errno.ENOENT, "no path and no bytes")
    if "\0" in value:
        raise FileNotFoundError(errno.ENOENT, "a zero byte in the name")
    if storage.is_uri(value):
        try:
            return storage.read(value)
        except UserError as error:  # no storage is of this kind, or has such names
            raise FileNotFoundError(errno.ENOENT, str(error)) from None
    if storage.is_uri(folder) and not value.startswith("/"):
        filesystem, place = storage.resolve(folder)  # a name in a URI may not have spaces
        with filesystem.open_input_file(f"{place}/{value}") as file:
            return bytes(file.read())
    path = os.path.join(folder, value)
    if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        raise OSError(errno.ENXIO, "not a regular file")
    with open(path, "rb") as local:
        return local.read()
