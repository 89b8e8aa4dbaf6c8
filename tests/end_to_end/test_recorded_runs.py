"""Runs that an earlier version began (recorded/README.md) go on as that version would have."""

import json
import tarfile
from pathlib import Path

import pytest
from click.testing import CliRunner

from nasray.cli.main import main
from tests.conftest import evaluations, start_nasray
from tests.recorded import compute

RECORDED = Path(__file__).parents[1] / "recorded"
FINISHED = json.loads((RECORDED / "finished.json").read_text())
EVALUATIONS = [
    (number, tuple(arch), fitness) for number, arch, fitness, _ in FINISHED["evaluations"]
]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    with tarfile.open(RECORDED / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def nasray(*arguments: str | Path) -> str:
    found = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_status_and_report_read_recorded_runs(runs: Path):
    lines = nasray("status", runs / "searching").splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["data", "done"],
        ["supernet", "done"],
        ["search", "begun"],
    ]
    assert "14 evaluations" in lines[2]
    lines = nasray("status", runs / "retraining").splitlines()
    assert "30 evaluations" in lines[2]
    assert "1 trials, 8 epochs" in lines[3]
    for name in ("searching", "retraining"):
        nasray("report", runs / name)
        assert (runs / name / "report.html").stat().st_size > 1e6


def test_recorded_evaluations_are_read(runs: Path):
    assert evaluations(runs / "retraining") == EVALUATIONS
    assert evaluations(runs / "searching") == EVALUATIONS[:10]  # complete generations only


@pytest.mark.ray
def test_a_recorded_search_goes_on_to_the_recorded_end(runs: Path):
    for verb in ("train", "search"):  # the first makes the data set again
        process = start_nasray(verb, RECORDED / "job.toml", runs / "searching")
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode == 0, stderr
    assert evaluations(runs / "searching") == EVALUATIONS
    top = json.loads((runs / "searching" / "top.json").read_text())
    for found, recorded in zip(top, FINISHED["answers"], strict=True):
        assert found | recorded == found  # which may have more keys


@pytest.mark.ray
def test_a_recorded_retraining_goes_on_to_its_end(runs: Path):
    first = runs / "retraining" / "retrain/0/trial-0/curves.json"
    begun = json.loads(first.read_text())
    process = start_nasray("run", RECORDED / "job.toml", runs / "retraining")
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert evaluations(runs / "retraining") == EVALUATIONS
    assert json.loads(first.read_text())[: len(begun)] == begun  # no epoch was trained again
    result = json.loads((runs / "retraining" / "retrain/0/result.json").read_text())
    recorded = FINISHED["retrained"]
    assert result["genes"] == recorded["genes"]
    assert result["num_val_images"] == recorded["num_val_images"]
    # Another kind of CPU rounds other sums, and 30 epochs amplify the difference.
    if compute.cpu() == json.loads((RECORDED / "numbers.json").read_text())["cpu"]:
        assert result["val_top1"] == recorded["val_top1"]
        assert result["trial"] == recorded["trial"]
