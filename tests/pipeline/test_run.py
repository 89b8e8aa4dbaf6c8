"""A run directory opened for work: what is recorded of its job, and what is read how often."""

import shutil
import sys
from pathlib import Path

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
