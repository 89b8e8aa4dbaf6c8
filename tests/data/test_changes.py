"""Whether a source still holds what was imported from it."""

import logging
import os
import shutil
from pathlib import Path

import pytest

from nasray.config import DataConfig
from nasray.data.changes import difference
from nasray.data.importing import import_dataset
from nasray.data.shards import read_stamps
from nasray.errors import UserError
from tests.data.test_sources import encode, make_folder, make_tar

FOLDER, TAR = "imagefolder", "tar"


def imported(tmp_path: Path, source: str = FOLDER, path: Path | None = None, **keys) -> DataConfig:
    path = path or make_folder(tmp_path / "raw")
    config = DataConfig(source=source, path=str(path), **keys)
    import_dataset(config, str(tmp_path / "out"), seed=0)
    return config


def found(config: DataConfig, tmp_path: Path, path: Path | None = None, **changes) -> str | None:
    changes |= {"path": str(path)} if path else {}
    return difference(config.model_copy(update=changes), str(tmp_path / "out"), seed=0)


def rewrite(path: Path, content: bytes) -> None:
    """Write a file so that its time differs, whatever the clock's resolution."""
    path.write_bytes(content)
    os.utime(path, ns=(1, 1))


CHANGES = {
    "an image more": (
        lambda root: (root / "train/ant/9.png").write_bytes(encode(9)),
        "9.png is new",
    ),
    "an image less": (lambda root: (root / "val/bee/0.png").unlink(), "val/bee/0.png is gone"),
    "other pixels, same size": (
        lambda root: rewrite(root / "train/cat/1.png", encode(1)),
        "train/cat/1.png has changed",
    ),
    "a class more": (lambda root: make_folder(root, ("dog",)), "train/dog/0.png is new"),
    "an empty class": (
        lambda root: [file.unlink() for file in (root / "val/bee").iterdir()],
        "no images in val/ of class 'bee'",
    ),
    "another class": (
        lambda root: (root / "train/ant/0.png").rename(root / "train/bee/10.png"),
        "train/bee/10.png is new",
    ),
}


@pytest.mark.parametrize("source", [FOLDER, TAR])
@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_named(tmp_path, source, change):
    root = make_folder(tmp_path / "raw")
    tar = make_tar(root, tmp_path / "x.tar")
    config = imported(tmp_path, source, tar if source == TAR else root)
    assert found(config, tmp_path) is None
    spoil, message = CHANGES[change]
    spoil(root)
    rewrite(make_tar(root, tmp_path / "x.tar"), (tmp_path / "x.tar").read_bytes())
    assert message in (found(config, tmp_path) or "")


@pytest.mark.parametrize("source", [FOLDER, TAR])
def test_a_source_that_was_moved_or_copied_or_touched_is_the_same(tmp_path, source, monkeypatch):
    root = make_folder(tmp_path / "raw")
    path = make_tar(root, tmp_path / "x.tar") if source == TAR else root
    config = imported(tmp_path, source, path)
    path = path.rename(tmp_path / "moved")
    assert found(config, tmp_path, path) is None
    copy = (shutil.copy if source == TAR else shutil.copytree)(path, tmp_path / "copy")
    for file in copy.rglob("*.png") if source == FOLDER else [copy]:
        os.utime(file, ns=(5, 5))
    if source == FOLDER:
        (copy / "README").write_text("no image")
    assert found(config, tmp_path, copy) is None
    # Compared once: now the times are those of the copy.
    monkeypatch.setattr("nasray.data.changes.open_source", None)
    assert found(config, tmp_path, copy) is None


def test_an_import_without_recorded_times_is_compared_by_content(tmp_path):
    config = imported(tmp_path)
    (tmp_path / "out/source.parquet").unlink()
    assert found(config, tmp_path) is None
    assert len(read_stamps(str(tmp_path / "out"))) == 18
    (tmp_path / "out/source.parquet").unlink()
    (tmp_path / "raw/val/cat/0.png").write_bytes(encode(3))
    assert found(config, tmp_path) == "val/cat/0.png has changed"


def test_an_image_that_was_skipped_is_no_change_until_it_is_mended(tmp_path):
    root = make_folder(tmp_path / "raw", train=40)
    broken = root / "train/bee/9.png"
    broken.write_bytes(b"no image")
    config = imported(tmp_path, path=root)
    for _ in range(2):
        assert found(config, tmp_path) is None
        os.utime(broken, ns=(7, 7))
    broken.write_bytes(encode(9))
    assert found(config, tmp_path) == "train/bee/9.png is new"


def test_names_of_any_bytes_are_kept(tmp_path):
    config = imported(tmp_path)
    name = os.fsencode(tmp_path) + b"/raw/caf\xe9.txt"
    with open(name, "w") as file:
        file.write("no image")
    assert found(config, tmp_path) is None
    assert os.fsdecode(b"caf\xe9.txt") in read_stamps(str(tmp_path / "out"))


def test_a_source_that_is_gone_or_cannot_be_reached_is_a_word(tmp_path, caplog):
    config = imported(tmp_path)
    (tmp_path / "raw").rename(tmp_path / "away")
    with caplog.at_level(logging.WARNING):
        assert found(config, tmp_path) is None
    assert "raw' is not there any more; going on with the images" in caplog.text
    with pytest.raises(UserError, match=rf"is not there; correct it, or give --data {config.path}"):
        found(config, tmp_path, tmp_path / "nowhere")


def test_another_source_generator_or_way_of_dividing_is_a_difference(tmp_path):
    config = imported(tmp_path)
    assert "source = 'imagefolder', not 'tar'" in (found(config, tmp_path, source=TAR) or "")
    assert "pooled = None, not 1" in (found(config, tmp_path, val_share=0.2) or "")
    drawn = DataConfig(source="synthetic", train_per_class=2, val_per_class=1, image_side=16)
    import_dataset(drawn, str(tmp_path / "drawn"), seed=0)
    assert difference(drawn, str(tmp_path / "drawn"), seed=0) is None
    more = drawn.model_copy(update={"train_per_class": 3})
    assert "train_per_class = 2, not 3" in (difference(more, str(tmp_path / "drawn"), seed=0) or "")


def test_a_table_and_the_files_that_it_names_are_compared(tmp_path):
    root = make_folder(tmp_path / "raw")
    files = sorted(root.rglob("*.png"))
    rows = [f"{file.relative_to(tmp_path)},{file.parent.name}" for file in files]
    table = tmp_path / "list.csv"
    table.write_text("\n".join(["path,label", *rows]))
    config = imported(tmp_path, "csv", table)
    assert found(config, tmp_path) is None
    rewrite(files[3], encode(77))
    assert found(config, tmp_path) == f"{files[3].relative_to(tmp_path)} has changed"
    import_again = tmp_path / "out/dataset.json"
    import_again.unlink()
    import_dataset(config, str(tmp_path / "out"), seed=0)
    table.write_text("\n".join(["path,label", *rows[:-1], rows[-1].replace(",cat", ",bee")]))
    assert "was of class 'cat' in train" in (found(config, tmp_path) or "")
