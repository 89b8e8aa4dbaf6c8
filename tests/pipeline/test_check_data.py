"""That a run goes on with the images it was begun with, and with no others."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import nasray
from nasray.config import Job
from nasray.data.splits import JobImages
from nasray.errors import UserError
from nasray.pipeline.run import Run
from nasray.pipeline.stages import prepare_data
from nasray.search.candidate import Candidate
from nasray.storage import files as storage
from tests.data.test_sources import encode, make_folder


def job(path: Path, seed: int = 0) -> Job:
    data = {"source": "imagefolder", "path": str(path)}
    return Job.model_validate({"seed": seed, "data": data, "space": {"name": "tiny"}})


@contextmanager
def working(tmp_path: Path, given: Job | None = None, data: Path | None = None) -> Iterator[Run]:
    """Open the run at tmp_path/run as every verb does."""
    handle = nasray.open(tmp_path / "run", given, data_path=data)
    with handle._working() as run:
        yield run


def begin(tmp_path: Path, root: Path) -> str:
    """Begin a run on the images at `root`; return the data set's fingerprint."""
    with working(tmp_path, job(root)) as run:
        prepare_data(run)
        run.history.append([Candidate(arch=(0, 1), fitness=0.5, costs={}, generation=0)])
        return run.dataset.fingerprint


def test_images_may_change_until_something_is_computed(tmp_path: Path, caplog):
    root = make_folder(tmp_path / "raw")
    for seed, num_train in ((0, 12), (0, 13), (1, 13)):
        if num_train == 13:
            (root / "train/ant/9.png").write_bytes(encode(9))
        with caplog.at_level(logging.INFO), working(tmp_path, job(root, seed)) as run:
            prepare_data(run)
            assert (run.dataset.num("train"), run.dataset.info.seed) == (num_train, seed)
    assert "(train/ant/9.png is new): importing again" in caplog.text
    assert "(they were stored in the order of seed = 0): importing again" in caplog.text


@pytest.mark.parametrize("how", ["job", "--data", "changed"])
def test_a_run_that_has_begun_is_refused_other_images(tmp_path: Path, how):
    root = make_folder(tmp_path / "raw")
    before = begin(tmp_path, root)
    other = root if how == "changed" else make_folder(tmp_path / "other")
    (other / "train/ant/9.png").write_bytes(encode(9))
    given = job(other) if how == "job" else None
    message = rf"run was begun with other images than data\.path = '{other}' .*9\.png is new; rest"
    with (
        pytest.raises(UserError, match=message),
        working(tmp_path, given, other if how == "--data" else None),
    ):
        pass
    recorded = storage.read_json(str(tmp_path / "run/job.json"))["job"]
    assert recorded["data"]["path"] == str(root)
    (other / "train/ant/9.png").unlink()
    with working(tmp_path, given) as run:
        assert run.dataset.fingerprint == before


def test_an_import_of_other_images_in_the_place_of_the_runs_is_made_again(tmp_path: Path):
    root = make_folder(tmp_path / "raw")
    before = begin(tmp_path, root)
    (tmp_path / "run/data/dataset.json").unlink()
    (root / "train/ant/9.png").write_bytes(encode(9))
    with (
        working(tmp_path) as run,
        pytest.raises(UserError, match="was started with another data set"),
    ):
        prepare_data(run)
        run.dataset  # noqa: B018  opened to be checked
    (root / "train/ant/9.png").unlink()
    with working(tmp_path) as run:
        prepare_data(run)
        assert run.dataset.fingerprint == before


def test_a_node_with_another_import_is_refused_by_name(tmp_path: Path):
    begin(tmp_path, make_folder(tmp_path / "raw"))
    images = JobImages(job(tmp_path / "raw"), str(tmp_path / "run/data"), fingerprint="of others")
    with pytest.raises(UserError, match=r"run/data on node \S+ is not the data set of this run"):
        images.holdout  # noqa: B018  opened to be checked


def test_batches_that_leave_a_worker_one_image_are_refused_before_ray_starts(tmp_path: Path):
    values = job(make_folder(tmp_path / "raw", train=10)).model_dump()
    values["compute"] |= {"num_workers": 2}
    values["supernet"] |= {"batch_size": 3}
    with pytest.raises(UserError, match="a batch of 3 images cannot feed 2 .* batch_size to 4$"):
        nasray.open(tmp_path / "run", values).train()
