"""Importing a data set and reading it back."""

import io
import json
import logging
import os
import pickle
import pkgutil
import resource
import struct
import subprocess
import tarfile
import unicodedata
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from nasray.config import DataConfig, parse_job
from nasray.data import SOURCES, folders, importing
from nasray.data.decoding import decode
from nasray.data.folders import imagefolder
from nasray.data.importing import import_dataset
from nasray.data.shards import Dataset, open_dataset
from nasray.errors import UserError
from nasray.pipeline.run import check_names
from nasray.storage import files as storage
from nasray.storage import locks

SHARED = Path(__file__).parents[3] / "shared" / "data"


def encode(color: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (12, 10), (color, 255 - color, 7)).save(buffer, kind)
    return buffer.getvalue()


def make_folder(root: Path, classes=("ant", "bee", "cat"), train=4, val=2, val_name="val") -> Path:
    for split, num in (("train", train), (val_name, val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(num):
                image = encode(20 * label + number + (100 if split == "train" else 0))
                (folder / f"{number}.png").write_bytes(image)
    return root


def make_tar(folder: Path, target: Path, top: str = ".") -> Path:
    with tarfile.open(target, "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):  # not the order of a folder
            archive.add(path, f"{top}/{path.relative_to(folder)}", recursive=False)
    return target


def load(source: str, path: Path, destination: Path, seed: int = 0):
    return import_dataset(DataConfig(source=source, path=str(path)), str(destination), seed=seed)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"source": "kinetics"}, "job.toml: data.source = 'kinetics' is unknown; there are"),
        ({"source": "synthetik"}, "is unknown; did you mean 'synthetic'\\? there are"),
        ({"source": "tar"}, "job.toml: data: source = 'tar' needs `path`"),
    ],
)
def test_an_unknown_source_is_refused_before_any_work(tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        check_names(parse_job({"data": options}, "job.toml"), "job.toml")
    with pytest.raises(UserError, match=complaint.removeprefix("job.toml: ")):
        import_dataset(DataConfig(**options), str(tmp_path / "out"), seed=0)
    assert not (tmp_path / "out").exists()


def test_every_source_of_the_table_can_be_imported():
    for where in SOURCES.values():
        assert callable(pkgutil.resolve_name(where))


@pytest.fixture
def small_row_groups(monkeypatch):
    monkeypatch.setattr(importing, "ROW_GROUP_IMAGES", (2, 3))
    monkeypatch.setattr(importing, "SHARD_BYTES", 500)


def test_every_image_comes_back_with_its_class_from_a_folder(tmp_path, small_row_groups):
    root = make_folder(tmp_path / "raw")
    info = load("imagefolder", root, tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.classes == ("ant", "bee", "cat")
    assert (dataset.num("train"), dataset.num("val")) == (12, 6)
    assert len(info.shards["train"]) > 1
    for split in ("train", "val"):
        images = dataset.read(split, np.arange(dataset.num(split)))
        found = sorted(zip(dataset.labels(split).tolist(), images, strict=True))
        expected = sorted(
            (label, file.read_bytes())
            for label, name in enumerate(dataset.classes)
            for file in (root / split / name).iterdir()
        )
        assert found == expected


def test_images_come_in_the_order_asked_even_with_a_cache_of_nothing(tmp_path, small_row_groups):
    load("imagefolder", make_folder(tmp_path / "raw"), tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    in_order = dataset.read("train", np.arange(12))
    dataset.cache_bytes = 0
    wanted = np.array([7, 0, 11, 7, 3])
    assert dataset.read("train", wanted) == [in_order[index] for index in wanted]
    assert dataset.read("train", np.array([], np.int64)) == []
    with pytest.raises(IndexError, match="12 images"):
        dataset.read("train", np.array([-1]))


def test_no_row_group_is_read_twice_for_one_request(tmp_path, small_row_groups, monkeypatch):
    load("imagefolder", make_folder(tmp_path / "raw"), tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    dataset.cache_bytes = 0
    opened, open_shard = [], Dataset._open
    monkeypatch.setattr(Dataset, "_open", lambda *args: opened.append(args) or open_shard(*args))
    dataset.read("train", np.array([0, 11, 1, 10, 2, 9]))
    assert len(opened) == 2


def test_the_cache_of_row_groups_stays_within_its_bytes(tmp_path, small_row_groups):
    load("imagefolder", make_folder(tmp_path / "raw"), tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.num_row_groups("train") == 4
    dataset.cache_bytes = 800  # an image has about 90 bytes, a row group 3 of them
    dataset.read("train", np.arange(12))
    assert 1 < len(dataset._row_groups) < 4
    assert sum(group.nbytes for group in dataset._row_groups.values()) <= 800


def test_a_dataset_survives_pickling_without_what_it_has_read(tmp_path):
    load("imagefolder", make_folder(tmp_path / "raw"), tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    images = dataset.read("val", np.arange(6))
    packed = pickle.dumps(dataset)
    copy = pickle.loads(packed)
    assert isinstance(copy, Dataset) and images[0] not in packed
    assert copy.read("val", np.arange(6)) == images


@pytest.mark.parametrize("top", [".", "sets", "./sets"])
def test_a_tar_gives_the_same_data_set_as_its_folder(tmp_path, top):
    root = make_folder(tmp_path / "raw", val_name="validation")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "train" / "ant" / "._0.png").write_text("left by macOS")
    (root / "train" / "bee" / "more").mkdir()
    (root / "train" / "bee" / "more" / "x.PNG").write_bytes(encode(77))
    (root / "README").write_text("hello")
    from_folder = load("imagefolder", root, tmp_path / "a")
    from_tar = load("tar", make_tar(root, tmp_path / "x.tar", top), tmp_path / "b")
    assert from_folder.num_train == 13
    assert (from_tar.fingerprint, from_tar.num_train) == (from_folder.fingerprint, 13)
    assert from_folder.skipped == from_tar.skipped
    assert from_folder.num_skipped == 1 and from_folder.skipped["of other programs"]["number"] == 1


def test_the_seed_decides_the_order_and_nothing_else_does(tmp_path):
    root = make_folder(tmp_path / "raw", train=10)
    first, again, other = (
        load("imagefolder", root, tmp_path / name, seed)
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint
    labels = open_dataset(str(tmp_path / "a")).labels("train")
    assert labels.dtype == np.int32 and labels.tolist() != sorted(labels)
    assert sorted(labels) == [0] * 10 + [1] * 10 + [2] * 10


def test_the_fingerprint_tells_another_picture(tmp_path):
    root = make_folder(tmp_path / "raw")
    before = load("imagefolder", root, tmp_path / "a")
    (root / "val" / "cat" / "1.png").write_bytes(encode(200))
    assert load("imagefolder", root, tmp_path / "b").fingerprint != before.fingerprint


def test_importing_again_returns_what_is_there(tmp_path):
    root = make_folder(tmp_path / "raw")
    info = load("imagefolder", root, tmp_path / "out")
    (root / "train" / "ant" / "0.png").unlink()
    assert load("imagefolder", root, tmp_path / "out") == info
    parquet = DataConfig(source="parquet", path=str(tmp_path / "out"))
    with pytest.raises(UserError, match="imported already; name its source instead"):
        import_dataset(parquet, str(tmp_path / "unused"), seed=0)
    assert not (tmp_path / "unused").exists()


def test_an_interrupted_import_starts_again_without_leftovers(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train-00000.parquet", "train-00007.parquet", "notes.txt"):
        (out / name).write_text("half")
    load("imagefolder", make_folder(tmp_path / "raw"), out)
    names = {file.name for file in out.iterdir()}
    shards = {"train-00000.parquet", "val-00000.parquet"}
    assert names == shards | {"dataset.json", "source.parquet", "lock", "notes.txt"}
    assert open_dataset(str(out)).num("train") == 12


def test_raw_images_may_move_once_they_are_imported(tmp_path):
    root = make_folder(tmp_path / "raw")
    info = load("imagefolder", root, tmp_path / "out")
    assert load("imagefolder", root.rename(tmp_path / "moved"), tmp_path / "out") == info
    with pytest.raises(UserError, match="made with source = 'imagefolder'"):
        load("tar", tmp_path / "moved", tmp_path / "out")


def test_an_import_that_another_has_done_meanwhile_is_left_alone(tmp_path, monkeypatch):
    root, out = make_folder(tmp_path / "raw"), tmp_path / "out"
    first = []

    def listing(config, seed):  # while this one lists its images, another imports them
        monkeypatch.undo()
        first.append(load("imagefolder", root, out))
        return imagefolder(config, seed + 1)

    monkeypatch.setattr(folders, "imagefolder", listing)
    assert [load("imagefolder", root, out)] == first


def test_links_are_followed_but_never_round_in_a_circle(tmp_path):
    root = make_folder(tmp_path / "raw")
    (root / "train" / "ant" / "round").symlink_to(root / "train")
    (root / "train" / "bee").rename(tmp_path / "bees")
    (root / "train" / "bee").symlink_to(tmp_path / "bees")
    assert load("imagefolder", root, tmp_path / "out").num_train == 12


def test_hidden_folders_are_passed_over_in_folders_and_tars(tmp_path):
    root = make_folder(tmp_path / "raw")
    for folder in ("train/.cache", "train/ant/.thumbs"):
        (root / folder).mkdir()
        (root / folder / "0.png").write_bytes(encode(1))
    assert load("imagefolder", root, tmp_path / "a").num_train == 12
    assert load("tar", make_tar(root, tmp_path / "x.tar"), tmp_path / "b").num_train == 12


def test_show_hears_of_every_image(tmp_path):
    config = DataConfig(source="imagefolder", path=str(make_folder(tmp_path / "raw")))
    heard = []
    import_dataset(
        config, str(tmp_path / "out"), seed=0, show=lambda done, total: heard.append((done, total))
    )
    assert heard == [(done, 18) for done in range(1, 19)]


def test_a_few_undecodable_images_are_skipped_counted_and_named(tmp_path, caplog):
    root = make_folder(tmp_path / "raw", train=40)
    broken = root / "train" / "bee" / "9.png"
    broken.write_bytes(broken.read_bytes()[:50])  # cut short: it opens, but does not decode
    with caplog.at_level(logging.WARNING):
        info = load("imagefolder", root, tmp_path / "out")
    assert (info.num_train, info.num_skipped) == (119, 1)
    why = "train/bee/9.png (image file is truncated)"
    assert info.skipped == {"undecodable": {"number": 1, "first": [why]}}
    assert [record.message for record in caplog.records] == [
        f"Skipped 1 images: 1 undecodable: {why}"
    ]
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert written["skipped"] == info.skipped
    assert open_dataset(str(tmp_path / "out")).info == info


def test_what_an_earlier_version_skipped_can_be_read(tmp_path):
    load("imagefolder", make_folder(tmp_path / "raw"), tmp_path / "out")
    file = tmp_path / "out" / "dataset.json"
    values = json.loads(file.read_text()) | {"num_skipped": 1, "skipped": ["train/bee/9.png"]}
    del values["notes"]
    file.write_text(json.dumps(values))
    info = open_dataset(str(tmp_path / "out")).info
    assert info.skipped == {"undecodable": {"number": 1, "first": ["train/bee/9.png"]}}


def test_more_than_one_percent_undecodable_is_refused_and_nothing_stays(tmp_path):
    root = make_folder(tmp_path / "raw")
    (root / "train" / "bee" / "1.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"1% of the 18 images.*train/bee/1\.png"):
        load("imagefolder", root, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["lock"]


def test_a_refused_data_set_names_ten_undecodable_images_at_least(tmp_path):
    root = make_folder(tmp_path / "raw", train=40)
    for folder in ("ant", "bee"):
        for index in range(8):
            (root / "train" / folder / f"{index}.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"and \d more; mend or remove them") as caught:
        load("imagefolder", root, tmp_path / "out")
    assert str(caught.value).count(".png") == 10


FAULTS = {
    "loop.jpg": (lambda path: path.symlink_to("loop.jpg"), "behind a broken link"),
    "nowhere.jpg": (lambda path: path.symlink_to("/not/mounted"), "behind a broken link"),
    "nowhere": (lambda path: path.symlink_to("gone"), "behind a broken link"),
    "pipe.jpg": (os.mkfifo, "unreadable"),
    "memory.jpg": (lambda path: path.symlink_to("/proc/self/mem"), "unreadable"),
    "empty.jpg": (lambda path: path.touch(), "undecodable"),
    "zeros.tif": (lambda path: path.write_bytes(bytes(999)), "undecodable"),
    "text.webp": (lambda path: path.write_text("<html>"), "undecodable"),
    "photo.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), "undecodable"),
    "cut": (lambda path: path.write_bytes(encode(3)[:45]), "undecodable"),
    "cut.part": (lambda path: path.write_bytes(encode(3, "JPEG")[:60]), "undecodable"),
    "camera.dng": (lambda path: path.write_bytes(encode(3, "TIFF")), "undecodable"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_an_image_that_cannot_be_used_is_counted_and_named(tmp_path, name):
    root = make_folder(tmp_path / "raw", train=40)
    make, reason = FAULTS[name]
    make(root / "train" / "ant" / name)
    (root / "train" / "ant" / "folder.jpg").mkdir()
    info = load("imagefolder", root, tmp_path / "out")
    assert (info.num_train, info.num_skipped) == (120, 1)
    assert list(info.skipped) == [reason] and info.skipped[reason]["number"] == 1
    [first] = info.skipped[reason]["first"]
    assert first.startswith(f"train/ant/{name} (") and first.endswith(")")
    for other in range(2):
        make(root / "train" / "ant" / f"{other}{name}")
    with pytest.raises(UserError, match=f"more than 1% of the 129 .* 3 {reason}: train/ant/"):
        load("imagefolder", root, tmp_path / "other")


def test_what_the_user_may_not_read_is_counted_and_named(tmp_path):
    root = make_folder(tmp_path / "raw", train=80)
    for parent in (tmp_path, *list(tmp_path.parents)[:-2]):
        if parent.stat().st_uid == os.geteuid():
            parent.chmod(0o755)
    tmp_path.chmod(0o777)
    (root / "train" / "ant" / "7.png").chmod(0)
    (root / "train" / "ant" / "kept").mkdir(mode=0)
    nobody, before = 65534, os.geteuid()
    if before == 0:
        os.seteuid(nobody)  # the superuser may read all
    try:
        info = load("imagefolder", root, tmp_path / "out")
    finally:
        os.seteuid(before)
    assert info.num_train == 239
    assert sorted(info.skipped["unreadable"]["first"]) == [
        "train/ant/7.png (Permission denied)",
        "train/ant/kept (Permission denied)",
    ]


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
def test_what_is_no_part_of_a_class_is_counted_by_reason(tmp_path, source, caplog):
    root = make_folder(tmp_path / "raw")
    ant, picture = root / "train" / "ant", encode(9)
    for path in ("no suffix", "x.JFIF", "y.jpg_original", "z.JPG~", "deep/er/w.gif"):  # are images
        (ant / path).parent.mkdir(parents=True, exist_ok=True)
        (ant / path).write_bytes(picture)
    found = {
        "hidden": [".x.png", ".hidden/x.png", ".cache/9f"],
        "of other programs": ["@eaDir/x.png", "__MACOSX/x.png", "._0.png", ".ipynb_checkpoints/x"],
        "files that are no images": ["a.txt", "b.json", "c.xml", "d.mp4", "Thumbs.db", "BM", "P5"],
    }
    for reason, paths in found.items():
        for path in paths:
            (ant / path).parent.mkdir(exist_ok=True)
            text = b"BMWs and P5 8 values" if reason == "files that are no images" else picture
            (ant / path).write_bytes(text)
    for path in ("x.png", "train/x.png", "val/x.png", "test/ant/x.png", "more/x.png"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(picture)
    (ant / "round").symlink_to("../../train")
    with caplog.at_level(logging.INFO):
        info = load(
            source, make_tar(root, tmp_path / "x.tar") if source == "tar" else root, tmp_path
        )
    assert info.num_train == 17 and info.num_skipped == 12
    assert {reason: skips["number"] for reason, skips in info.skipped.items()} == {
        "hidden": 3,
        "of other programs": 4,
        "files that are no images": 7,
        "outside of the class folders": 3,
        "of neither split": 2,
        "links round in a circle": 1,
    }
    named = info.skipped["files that are no images"]["first"]
    assert sorted(named) == sorted(f"train/ant/{n}" for n in found["files that are no images"])
    messages = [record.message for record in caplog.records]
    assert "Passed over 7 files that are no images" in messages
    [told] = [message for message in messages if message.startswith("Skipped 12 images: ")]
    assert "train/ant/.x.png" in told and "test/ant/x.png" in told and "a.txt" not in told


def test_no_class_is_emptied_by_skipping(tmp_path):
    root = make_folder(tmp_path / "raw", classes=("ant", "bee"), train=300, val=1)
    (root / "val" / "bee" / "0.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"no image of class 'bee' in val can be used \(val/bee/0"):
        load("imagefolder", root, tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["lock"]
    for lost in (root / "val" / "bee" / "0.png", root / "val" / "bee"):
        lost.unlink() if lost.is_file() else lost.rmdir()
        lost.symlink_to("/not/mounted")
        message = r"no images in val/ of class 'bee' \(val/bee.*: -> /not/mounted\)"
        with pytest.raises(UserError, match=message):
            load("imagefolder", root, tmp_path / "out")
        lost.unlink()
    (root / "val" / "bee").mkdir()
    (root / "val" / "bee" / "0.png").write_bytes(encode(1))
    (root / "train" / "cow").symlink_to("/not/mounted")
    message = r"val/ lacks 'cow' \(train/cow: -> /not/mounted\); both need"
    with pytest.raises(UserError, match=message):
        load("imagefolder", root, tmp_path / "out")
    os.rename(root / "val", tmp_path / "elsewhere")
    (root / "val").symlink_to("/not/mounted")
    with pytest.raises(UserError, match=r"val/ is behind a broken link \(-> /not/mounted\)"):
        load("imagefolder", root, tmp_path / "out")


def test_images_with_a_word_are_counted(tmp_path, caplog):
    root = make_folder(tmp_path / "raw")
    pages = [Image.new("RGB", (4, 4), (0, 0, 9 * page)) for page in range(3)]
    pages[0].save(root / "train" / "ant" / "film.gif", save_all=True, append_images=pages[1:])
    with caplog.at_level(logging.INFO):
        info = load("imagefolder", root, tmp_path / "out")
    assert list(info.notes.values()) == [1] and "of which the first is taken" in [*info.notes][0]
    assert f"1 images: each {[*info.notes][0]}" in caplog.text


def test_two_imports_into_one_folder_are_kept_apart(tmp_path):
    root = make_folder(tmp_path / "raw")
    with (
        locks.held(str(tmp_path / "out")),
        pytest.raises(UserError, match="out is in use by another nasray process"),
    ):
        load("imagefolder", root, tmp_path / "out")
    load("imagefolder", root, tmp_path / "out")


@pytest.mark.parametrize("content", ["[]", "{}", '{"shards": {"train": 3}}', '{"shards": {}}'])
def test_an_info_file_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UserError, match=r"dataset\.json: not written by this nasray"):
        open_dataset(str(tmp_path))


def test_a_lost_or_damaged_shard_is_named(tmp_path):
    load("imagefolder", make_folder(tmp_path / "raw"), tmp_path / "out")
    shard = tmp_path / "out" / "train-00000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"train-00000\.parquet: missing or damaged"):
        open_dataset(str(tmp_path / "out")).labels("train")
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.parquet: missing or damaged"):
        open_dataset(str(tmp_path / "out")).labels("train")


def remove_split(root: Path, name: str) -> None:
    (root / name).rename(root / "elsewhere")


MISTAKES = {
    "no train": (lambda root: remove_split(root, "train"), r"has val/ and no train/ folder"),
    "a folder of data sets": (
        lambda root: (
            [(root / "a").mkdir(), (root / "train").rename(root / "a" / "train")]
            and (root / "val").rename(root / "b")
        ),
        r"has no train/ folder, but a/ has one; name a/",
    ),
    "classes differ": (
        lambda root: (root / "val" / "cat").rename(root / "val" / "cow"),
        r"train/ lacks 'cow' and val/ lacks 'cat'",
    ),
    "empty class": (
        lambda root: [file.unlink() for file in (root / "val" / "bee").iterdir()],
        r"no images in val/ of class 'bee'",
    ),
    "no classes": (
        lambda root: [folder.rename(root / folder.name) for folder in (root / "train").iterdir()],
        r"train/ holds 0 class folders",
    ),
    "one class": (
        lambda root: [(root / "train" / name).rename(root / name) for name in ("ant", "bee")],
        r"train/ holds 1 class folders, and a classifier needs two",
    ),
}


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_layout_is_one_line(tmp_path, source, mistake):
    spoil, message = MISTAKES[mistake]
    path = make_folder(tmp_path / "raw")
    spoil(path)
    if source == "tar":
        path = make_tar(path, tmp_path / "x.tar")
    with pytest.raises(UserError, match=message) as caught:
        load(source, path, tmp_path / "out")
    text = str(caught.value)
    assert text.startswith(f"data.path = {str(path)!r}: ") and "\n" not in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
def test_images_may_lie_straight_in_their_class_folders(tmp_path, source):
    root = make_folder(tmp_path / "raw")
    place = root / "train"
    path = make_tar(place, tmp_path / "x.tar", "birds") if source == "tar" else place
    info = load(source, path, tmp_path / "out")
    assert (info.classes, info.num_train, info.num_val) == (["ant", "bee", "cat"], 12, 0)
    names = open_dataset(str(tmp_path / "out")).column("train", "name").to_pylist()
    assert {name.split("/")[0] for name in names} == {"ant", "bee", "cat"}


def test_of_several_folders_to_report_on_one_is_used_and_the_others_are_named(tmp_path, caplog):
    root = make_folder(tmp_path / "raw", val_name="validation")
    for name in ("test", "valid"):
        (root / "validation").rename(root / name)
        make_folder(tmp_path / name)
        (tmp_path / name / "val").rename(root / "validation")
    load("imagefolder", root, tmp_path / "out")
    assert "valid/ is used, validation/ and test/ is not" in caplog.text


def test_with_a_share_to_report_on_the_images_of_val_are_divided_anew_with_all_others(
    tmp_path, caplog
):
    caplog.set_level(logging.INFO)
    root = make_folder(tmp_path / "raw")
    config = DataConfig(source="imagefolder", path=str(root), val_share=0.3)
    info = import_dataset(config, str(tmp_path / "out"), seed=0)
    assert (info.num_train, info.num_val) == (18, 0)
    names = open_dataset(str(tmp_path / "out")).column("train", "name").to_pylist()
    from_val = [name.startswith("val/") for name in names]
    assert sum(from_val) == 6 and from_val != sorted(from_val)
    assert "6 images of val are divided anew with all others" in caplog.text


def test_equal_pictures_have_equal_numbers_whatever_their_format(tmp_path):
    root = make_folder(tmp_path / "raw")
    with Image.open(root / "train" / "ant" / "0.png") as picture:
        picture.save(root / "train" / "ant" / "copy.bmp")
    load("imagefolder", root, tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    names = dataset.column("train", "name").to_pylist()
    number = dict(zip(names, dataset.pictures("train").tolist(), strict=True))
    assert number["train/ant/copy.bmp"] == number["train/ant/0.png"]
    assert len(set(number.values())) == 12
    assert dataset.column("train", "width").to_pylist() == [12] * 13


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
def test_an_absent_path_and_the_wrong_kind_of_path_are_refused(tmp_path, source):
    with pytest.raises(UserError, match="does not exist"):
        load(source, tmp_path / "nowhere", tmp_path / "out")
    root = make_folder(tmp_path / "raw")
    wrong = {"tar": root, "imagefolder": make_tar(root, tmp_path / "x.tar")}[source]
    with pytest.raises(UserError, match="set source = "):
        load(source, wrong, tmp_path / "out")


def test_a_tar_cut_short_anywhere_is_refused(tmp_path):
    whole = make_tar(make_folder(tmp_path / "raw"), tmp_path / "x.tar").read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for size in (0, 100, 512 * 7, 512 * 8 + 30, end - 700, end):
        (tmp_path / "cut.tar").write_bytes(whole[:size])
        with pytest.raises(UserError, match="again") as caught:
            load("tar", tmp_path / "cut.tar", tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_a_file_that_is_no_tar_and_a_zipped_tar_are_refused(tmp_path):
    (tmp_path / "text.tar").write_text("hello " * 1000)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(make_folder(tmp_path / "raw"), ".")
    for name, message in (
        ("text.tar", "not an uncompressed tar, or cut short"),
        ("x.tar.gz", "is compressed by gzip, not an uncompressed tar.*; gunzip it"),
    ):
        with pytest.raises(UserError, match=message):
            load("tar", tmp_path / name, tmp_path / "out")


def test_a_tar_with_a_damaged_header_in_its_middle_is_refused(tmp_path):
    target = make_tar(make_folder(tmp_path / "raw"), tmp_path / "x.tar")
    with tarfile.open(target) as archive:
        offset = archive.getmembers()[10].offset
    content = bytearray(target.read_bytes())
    content[offset : offset + 512] = b"\x07" * 512
    target.write_bytes(content)
    with pytest.raises(UserError, match=f"byte {offset}"):
        load("tar", target, tmp_path / "out")


def test_names_in_a_tar_never_reach_the_disk(tmp_path):
    target = make_tar(make_folder(tmp_path / "raw"), tmp_path / "x.tar")
    with tarfile.open(target, "a") as archive:
        for name in ("../evil.png", f"{tmp_path}/evil.png"):
            member = tarfile.TarInfo(name)
            member.size = len(encode(1))
            archive.addfile(member, io.BytesIO(encode(1)))
    info = load("tar", target, tmp_path / "out")
    assert info.num_train == 12 and info.skipped["of neither split"]["number"] == 2
    assert not list(tmp_path.rglob("evil*"))


def add(archive: tarfile.TarFile, name: str, content: bytes = b"", **fields) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    archive.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_is_what_it_unpacks_to(tmp_path, kind):
    target, link = tmp_path / "x.tar", {"type": tarfile.SYMTYPE}
    with tarfile.open(target, "w", format=kind) as archive:
        for path in ("train/ant", "./train/bee", "val/ant/", "val/bee"):
            add(archive, f"{path}/0.png", encode(len(path)))
        long = "é" * 40 + "/" + "n" * 90
        add(archive, f"train/ant/{long}.png", encode(40))
        add(archive, "train/ant/0.png", encode(41))  # in place of the first
        add(archive, "train/ant/hard.png", type=tarfile.LNKTYPE, linkname="train/bee/0.png")
        add(archive, "train/bee/0.png", encode(42))  # the hard link keeps the one before
        add(archive, "train/ant/soft.png", linkname="../bee/0.png", **link)
        add(archive, "train/ant/chain.png", linkname="soft.png", **link)
        add(archive, "train/bee/folder", linkname="../../val/./bee", **link)
        add(archive, "train/bee/round", linkname="..", **link)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xf", target, "-C", unpacked], check=True)
    from_tar = load("tar", target, tmp_path / "a")
    from_folder = load("imagefolder", unpacked, tmp_path / "b")
    assert from_tar.num_train == 7 and from_tar.fingerprint == from_folder.fingerprint
    assert from_tar.skipped == from_folder.skipped == {"links round in a circle": ANY}


def test_links_out_of_a_tar_are_broken_and_sparse_members_are_read(tmp_path):
    content = encode(7, "BMP") + bytes(1 << 16)
    holes = tmp_path / "holes.bmp"
    with open(holes, "wb") as file:
        file.write(content[:400])
        file.seek(len(content) - 1)
        file.write(b"\0")
    root = make_folder(tmp_path / "raw", train=40)
    target = make_tar(root, tmp_path / "x.tar")
    subprocess.run(
        ["tar", "-rSf", target, "--transform=s,^,train/ant/,", "-C", tmp_path, holes.name],
        check=True,
    )
    with tarfile.open(target) as archive:
        assert archive.getmember("train/ant/holes.bmp").issparse()
    with tarfile.open(target, "a") as archive:
        add(archive, "train/ant/out.png", type=tarfile.SYMTYPE, linkname="../../../out.png")
    info = load("tar", target, tmp_path / "out")
    assert info.num_train == 121
    first = ["train/ant/out.png (-> ../../../out.png)"]
    assert info.skipped == {"behind a broken link": {"number": 1, "first": first}}


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
@pytest.mark.parametrize("names", [("Train", "Test"), ("training", "testing"), ("TRAIN", "VALID")])
def test_splits_are_known_by_the_names_that_people_give(tmp_path, source, names):
    root = make_folder(tmp_path / "raw", val_name=names[1])
    (root / "train").rename(root / names[0])
    path = make_tar(root, tmp_path / "x.tar") if source == "tar" else root
    info = load(source, path, tmp_path / "out")
    assert (info.classes, info.num_train, info.num_val) == (["ant", "bee", "cat"], 12, 6)


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
def test_a_path_that_is_no_utf8_is_one_line(tmp_path, source):
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    root = make_folder(place)
    path = make_tar(root, place / "x.tar") if source == "tar" else root
    with pytest.raises(UserError, match=r"caf\\xe9.*is no UTF-8; rename it"):
        load(source, path, tmp_path / "out")
    (tmp_path / "link").symlink_to(path)
    assert load(source, tmp_path / "link", tmp_path / "out").num_train == 12


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
def test_names_in_any_bytes_are_read_and_shown(tmp_path, source):
    root = make_folder(tmp_path / "raw", classes=("ant", "bee"))
    for split in ("train", "val"):
        os.rename(root / split / "ant", os.fsencode(root / split) + b"/caf\xe9")
    os.rename(root / "train" / "bee" / "0.png", os.fsencode(root / "train/bee") + b"/\x82\xa0.png")
    path = make_tar(root, tmp_path / "x.tar") if source == "tar" else root
    info = load(source, path, tmp_path / "out")
    assert info.classes == ["bee", "caf\\xe9"]
    assert (info.num_train, info.num_val) == (8, 4)
    names = pq.read_table(tmp_path / "out" / "train-00000.parquet").column("name").to_pylist()
    assert "train/bee/\\x82\\xa0.png" in names and "train/caf\\xe9/0.png" in names


@pytest.mark.parametrize("source", ["imagefolder", "tar"])
def test_the_forms_of_one_name_are_one_class(tmp_path, source, caplog):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    root = make_folder(tmp_path / "raw", classes=("ant", decomposed))
    (root / "val" / decomposed).rename(root / "val" / composed)
    path = make_tar(root, tmp_path / "x.tar") if source == "tar" else root
    info = load(source, path, tmp_path / "out")
    assert info.classes == ["ant", composed] and not caplog.records
    (root / "train" / composed).mkdir()
    (root / "train" / composed / "0.png").write_bytes(encode(3))
    path = make_tar(root, tmp_path / "x.tar") if source == "tar" else root
    assert load(source, path, tmp_path / "other").num_train == 9
    assert "train/café: 2 folders" in caplog.text


def test_a_folder_without_an_imported_data_set_says_how_to_get_one(tmp_path):
    with pytest.raises(UserError, match="nasray data import"):
        open_dataset(str(tmp_path))


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    root = make_folder(tmp_path / "raw", train=100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))  # bytes; writes beyond fail
    try:
        with pytest.raises(UserError, match="free some space"):
            load("imagefolder", root, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path / "out") == ["lock"]


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    path.write_bytes(header + values.tobytes())


def test_fashion_mnist_is_read_from_torchvisions_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels, labels = {}, {}
    for split, prefix, num in (("train", "train", 30), ("val", "t10k", 10)):
        pixels[split] = rng.integers(0, 256, (num, 28, 28), dtype=np.uint8)
        labels[split] = (np.arange(num) % 10).astype(np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", pixels[split])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels[split])
    load("fashion_mnist", tmp_path, tmp_path / "out")
    dataset = open_dataset(str(tmp_path / "out"))
    assert dataset.classes[0] == "T-shirt/top" and dataset.num("train") == 30
    found = {
        np.asarray(decode(image))[..., 1].tobytes(): label
        for image, label in zip(
            dataset.read("train", np.arange(30)), dataset.labels("train"), strict=True
        )
    }
    expected = zip(pixels["train"], labels["train"], strict=True)
    assert found == {picture.tobytes(): label for picture, label in expected}


@pytest.mark.parametrize("source, name", [("cifar10", "CIFAR10"), ("fashion_mnist", "Fashion")])
def test_an_absent_torchvision_set_says_how_to_download_it(tmp_path, source, name):
    with pytest.raises(UserError, match=f"import {name}.*download=True") as caught:
        load(source, tmp_path, tmp_path / "out")
    assert "\n" not in str(caught.value)


def test_a_data_set_reads_and_writes_through_a_uri(tmp_path):
    root = make_folder(tmp_path / "raw")
    uri = f"file://{tmp_path}/out"
    config = DataConfig(source="imagefolder", path=f"file://{root}")
    info = import_dataset(config, uri, seed=0)
    assert storage.exists(f"{uri}/dataset.json")
    assert open_dataset(uri).labels("train").shape == (12,)
    assert info.fingerprint == load("imagefolder", root, tmp_path / "other").fingerprint


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared pictures beside the repository")
def test_the_sign_digits_are_imported_whole(tmp_path):
    info = load("tar", SHARED / "signdigits" / "signdigits.tar", tmp_path / "out")
    assert info.classes == [str(digit) for digit in range(10)]
    assert (info.num_train, info.num_val, info.num_skipped) == (1644, 418, 0)
