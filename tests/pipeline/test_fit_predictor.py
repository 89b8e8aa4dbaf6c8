"""Fitting a predictor to a run and searching by it: the real pool, a supernet of seconds."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from nasray.cli.main import main
from nasray.config import load_job
from nasray.costs.latency import blocks_of
from nasray.costs.latency_files import block_key, write_lines
from nasray.data.splits import JobImages
from nasray.errors import UserError
from nasray.pipeline.answers import answers, rankings
from nasray.pipeline.fit_predictor import fit_predictor, is_sampled, sample
from nasray.pipeline.run import opened
from nasray.pipeline.search import begin
from nasray.pipeline.stages import check
from nasray.predictors.predictor import AccuracyPredictor
from nasray.predictors.quality import kendall_tau
from nasray.report.build import build_report
from nasray.search.candidate import Evaluation
from nasray.search.history import History
from nasray.storage import files as storage
from tests.conftest import FinishedRun, evaluations, start_nasray


@pytest.fixture
def trained(finished_run: FinishedRun, tmp_path: Path) -> Path:
    """A copy of a finished run of which only data and supernet are left."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run.folder, folder)
    for name in ("history", "retrain", "export"):
        shutil.rmtree(folder / name)
    for name in ("search.json", "front.json", "top.json", "report.html"):
        (folder / name).unlink()
    return folder


def test_too_few_evaluations_are_refused(trained: Path):
    with opened(str(trained)) as run, pytest.raises(UserError, match="needs 20 at least; say --s"):
        fit_predictor(run)


def test_a_sample_is_evaluated_once_and_a_predictor_fitted(ray_cluster: None, trained: Path):
    with opened(str(trained)) as run:
        assert not is_sampled(run, 20)
        sample(run, 20)
        found = fit_predictor(run)
        before = History(str(trained / "history"), "sample").candidates
        assert found["num_evaluations"] == len(before) == 20
        assert len({candidate.arch for candidate in before}) == 20
        assert is_sampled(run, 10) and is_sampled(run, 20) and not is_sampled(run, 21)
        assert sample(run, 10) == before  # there are that many already
        predictor = AccuracyPredictor.load(found["predictor"], run.space)
        assert predictor.space == run.space
        assert fit_predictor(run)["rmse"] == found["rmse"]
    build_report(str(trained))
    assert "Accuracy predictor" in (trained / "report.html").read_text()


def test_a_calibration_study_compares_ways_on_the_same_subnets(trained: Path):
    process = start_nasray("calibration-study", trained, "--archs", "4")
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert [row["calibration"] for row in rows] == ["inherited", "batch", 64]
    assert all(row["seconds"] > 0 for row in rows)
    study = storage.read_json(str(trained / "calibration.json"))
    for row in study["rows"]:
        order = kendall_tau(np.array(row["top1"]), np.array(study["rows"][2]["top1"]))
        assert row["kendall_tau"] == order
    assert [row["kendall_tau"] for row in rows] == [row["kendall_tau"] for row in study["rows"]]
    assert all(len(row["top1"]) == 4 for row in study["rows"])
    assert study["rows"][0]["top1"] != study["rows"][2]["top1"]
    build_report(str(trained))
    assert "BN recalibration" in (trained / "report.html").read_text()


def test_a_predictor_that_is_not_there_is_refused_before_the_training(finished_run: FinishedRun):
    with opened(finished_run.folder) as run:
        section = run.job.search.model_copy(update={"predictor": "gone.pt"})
        other = replace(run, job=run.job.model_copy(update={"search": section}))
        with pytest.raises(UserError, match=r"gone\.pt does not exist"):
            check(other)


def test_a_verified_search_answers_every_limit(finished_run: FinishedRun, trained: Path):
    """nasray search --verify, as a user calls it; then a report of it."""
    with opened(str(trained)) as run:
        low, high = run.limits.bounds("macs")
    text = Path(finished_run.job_file).read_text()
    maxima = [low + share * (high - low) for share in (0.6, 0.2, 0.4)]
    lines = ", ".join(f'{{ cost = "macs", max = {top} }}' for top in maxima)
    one = 'limits = [{ cost = "macs", max = 1.2e6 }]'
    assert one in text
    text = text.replace(one, f"limits = [{lines}]\nproposals = 2000")
    job_file = trained.parent / "job.toml"
    job_file.write_text(text)
    recorded = json.loads((trained / "job.json").read_text())
    recorded["job"] = load_job(str(job_file)).model_dump()
    (trained / "job.json").write_text(json.dumps(recorded))

    process = start_nasray("search", job_file, trained, "--verify")
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr
    entries = [json.loads(line) for line in stdout.splitlines()]
    assert [entry["limit"]["max"] for entry in entries] == maxima
    assert all(entry["macs"] <= entry["limit"]["max"] for entry in entries)
    found = evaluations(trained)
    fitnesses = {arch: fitness for _, arch, fitness in found}
    assert all(fitnesses[tuple(entry["genes"])] == entry["fitness"] for entry in entries)
    build_report(str(trained))
    assert "The best for each limit" in (trained / "report.html").read_text()
    summary = storage.read_json(str(trained / "search.json"))
    assert summary["answers"] == entries
    assert summary["winner"]["genes"] == entries[0]["genes"]  # not the one within all limits
    # Without --verify it is another search.
    again = CliRunner().invoke(main, ["search", str(job_file), str(trained)])
    assert "recorded with search.verify = True, the job says False" in again.stderr


def test_a_search_goes_on_only_with_what_it_began_with(trained: Path):
    table = str(trained.parent / "table.csv")
    with opened(str(trained)) as run:
        keys = sorted({block_key(block) for block in blocks_of(run.space)})
        provenance = {"space": run.space.name, "device": "toaster"}
        lines = [{"block": key, "ms": "1.5", **provenance} for key in keys]
        write_lines(table, lines)
        search = run.job.search.model_copy(update={"latency_table": table})
        run = replace(run, job=run.job.model_copy(update={"search": search}))
        begun = begin(run, run.history)
        write_lines(table, [lines[0] | {"ms": "2"}, *lines[1:]])
        again = begin(replace(run), run.history)  # nothing is on record yet
        assert again["latency_table"] != begun["latency_table"]
        run.history.record(0, (0,) * 6, Evaluation(fitness=0.5))
        assert begin(replace(run), run.history) == again
        write_lines(table, [lines[0] | {"ms": "3"}, *lines[1:]])
        with pytest.raises(UserError, match=f"^search.latency_table = {table}: not the table"):
            begin(replace(run), run.history)


def test_answers_are_the_best_for_each_limit_or_the_best_of_all(finished_run: FinishedRun):
    with opened(finished_run.folder) as run:
        found = run.history.candidates
        labels = JobImages(run.job, run.data_path).holdout_labels

        def answer(**changes: Any) -> list:
            search = {**run.job.search.model_dump(), "prefer": "best", **changes}
            job = run.job.model_validate({**run.job.model_dump(), "search": search})
            return answers(job, rankings(job, found, labels))

        macs = sorted(candidate.costs["macs"] for candidate in found)
        [(limit, best)] = answer()
        assert limit is None and best.fitness == max(c.fitness for c in found)
        limits = [{"cost": "macs", "max": macs[0]}, {"cost": "macs", "max": macs[-1]}]
        limits.append({"cost": "macs", "max": macs[0] - 1})
        [(tight, small), (loose, large)] = answer(algorithm="front", limits=limits)
        assert (tight.max, loose.max) == (macs[0], macs[-1])
        assert small.costs["macs"] == macs[0] and large.fitness == best.fitness


def test_a_search_says_how_far_its_ranking_can_be_trusted(finished_run: FinishedRun):
    summary = storage.read_json(f"{finished_run.folder}/search.json")
    [found] = summary["reliability"]
    assert found["num_images"] == 32 and 0 <= found["split_half"] <= 1
    assert "hold-out: 32 images, which let a top-1 of 50 %" in finished_run.stderr
    assert "hold-out images has a reliability of" in finished_run.stderr
    assert (
        "How far the ranking can be trusted" in Path(finished_run.folder, "report.html").read_text()
    )
    top = storage.read_json(f"{finished_run.folder}/top.json")
    share = top[0]["fitness"]
    assert top[0]["top1_error"] == pytest.approx((share * (1 - share) / 32) ** 0.5)
