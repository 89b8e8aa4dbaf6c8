"""Importing a data set and reading it back."""

import io
import json
import logging
import os
import pickle
import pkgutil
import resource
import struct
import tarfile
from pathlib import Path

import numpy as np
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
    assert not from_folder.skipped


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
    assert names == shards | {"dataset.json", "lock", "notes.txt"}
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
    assert info.skipped == ["train/bee/9.png"]
    assert [record.message for record in caplog.records] == [
        "Skipped 1 undecodable images: train/bee/9.png"
    ]
    written = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert written["skipped"] == ["train/bee/9.png"]


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


def test_an_image_that_cannot_be_read_is_skipped_like_one_that_cannot_be_decoded(tmp_path):
    root = make_folder(tmp_path / "raw", train=40)
    (root / "train" / "ant" / "loop.jpg").symlink_to("loop.jpg")
    (root / "train" / "ant" / "folder.jpg").mkdir()
    os.mkfifo(root / "train" / "ant" / "pipe.jpg")
    info = load("imagefolder", root, tmp_path / "out")
    assert info.num_train == 120


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
    assert "reports are on the images of valid/; validation/ and test/ is not used" in caplog.text


def test_with_a_share_to_report_on_the_images_of_val_are_divided_anew_with_all_others(tmp_path):
    root = make_folder(tmp_path / "raw")
    config = DataConfig(source="imagefolder", path=str(root), val_share=0.3)
    info = import_dataset(config, str(tmp_path / "out"), seed=0)
    assert (info.num_train, info.num_val) == (18, 0)
    names = open_dataset(str(tmp_path / "out")).column("train", "name").to_pylist()
    from_val = [name.startswith("val/") for name in names]
    assert sum(from_val) == 6 and from_val != sorted(from_val)


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
    for name in ("text.tar", "x.tar.gz"):
        with pytest.raises(UserError, match="not an uncompressed tar"):
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
    assert load("tar", target, tmp_path / "out").num_train == 12
    assert not list(tmp_path.rglob("evil*"))


def test_a_link_in_a_tar_is_refused_by_name(tmp_path):
    root = make_folder(tmp_path / "raw")
    (root / "train" / "ant" / "link.png").symlink_to("0.png")
    assert load("imagefolder", root, tmp_path / "out").num_train == 13
    with pytest.raises(UserError, match=r"link\.png.*--dereference"):
        load("tar", make_tar(root, tmp_path / "x.tar"), tmp_path / "other")


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
