"""What is found in a data set before anything is trained on it."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import nasray
from nasray.cli.main import main
from nasray.config import DataConfig
from nasray.data.importing import import_dataset
from nasray.data.survey import sentences, standard_error, survey
from tests.data.test_sources import encode, make_folder

SHARED = Path(__file__).parents[3] / "shared" / "data"


def found_in(path: Path, **keys):
    return survey(DataConfig(source="imagefolder", path=str(path), **keys), 0)


def test_equal_pictures_in_two_classes_and_in_both_splits_are_named(tmp_path):
    root = make_folder(tmp_path / "raw")
    shutil.copy(root / "train/ant/0.png", root / "train/bee/x.png")
    with Image.open(root / "train/cat/1.png") as picture:  # equal pixels in another format
        picture.save(root / "val/cat/x.bmp")
    found = found_in(root)
    assert found["same_in_two_classes"] == {
        "number": 1,
        "first": [["train/ant/0.png", "train/bee/x.png"]],
    }
    assert found["same_in_two_splits"]["first"] == [["train/cat/1.png", "val/cat/x.bmp"]]
    assert found["copies"] == 2
    problems = sentences(found)[1]
    assert problems[-1] == (
        "1 pictures lie in two classes, first train/ant/0.png = train/bee/x.png"
    )


def test_what_an_import_would_refuse_is_counted_all_the_same(tmp_path):
    root = make_folder(tmp_path / "raw")
    for name in ("0.png", "1.png"):
        (root / "train/ant" / name).write_bytes(b"no image")
    found = found_in(root)
    assert found["images"] == {"train": 10, "val": 6}
    assert found["classes"]["ant"] == {"train": 2, "val": 2}
    assert found["skipped"]["undecodable"]["number"] == 2
    assert any("skipped: 2 undecodable (train/ant/" in each for each in sentences(found)[1])


def test_sizes_imbalance_and_how_sure_a_top1_is_are_said(tmp_path):
    root = make_folder(tmp_path / "raw", train=10)
    for number in range(30):
        (root / "train/ant" / f"more{number}.png").write_bytes(encode(200 + number))
    found = found_in(root)
    assert found["width"] == {"min": 12, "median": 12, "max": 12}
    assert found["imbalance"] == pytest.approx(42 / 12)
    assert found["parts"] == {"training": 48, "holdout": 12, "validation": 6}
    assert found["standard_error"]["holdout"]["0.9"] == pytest.approx((0.9 * 0.1 / 12) ** 0.5)
    facts, problems = sentences(found)
    assert "12 images to choose by: standard error of a top-1, points: 14.4 at 50%, 8.7 at 90%" in (
        facts
    )
    assert "unbalanced: ant has 4 times the images of bee; see data.balance" in problems
    assert standard_error(0.5, 100) == 0.05


def test_a_holdout_that_cannot_be_is_a_finding(tmp_path):
    found = found_in(make_folder(tmp_path / "raw"), holdout_per_class=4)
    assert "holdout_per_class = 4: class 'ant' has only 4" in sentences(found)[1][-1]


def test_an_imported_data_set_is_surveyed_without_its_images(tmp_path):
    config = DataConfig(source="imagefolder", path=str(make_folder(tmp_path / "raw")))
    import_dataset(config, str(tmp_path / "out"), seed=0)
    found = survey(config, 0)
    imported = DataConfig(source="parquet", path=str(tmp_path / "out"))
    assert survey(imported, 0) == {key: found[key] for key in found if key != "skipped"}


@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared pictures beside the repository")
def test_other_encodings_are_alike_and_other_photographs_are_not(tmp_path):
    with tarfile.open(SHARED / "signdigits" / "signdigits.tar") as archive:
        members = [each for each in archive if each.isfile()][::40]
        for number, member in enumerate(members):
            file = tmp_path / f"{'ab'[number % 2]}/{number}.jpg"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(archive.extractfile(member).read())
    assert found_in(tmp_path)["alike"]["number"] == 0
    for number in (10, 12, 14, 16, 18):
        with Image.open(tmp_path / f"a/{number}.jpg") as picture:
            picture.resize((80, 80)).save(tmp_path / f"b/{number}.jpg", quality=75)
    assert found_in(tmp_path)["alike"]["number"] >= 4


def test_the_command_checks_a_folder_a_job_and_an_import(tmp_path):
    root = make_folder(tmp_path / "raw")
    result = CliRunner().invoke(main, ["data", "check", str(root)], catch_exceptions=False)
    assert "ant          4        2\n" in result.stdout
    assert "12 images in train, 6 in val, of 3 classes\n" in result.stdout
    job = tmp_path / "job.toml"
    job.write_text(f'[data]\nsource = "imagefolder"\npath = "{root}"\nholdout_per_class = 1\n')
    result = CliRunner().invoke(main, ["data", "check", str(job), "--json"])
    assert json.loads(result.stdout)["parts"] == {"training": 9, "holdout": 3, "validation": 6}
    nasray.import_data("imagefolder", tmp_path / "out", path=root)
    assert nasray.check_data(tmp_path / "out")["images"] == {"train": 12, "val": 6}
    result = CliRunner().invoke(main, ["data", "check", str(tmp_path / "nowhere")])
    assert "nowhere does not exist; give a data set, or a job" in result.stderr


def test_an_import_ends_with_what_somebody_should_look_at(tmp_path):
    root = make_folder(tmp_path / "raw")
    shutil.rmtree(root / "val")
    shutil.copytree(root / "train", root / "val")
    arguments = ["data", "import", "imagefolder", str(tmp_path / "out"), "--path", str(root)]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert "Note: 12 pictures lie in both train and val, first " in result.stdout.splitlines()[-1]
