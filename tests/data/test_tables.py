"""Importing tables of images: text, Parquet, and what Hugging Face's `datasets` saves."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from nasray.cli.main import main
from nasray.config import DataConfig
from nasray.data.importing import import_dataset
from nasray.data.shards import open_dataset
from nasray.errors import UserError
from tests.data.test_sources import SHARED, make_folder

CLASSES = ("ant", "bee")


def load(source: str, path: Path, destination: Path, **keys):
    config = DataConfig(source=source, path=str(path), **keys)
    return import_dataset(config, str(destination), seed=0)


def pictures(destination: Path) -> dict[str, list]:
    """(class, bytes) of every image, by split."""
    dataset = open_dataset(str(destination))
    return {
        split: sorted(
            zip(
                [dataset.classes[label] for label in dataset.labels(split)],
                dataset.read(split, np.arange(dataset.num(split))),
                strict=True,
            )
        )
        for split in ("train", "val")
    }


@pytest.fixture
def rows(tmp_path) -> list[dict]:
    """What a table would say of the images of a folder."""
    root = make_folder(tmp_path / "raw", classes=CLASSES)
    load("imagefolder", root, tmp_path / "folder")
    return [
        {"path": f"raw/{path.relative_to(root)}", "label": path.parent.name, "split": split}
        for split in ("train", "val")
        for path in sorted((root / split).rglob("*.png"))
    ]


def write_csv(path: Path, rows: list[dict], delimiter: str = ",", names=None) -> Path:
    lines = [delimiter.join(names or rows[0])]
    lines += [delimiter.join(map(str, row.values())) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig", errors="surrogateescape")
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def save_to_disk(folder: Path, rows: list[dict], names=CLASSES, shards: int = 2) -> None:
    """Write what Dataset.save_to_disk() writes."""
    folder.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())])
    files = [f"data-{shard:05}-of-{shards:05}.arrow" for shard in range(shards)]
    for shard, name in enumerate(files):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
            stream.write_table(pa.Table.from_pylist(rows[shard::shards], schema))
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    state = {"_data_files": [{"filename": name} for name in files], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_csv_gives_the_images_that_its_rows_name(tmp_path, rows, delimiter):
    found = load("csv", write_csv(tmp_path / "x.csv", rows, delimiter), tmp_path / "out")
    assert found.classes == ["ant", "bee"] and not found.skipped
    assert pictures(tmp_path / "out") == pictures(tmp_path / "folder")


def test_a_parquet_table_gives_the_images_that_its_rows_name_or_hold(tmp_path, rows):
    load("table", write_parquet(tmp_path / "x.parquet", rows), tmp_path / "out")
    assert pictures(tmp_path / "out") == pictures(tmp_path / "folder")
    table = pa.Table.from_pylist(rows)
    encoded = [column.dictionary_encode() for column in table.columns]
    pq.write_table(pa.table(dict(zip(table.column_names, encoded, strict=True))), tmp_path / "z")
    load("table", tmp_path / "z", tmp_path / "categories")
    assert pictures(tmp_path / "categories") == pictures(tmp_path / "folder")
    held = [row | {"image": (tmp_path / row["path"]).read_bytes(), "path": "gone"} for row in rows]
    load("table", write_parquet(tmp_path / "y.parquet", held), tmp_path / "other")
    assert pictures(tmp_path / "other") == pictures(tmp_path / "folder")


def test_columns_of_other_names_and_splits_in_other_words(tmp_path, rows):
    words = {"train": "Training", "val": "validation"}
    path = write_csv(
        tmp_path / "x.csv",
        [row | {"split": words[row["split"]]} for row in rows],
        names=("file", "kind", "part"),
    )
    keys = {"image_column": "file", "label_column": "kind", "split_column": "part"}
    load("csv", path, tmp_path / "out", **keys)
    assert pictures(tmp_path / "out") == pictures(tmp_path / "folder")
    with pytest.raises(UserError, match="made with split_column = 'part', the job says ''"):
        load("csv", path, tmp_path / "out", **{**keys, "split_column": ""})


def test_the_command_line_names_columns(tmp_path, rows):
    path = write_csv(tmp_path / "x.csv", rows, names=("file", "kind", "part"))
    command = ["data", "import", "csv", str(tmp_path / "out"), "--path", str(path)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 1
    assert "set data.image_column (--image-column) to one of ['file', 'kind'" in result.output
    command += ["--image-column", "file", "--label-column", "kind", "--split-column", "part"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert pictures(tmp_path / "out") == pictures(tmp_path / "folder")


def test_without_splits_all_rows_are_to_be_divided(tmp_path, rows):
    for row in rows:
        del row["split"]
    found = load("csv", write_csv(tmp_path / "x.csv", rows), tmp_path / "out")
    assert (found.num_train, found.num_val) == (12, 0)


@pytest.mark.parametrize("whole", [True, False])
def test_a_folder_that_datasets_saved_is_read(tmp_path, rows, whole):
    for split in ("train", "val"):
        saved = [
            {
                "image": {"bytes": (tmp_path / row["path"]).read_bytes(), "path": None}
                if number % 2
                else {"bytes": None, "path": str(tmp_path / row["path"])},
                "label": ("bee", "ant").index(row["label"]),
            }
            for number, row in enumerate(rows)
            if whole or row["split"] == split
        ]
        place = tmp_path / "saved" / ("" if whole else {"val": "validation"}.get(split, split))
        if not place.exists():
            save_to_disk(place, saved, names=("bee", "ant"))
    if not whole:
        content = json.dumps({"splits": ["train", "validation"]})
        (tmp_path / "saved" / "dataset_dict.json").write_text(content)
    found = load("huggingface", tmp_path / "saved", tmp_path / "out")
    assert found.classes == ["bee", "ant"]  # in its order
    expected = pictures(tmp_path / "folder")
    if whole:
        expected = {"train": sorted(expected["train"] + expected["val"]), "val": []}
    assert pictures(tmp_path / "out") == expected


def test_rows_that_cannot_be_used_are_counted_and_named(tmp_path, rows):
    many = [row for row in rows for _ in range(40)]
    row = many[0]
    many += [row | {"path": "raw/gone.png"}, row | {"label": ""}, row | {"split": "unused"}]
    found = load("csv", write_csv(tmp_path / "x.csv", many), tmp_path / "out")
    assert found.num_skipped == 3
    assert {reason: skips["first"] for reason, skips in found.skipped.items()} == {
        "of neither split": ["raw/train/ant/0.png (split 'unused')"],
        "without a label": ["raw/train/ant/0.png (label '')"],
        "unreadable": ["raw/gone.png (No such file or directory)"],
    }


MISTAKES = {
    "no such column": (
        ["image;label\n"],
        r"has no column 'path' or .* set data.image_column .* to",
    ),
    "fields too many": (["path,label\n", "a.png,x,y\n"], "line 2 has 3 fields, the first line 2"),
    "an open quote": (["path,label\n", '"a.png,x\n'], r"line 2: unexpected end of data; mend"),
    "one class": (["path,label\n", "a.png,x\n"], "its training rows are of 1 classes"),
    "nothing": ([], r"begins with an empty line"),
    "no train": (["path,label,split\n", "a.png,x,fold1\n"], r"'train'; there are \['fold1'\]"),
    "a class in train alone": (
        ["path,label,split\n", "a,x,train\n", "b,y,train\n", "c,x,val\n"],
        "split 'val' has no rows of 1 classes: 'y'",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_csv_is_one_line(tmp_path, mistake):
    lines, message = MISTAKES[mistake]
    lines[0:1] = [line.replace("image;", "imge;") for line in lines[0:1]]
    (tmp_path / "x.csv").write_text("".join(lines))
    with pytest.raises(UserError, match=message) as caught:
        load("csv", tmp_path / "x.csv", tmp_path / "out")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("data.path = ")


def test_a_wrong_kind_of_file_is_one_line(tmp_path, rows):
    path = write_csv(tmp_path / "x.csv", rows)
    with pytest.raises(UserError, match="give a Parquet file"):
        load("table", path, tmp_path / "out")
    with pytest.raises(UserError, match=r"is no folder of datasets.save_to_disk\(\)"):
        load("huggingface", tmp_path / "raw", tmp_path / "out")
    for source in ("csv", "table"):
        with pytest.raises(UserError, match="is a folder; give the file"):
            load(source, tmp_path, tmp_path / "out")
    table = write_parquet(tmp_path / "x.parquet", [{"path": 3, "label": "x"}])
    with pytest.raises(UserError, match="'path' holds int64, neither paths nor encoded images"):
        load("table", table, tmp_path / "out")
    table = write_parquet(tmp_path / "x.parquet", [{"path": "a", "label": ["x", "y"]}])
    with pytest.raises(UserError, match=r"'label' holds list<.*not one class for each image"):
        load("table", table, tmp_path / "out")
    with pytest.raises(UserError, match=r"'lable': .* did you mean 'label'\?"):
        load("csv", path, tmp_path / "out", label_column="lable")


def test_paths_and_labels_of_any_bytes(tmp_path, rows):
    name = b"raw/caf\xe9.png"
    os.rename(tmp_path / rows[0]["path"], os.fsencode(tmp_path) + b"/" + name)
    rows[0]["path"] = os.fsdecode(name)
    found = load("csv", write_csv(tmp_path / "x.csv", rows), tmp_path / "out")
    assert (found.num_train, found.num_skipped) == (8, 0)
    names = pq.read_table(tmp_path / "out" / "train-00000.parquet").column("name").to_pylist()
    assert "raw/caf\\xe9.png" in names


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared pictures beside the repository")
def test_cifar10_as_parquet_is_read(tmp_path):
    part = pq.read_table(SHARED / "cifar10" / "train.parquet").slice(0, 300)
    labels = pa.array([row % 3 for row in range(300)])
    path = tmp_path / "x.parquet"
    pq.write_table(part.set_column(part.schema.names.index("label"), "label", labels), path)
    found = load("table", path, tmp_path / "out")
    assert (found.num_train, found.classes) == (300, ["0", "1", "2"])
