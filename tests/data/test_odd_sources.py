"""Data sets as careless owners have them: what is left out is named, and nothing is misread."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image

from nasray.cli.main import main
from nasray.config import DataConfig
from nasray.data import importing
from nasray.data.changes import difference
from nasray.data.decoding import Undecodable, decode
from nasray.data.importing import import_dataset, open_source
from nasray.data.shards import open_dataset
from nasray.data.source import split_word
from nasray.data.survey import survey
from nasray.errors import UserError
from tests.data.test_sources import encode, make_folder


def load(source: str, path: Path, destination: Path, **keys):
    config = DataConfig(source=source, path=str(path), **keys)
    return import_dataset(config, str(destination), seed=0)


def refusal(source: str, path: Path, **keys) -> str:
    with pytest.raises(UserError) as caught:
        open_source(DataConfig(source=source, path=str(path), **keys), 0)
    return str(caught.value)


def rows_of(root: Path) -> list[tuple[str, str]]:
    """(path, class) of the images of a folder of two classes that is made at `root`."""
    make_folder(root, ("ant", "bee"))
    return [(str(path), path.parent.name) for path in sorted(root.rglob("*.png"))]


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    "name, word",
    [
        ("training_set", "training"),
        ("Test Set", "test"),
        ("testset", "test"),
        ("seg_train", "train"),
        ("images-val", "val"),
        ("TRAIN", "train"),
        ("train_wagon", "train-wagon"),
        ("set", "set"),
    ],
)
def test_words_around_the_name_of_a_split_do_not_hide_it(name: str, word: str):
    assert split_word(name) == word


def test_folders_called_training_set_and_test_set_are_the_splits(tmp_path: Path):
    root = make_folder(tmp_path / "raw")
    (root / "train").rename(root / "training_set")
    (root / "val").rename(root / "test_set")
    info = load("imagefolder", root, tmp_path / "out")
    assert list(info.classes) == ["ant", "bee", "cat"] and info.num_val == 6


def test_classes_that_all_hold_the_same_folders_are_worth_a_word(tmp_path: Path, caplog):
    root = make_folder(tmp_path / "raw")
    (root / "train").rename(root / "first")
    (root / "val").rename(root / "second")
    load("imagefolder", root, tmp_path / "out")
    assert "'first', 'second' are taken for the classes" in caplog.text
    assert "each of them holds the folders 'ant', 'bee', 'cat'" in caplog.text


def test_splits_inside_of_classes_are_refused_with_the_way_to_turn_them(tmp_path: Path):
    for name in ("ant", "bee"):
        for split in ("train", "test"):
            folder = tmp_path / name / split
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(encode(1))
    words = refusal("imagefolder", tmp_path)
    assert "'ant', 'bee' have one each; images belong in train/<class>/ and val/<class>/" in words


def test_a_class_called_train_is_suspected(tmp_path: Path):
    for name in ("car", "train"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(encode(1))
    assert "(is train/ a class? call it otherwise)" in refusal("imagefolder", tmp_path)


def test_an_image_whose_suffix_says_text_is_an_image_and_what_is_none_is_named(tmp_path: Path):
    root = make_folder(tmp_path / "raw")
    (root / "train/ant/portrait of J.C").write_bytes(encode(3))
    (root / "train/ant/notes.txt").write_text("no image")
    info = load("imagefolder", root, tmp_path / "out")
    assert info.num_train == 13
    assert info.skipped["files that are no images"]["first"] == ["train/ant/notes.txt"]


def test_one_file_in_two_classes_and_splits_is_no_change(tmp_path: Path):
    rows = [(path, label, "train") for path, label in rows_of(tmp_path / "raw")]
    rows += [(rows[0][0], "bee", "train"), (rows[0][0], "ant", "val"), (rows[-1][0], "bee", "val")]
    lines = ["path,label,split", *(",".join(row) for row in [*rows, rows[0]])]
    table = write(tmp_path / "t.csv", lines)
    load("csv", table, tmp_path / "out")
    os.utime(table, ns=(1, 1))
    config = DataConfig(source="csv", path=str(table))
    assert difference(config, str(tmp_path / "out"), seed=0) is None
    write(table, [lines[0], lines[1].replace(",ant,", ",bee,"), *lines[2:]])
    assert difference(config, str(tmp_path / "out"), seed=0)


def big_endian(values: np.ndarray, sample_format: int, *, packed: bool) -> bytes:
    """A TIFF of one strip in big-endian order."""
    pixels = values.astype(values.dtype.newbyteorder(">")).tobytes()
    strip = zlib.compress(pixels) if packed else pixels
    tags = {256: values.shape[1], 257: values.shape[0], 258: 8 * values.itemsize}
    tags |= {259: 8 if packed else 1, 262: 1, 273: 8, 277: 1, 278: values.shape[0]}
    tags |= {279: len(strip), 339: sample_format}
    entries = b"".join(struct.pack(">HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack(">H", len(tags)) + entries + bytes(4)
    return b"MM\0*" + struct.pack(">I", 8 + len(strip)) + strip + directory


@pytest.mark.parametrize("kind, sample_format", [("int16", 2), ("int32", 2), ("float32", 3)])
def test_tiffs_that_pillow_would_read_in_the_wrong_order_are_refused(kind: str, sample_format: int):
    values = np.arange(1000, 1064).reshape(8, 8).astype(kind)
    plain = np.asarray(decode(big_endian(values, sample_format, packed=False)))[..., 0]
    assert plain[0, 0] < plain[-1, -1]
    with pytest.raises(Undecodable, match="big-endian order, which Pillow misreads"):
        decode(big_endian(values, sample_format, packed=True))


def test_signed_integers_that_use_all_their_bits_reach_white():
    values = np.array([[0, 16384, 32767]], np.int16)
    assert np.asarray(decode(big_endian(values, 2, packed=False)))[0, :, 0].tolist() == [
        0,
        128,
        255,
    ]


def test_alpha_of_16_bits_is_not_stretched(tmp_path: Path):
    pixels = np.zeros((1, 2, 4), np.uint16)
    pixels[..., 3] = 0, 1  # all but transparent
    assert np.asarray(decode(png16(pixels)))[0, :, 0].tolist() == [255, 255]
    pixels[..., 3] = 4095  # of a camera with 12 bits
    assert np.asarray(decode(png16(pixels)))[0, :, 0].tolist() == [0, 0]


def png16(rgba: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, which Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    height, width, _ = rgba.shape
    header = struct.pack(">IIBBBBB", width, height, 16, 6, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgba)
    parts = (b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_malformed_exif_data_do_not_cost_an_image(kind: str):
    buffer = io.BytesIO()
    picture = Image.new("RGB", (16, 16), (250, 30, 20))
    picture.save(buffer, kind, exif=b"Exif\0\0garbagegarbage")
    assert np.allclose(np.asarray(decode(buffer.getvalue())), (250, 30, 20), atol=6)


def test_a_tiff_that_is_cut_short_is_said_to_be():
    with pytest.raises(Undecodable, match="a TIFF that is cut short, or of a kind that Pillow"):
        decode(b"II*\0\x08\0\0\0" + bytes(20))


def test_a_row_that_names_a_pipe_a_device_or_no_name_is_skipped_and_named(tmp_path: Path):
    rows = rows_of(tmp_path / "raw")
    os.mkfifo(tmp_path / "pipe")
    odd = ["pipe", "/dev/zero", "a\0b", "http://host/x.png", "ftp://host/x y.png"]
    lines = ["path,label", *map(",".join, rows), *(f"{name},ant" for name in odd)]
    table = write(tmp_path / "t.csv", lines)
    found = survey(DataConfig(source="csv", path=str(table)), 0)
    skipped = found["skipped"]["unreadable"]
    assert skipped["number"] == len(odd)
    assert sum("not a regular file" in name for name in skipped["first"]) == 2
    assert "more than 1% of the 17 images cannot be used" in found["refused"]


def test_a_camera_s_raw_image_of_a_table_is_not_taken_for_its_preview(tmp_path: Path):
    rows = rows_of(tmp_path / "raw")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.dng", "TIFF")
    table = write(tmp_path / "t.csv", ["path,label", *map(",".join, rows), "x.dng,ant"])
    pictures = open_source(DataConfig(source="csv", path=str(table)), 0)
    assert pictures.skipped.first["undecodable"][0][0] == "x.dng" and len(pictures) == len(rows)


def test_a_split_column_is_found_in_any_letters_and_others_are_spoken_of(tmp_path: Path, caplog):
    rows = rows_of(tmp_path / "raw")
    splits = ["val" if "/val/" in path else "train" for path, _ in rows]
    for head, num_val in (("Path,Label,Split", 4), ("path,label,subset", 0)):
        lines = [",".join((*row, split)) for row, split in zip(rows, splits, strict=True)]
        table = write(tmp_path / "t.csv", [head, *lines])
        info = load("csv", table, tmp_path / head)
        assert info.num_val == num_val
    assert "column 'subset' is not used; set data.split_column (--split-column)" in caplog.text


@pytest.mark.parametrize(
    "lines, words",
    [
        (["a/0.png,ant", "a/1.png,bee"], "its first line names no columns, but an image"),
        ([""], "begins with an empty line"),
        (["path,label,label", "a,b,c"], "'label' names several columns"),
    ],
)
def test_a_text_without_usable_column_names(lines: list[str], words: str, tmp_path: Path):
    assert words in refusal("csv", write(tmp_path / "t.csv", lines))


def test_the_columns_of_a_table_can_be_given_to_the_check(tmp_path: Path):
    lines = ["file,kind", *map(",".join, rows_of(tmp_path / "raw"))]
    table = str(write(tmp_path / "t.csv", lines))
    result = CliRunner().invoke(main, ["data", "check", table])
    assert result.exit_code == 1 and "(--image-column) to one of ['file', 'kind']" in result.output
    options = ["--image-column", "file", "--label-column", "kind"]
    result = CliRunner().invoke(main, ["data", "check", table, *options])
    assert result.exit_code == 0 and "12 images in train" in result.output


def test_a_check_of_what_an_import_refuses_says_so(tmp_path: Path):
    root = make_folder(tmp_path / "raw")
    for image in (root / "train/bee").iterdir():
        image.write_bytes(b"nope")
    found = survey(DataConfig(source="imagefolder", path=str(root)), 0)
    assert "more than 1% of the 18 images cannot be used" in found["refused"]
    for image in root.rglob("*.png"):
        image.write_bytes(b"nope")
    with pytest.raises(UserError, match=r"more than 1% .* it begins with b'nope'"):
        survey(DataConfig(source="imagefolder", path=str(root)), 0)


def test_a_file_larger_than_the_memory_is_one_unreadable_image(tmp_path: Path, monkeypatch):
    root = make_folder(tmp_path / "raw")

    def decoded(image: bytes):
        if image == encode(100):  # train/ant/0.png
            raise MemoryError
        return decode_with_notes(image)

    decode_with_notes = importing.decode_with_notes
    monkeypatch.setattr(importing, "decode_with_notes", decoded)
    found = survey(DataConfig(source="imagefolder", path=str(root)), 0)
    [name] = found["skipped"]["undecodable"]["first"]
    assert name == "train/ant/0.png (its pixels need more memory than there is)"


def test_a_destination_that_is_a_file_is_refused_in_one_line(tmp_path: Path):
    root, file = make_folder(tmp_path / "raw"), tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file; give a folder"):
        load("imagefolder", root, file)


def test_damaged_tables_name_their_file(tmp_path: Path):
    table = pa.table({"path": ["a"] * 5000, "label": [f"class {row % 7}" for row in range(5000)]})
    path = tmp_path / "t.parquet"
    pq.write_table(table, path)
    content = bytearray(path.read_bytes())
    content[20:200] = bytes(180)
    path.write_bytes(content)
    assert f"data.path = '{path}': " in refusal("table", path)
    pq.write_table(pa.Table.from_arrays([["a"], ["b"], ["c"]], ["path", "label", "label"]), path)
    assert "'label' names several columns" in refusal("table", path)


def test_saved_data_sets_that_lack_a_file_name_it(tmp_path: Path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert "train has no state.json" in refusal("huggingface", tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "train/state.json").write_text("{}")
    assert "state.json names no data files" in refusal("huggingface", tmp_path)


def test_spaces_in_the_names_of_a_table_on_a_storage(tmp_path: Path):
    rows_of(tmp_path / "raw")
    for image in list((tmp_path / "raw").rglob("*.png")):
        image.rename(image.with_name(f"my {image.name}"))
    lines = [f"{path.relative_to(tmp_path)},{path.parent.name}" for path in tmp_path.rglob("*.png")]
    table = write(tmp_path / "t.csv", ["path,label", *lines])
    config = DataConfig(source="csv", path=f"file://{table}")
    import_dataset(config, str(tmp_path / "out"), seed=0)
    assert open_dataset(str(tmp_path / "out")).info.num_skipped == 0


def test_the_smallest_class_says_how_many_can_be_held_out(tmp_path: Path):
    root = make_folder(tmp_path / "raw", train=5)
    for number in (2, 3, 4):
        (root / f"train/bee/{number}.png").unlink()
    config = DataConfig(source="imagefolder", path=str(root), holdout_per_class=9)
    assert "class 'bee' has only 2 training images; lower it to 1" in survey(config, 0)["problem"]


def test_no_regular_file_is_neither_a_folder_nor_a_table(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a folder nor a regular file" in refusal("imagefolder", tmp_path / "pipe")
    assert "is no regular file" in refusal("csv", tmp_path / "pipe")
    (tmp_path / "x.zip").write_bytes(b"PK")
    assert "is a file; unpack it first" in refusal("imagefolder", tmp_path / "x.zip")
