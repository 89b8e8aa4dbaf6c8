"""A run directory opened for work: what is recorded of its job, and what is read how often."""

import shutil
import sys
from pathlib import Path
from typing import Any

import PIL
import pytest

from nasray.config import Job
from nasray.errors import UserError
from nasray.pipeline.run import opened
from nasray.search.candidate import Candidate
from nasray.storage import files as storage
from nasray.storage import layout


def job(**data: object) -> Job:
    return Job.model_validate({"data": {"source": "synthetic", **data}})


def test_resuming_keeps_the_time_of_the_first_start(tmp_path: Path):
    path = str(tmp_path / layout.JOB)
    with opened(str(tmp_path), job()):
        first = storage.read_json(path)
    storage.write_json(path, first | {"started": "2001-02-03T04:05:06+00:00"})
    with opened(str(tmp_path), job(loader_workers=3)):
        again = storage.read_json(path)
    assert again["started"] == "2001-02-03T04:05:06+00:00"
    assert again["job"]["data"]["loader_workers"] == 3


def test_evaluations_are_read_once(tmp_path: Path):
    candidate = Candidate(arch=(0, 1), fitness=0.5, costs={"macs": 1.0}, generation=0)
    with opened(str(tmp_path), job()) as run:
        for history in (run.history, run.sample):
            history.append([candidate])
    with opened(str(tmp_path), job()) as run:
        assert len(run.candidates) == len(run.sample.candidates) == 1
        shutil.rmtree(tmp_path / layout.HISTORY)
        assert [found.arch for found in run.candidates] == [(0, 1)]
        assert [found.arch for found in run.sample.candidates] == [(0, 1)]


def test_an_unknown_algorithm_of_a_recorded_job_is_one_line(tmp_path: Path):
    """Recorded by a version that had another table, say."""
    path = str(tmp_path / layout.JOB)
    with opened(str(tmp_path), job()):
        content = storage.read_json(path)
    content["job"]["search"]["algorithm"] = "simplex"
    storage.write_json(path, content)
    with pytest.raises(UserError, match=r"job\.json: search\.algorithm = 'simplex' is unknown; "):
        with opened(str(tmp_path)):
            pass


def test_a_run_keeps_its_decoder_and_records_its_version(tmp_path: Path):
    with opened(str(tmp_path), job()) as run:
        versions = storage.read_json(run.path(layout.JOB))["versions"]
        assert versions["pillow"] == PIL.__version__
        run.history.append([Candidate(arch=(0, 1), fitness=0.5, costs={}, generation=0)])
    with pytest.raises(UserError, match=r"data\.decoder = 'pillow', the job says 'torchcodec'"):
        with opened(str(tmp_path), job(decoder="torchcodec")):
            pass


def test_a_decoder_that_is_not_installed_is_refused_before_the_import(tmp_path: Path, monkeypatch):
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"^data\.decoder = 'torchcodec': .*pip install"):
        with opened(str(tmp_path), job(decoder="torchcodec")):
            pass
    assert not (tmp_path / layout.JOB).exists()


BEGUN = "retrain/0/trial-0/curves.json"
RETRAIN = {"retrain": {"learning_rate": 0.1}, "compute": {}}
CHANGES = [
    {"retrain": {"learning_rate": 0.01}},
    {"retrain": {"learning_rate": 0.1, "epochs": 7}},
    {"retrain": {"learning_rate": [0.01, 0.1], "num_trials": 3}},
    {"compute": {"workers_per_trial": 2}},
    {"retrain": {"learning_rate": 0.1, "init": "supernet", "epochs": 1}},
]


def retraining_job(change: dict[str, Any]) -> Job:
    return Job.model_validate({"data": {"source": "synthetic"}} | RETRAIN | change)


def begin_retraining(folder: Path, *, done: bool = False) -> None:
    """Leave behind what a retraining does that was interrupted, or has ended."""
    with opened(str(folder), retraining_job({})):
        storage.write_json(f"{folder}/{BEGUN}", [{"epoch": 0}])
        if done:
            storage.write_json(f"{folder}/retrain/0/result.json", {"val_top1": 0.5})
            storage.write_json(f"{folder}/export/0.json", {"bytes": 1})


@pytest.mark.parametrize("change", CHANGES)
def test_retraining_may_change_until_it_has_a_result_and_then_begins_anew(
    change: dict[str, Any], tmp_path: Path
):
    begin_retraining(tmp_path)
    with opened(str(tmp_path), retraining_job(change)) as run:
        assert run.job == retraining_job(change)
    assert not (tmp_path / "retrain").exists()  # its trials would go on by the other recipe
    assert storage.read_json(f"{tmp_path}/earlier/1/{BEGUN}") == [{"epoch": 0}]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"compute": {"cpus_per_trial": 2}},
        {"compute": {"concurrent_trials": 2}},
        {"retrain": {"learning_rate": 0.1, "num_winners": 3}},
        {"retrain": {"learning_rate": 0.1, "also": [{"init": "supernet"}]}},
    ],
)
def test_a_trial_goes_on_where_its_recipe_is_the_same(change: dict[str, Any], tmp_path: Path):
    begin_retraining(tmp_path)
    with opened(str(tmp_path), retraining_job(change)):
        assert (tmp_path / BEGUN).exists()


@pytest.mark.parametrize("change", CHANGES)
def test_results_of_retraining_are_kept_when_it_is_done_again(
    change: dict[str, Any], tmp_path: Path
):
    begin_retraining(tmp_path, done=True)
    advice = rf"`nasray retrain JOB {tmp_path} --again`"
    with pytest.raises(UserError, match=advice):
        with opened(str(tmp_path), retraining_job(change)):
            pass
    assert (tmp_path / "retrain/0/result.json").exists()
    with opened(str(tmp_path), retraining_job(change), again=True):
        pass
    assert not (tmp_path / "retrain").exists() and not (tmp_path / "export").exists()
    assert storage.read_json(f"{tmp_path}/earlier/1/retrain/0/result.json") == {"val_top1": 0.5}
    assert storage.read_json(f"{tmp_path}/earlier/1/export/0.json") == {"bytes": 1}
    recorded = storage.read_json(f"{tmp_path}/earlier/1/job.json")["job"]
    assert Job.model_validate(recorded) == retraining_job({})
    changed = retraining_job(change)
    with opened(str(tmp_path), changed):
        storage.write_json(f"{tmp_path}/retrain/0/result.json", {"val_top1": 0.6})
    with opened(str(tmp_path), changed, again=True):
        pass
    assert storage.read_json(f"{tmp_path}/earlier/2/retrain/0/result.json") == {"val_top1": 0.6}


def test_another_job_is_refused_before_anything_is_set_aside(tmp_path: Path):
    begin_retraining(tmp_path, done=True)
    with pytest.raises(UserError, match=r"supernet\.epochs"):
        with opened(str(tmp_path), retraining_job({"supernet": {"epochs": 99}}), again=True):
            pass
    assert (tmp_path / "retrain/0/result.json").exists()
