"""Retraining: recipes that follow from the seed, early stopping, and results that survive kills."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from PIL import Image

from nasray.checkpoint import load_subnet
from nasray.config import DataConfig, Job, RetrainConfig
from nasray.data.importing import import_dataset
from nasray.data.splits import JobImages
from nasray.errors import UserError
from nasray.evaluation.evaluate import top1
from nasray.search.scores import Predictions
from nasray.spaces.space import Architecture
from nasray.storage import files as storage
from nasray.training.retrain import _as_completed, draw_recipes, retrain
from tests.conftest import (
    FinishedRun,
    MakeJob,
    assert_same_weights,
    ray_processes,
    seeded_chance,
    wait_for,
)

RECIPE_KEYS = ("learning_rate", "weight_decay", "label_smoothing")
ANY_ARCH = (0, 1) * 3


def curves(folder: str | Path, trial: int = 0) -> list[dict[str, Any]]:
    path = f"{folder}/trial-{trial}/curves.json"
    return storage.read_json(path) if storage.exists(path) else []


def retrained(job: Job, run_dir: Path, archs: dict[str, Architecture]) -> dict[str, dict]:
    return dict(retrain(job, str(run_dir), job.data.path, archs))


def without_clock(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: epoch[key] for key in epoch if key != "seconds"} for epoch in epochs]


def test_recipes_are_a_function_of_the_seed():
    config = RetrainConfig(
        num_trials=200, learning_rate=(0.01, 1), weight_decay=(0, 1e-4), label_smoothing=0.05
    )
    recipes = draw_recipes(config, seed=3)
    assert recipes == draw_recipes(config, seed=3)
    assert recipes != draw_recipes(config, seed=4)
    assert recipes[:5] == draw_recipes(config.model_copy(update={"num_trials": 5}), seed=3)
    rates, decays, smoothings = zip(
        *(map(recipe.get, RECIPE_KEYS) for recipe in recipes), strict=True
    )
    assert 0.01 <= min(rates) < max(rates) <= 1
    assert sum(rate < 0.1 for rate in rates) == pytest.approx(100, abs=25)  # log-uniform
    assert 0 <= min(decays) < max(decays) <= 1e-4
    assert sum(decay < 5e-5 for decay in decays) == pytest.approx(100, abs=25)  # uniform from 0
    assert set(smoothings) == {0.05}


@pytest.mark.ray
def test_the_best_trial_is_tested_once_on_the_validation_folder(
    finished_run: FinishedRun, make_job: MakeJob
):
    folder, job = f"{finished_run.folder}/retrain/0", make_job()
    result = storage.read_json(f"{folder}/result.json")
    _, arch, subnet, extra = load_subnet(f"{folder}/model.pt")
    images = JobImages(job, job.data.path)
    accuracy = top1(subnet, *images.validation, batch_size=job.search.batch_size)
    assert result["val_top1"] == accuracy
    assert result["num_val_images"] == 4 * 8
    said = Predictions.read(f"{folder}/validation.parquet")
    assert (said.top1, said.balanced_top1) == (accuracy, result["val_balanced_top1"])
    assert result["genes"] == list(arch)
    assert extra["classes"] == list(images.dataset.classes)
    recipes = draw_recipes(job.retrain, job.seed)
    trials = storage.read_json(f"{folder}/curves.json")
    assert [trial["recipe"] for trial in trials] == recipes
    last = {trial["trial"]: trial["epochs"][-1]["holdout_top1"] for trial in trials}
    whole = {trial["trial"] for trial in trials if len(trial["epochs"]) == job.retrain.epochs}
    assert whole == {trial["trial"] for trial in trials if not trial["stopped"]}
    assert result["trial"] == max(whole, key=lambda trial: (last[trial], -trial))


@pytest.mark.ray
def test_a_killed_trial_goes_on_and_ends_with_the_same_weights(
    finished_run: FinishedRun, make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    before, chance, seen = f"{finished_run.folder}/retrain/0", seeded_chance(), []
    arch = tuple(storage.read_json(f"{before}/result.json")["genes"])

    def kill() -> None:
        wait_for(lambda: curves(tmp_path / "retrain/0"), "the first epoch is recorded")
        time.sleep(chance.uniform(0, 0.2))
        seen.extend(curves(tmp_path / "retrain/0"))
        [trial] = ray_processes("ImplicitFunc")
        os.kill(trial, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    job = make_job()
    retrained(job, tmp_path, {"0": arch})
    killer.join()
    assert 0 < len(seen) < job.retrain.epochs
    assert curves(tmp_path / "retrain/0")[: len(seen)] == seen  # with their seconds
    assert_same_weights(tmp_path / "retrain/0/model.pt", f"{before}/model.pt")
    for trial in range(2):
        now = curves(tmp_path / "retrain/0", trial)
        assert without_clock(now) == without_clock(curves(before, trial))


@pytest.mark.ray
def test_what_was_trained_is_replayed_and_not_trained_again(
    finished_run: FinishedRun, make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    before, after = f"{finished_run.folder}/retrain/0", tmp_path / "retrain/0"
    arch = tuple(storage.read_json(f"{before}/result.json")["genes"])
    shutil.copytree(before, after)
    for lost in ("result.json", "model.pt", "curves.json"):
        (after / lost).unlink()
    job = make_job()
    result = retrained(job, tmp_path, {"0": arch})["0"]
    assert_same_weights(after / "model.pt", f"{before}/model.pt")
    for trial in range(2):
        assert curves(after, trial) == curves(before, trial)  # seconds, too
    old = storage.read_json(f"{before}/result.json")
    assert result == {key: old[key] for key in result}


@pytest.mark.ray
def test_several_trained_at_once_have_the_weights_of_one_at_a_time(
    finished_run: FinishedRun, make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    """One whose training cannot go on costs the others nothing."""
    before = f"{finished_run.folder}/retrain/0"
    arch = tuple(storage.read_json(f"{before}/result.json")["genes"])
    archs = {"bad": ANY_ARCH, "0": arch, "1": (1, 0) * 3}
    state = tmp_path / "retrain/bad/trial-0/state.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"not weights")
    job = make_job(compute={"concurrent_winners": 2, "max_failures": 0})
    with pytest.raises(UserError, match=f"^{state} is not a readable checkpoint"):
        retrained(job, tmp_path, archs)
    assert not (tmp_path / "retrain/bad/result.json").exists()
    assert_same_weights(tmp_path / "retrain/0/model.pt", f"{before}/model.pt")
    del archs["bad"]
    results = retrained(job, tmp_path, archs)
    assert [tuple(result["genes"]) for result in results.values()] == list(archs.values())


@pytest.mark.ray
def test_as_many_run_at_the_same_time_as_are_asked_for(ray_cluster: None, tmp_path: Path):
    @ray.remote(num_cpus=0)
    def meet(own: str, other: str) -> dict[str, str]:
        (tmp_path / own).touch()
        wait_for((tmp_path / other).exists, "the other task runs, too")
        return {"name": own}

    pairs = (("a", "b"), ("b", "a"), ("c", "d"), ("d", "c"))
    starting = ((meet.remote(own, other), own) for own, other in pairs)
    results = dict(_as_completed(starting, 2))
    assert results == {own: {"name": own} for own, _ in pairs}


@pytest.mark.ray
def test_an_error_of_one_is_raised_when_the_others_have_ended(ray_cluster: None, caplog):
    @ray.remote(num_cpus=0)
    def work(name: str) -> dict[str, str]:
        if name == "bad":
            raise MemoryError("too large")
        return {"name": name}

    completed = _as_completed(((work.remote(name), name) for name in ("bad", "a", "b")), 2)
    assert [next(completed)[0], next(completed)[0]] == ["a", "b"]
    with pytest.raises(MemoryError, match="too large"):
        next(completed)
    assert "bad could not be given weights: " in caplog.text and "too large" in caplog.text


@pytest.mark.ray
def test_tasks_end_when_nobody_waits_for_them_any_more(ray_cluster: None, tmp_path: Path):
    @ray.remote(num_cpus=0)
    def work(name: str) -> str:
        (tmp_path / name).touch()
        if name == "slow":
            try:
                while True:
                    time.sleep(0.05)  # Ray interrupts what comes back to Python
            finally:
                (tmp_path / "ended").touch()
        return name

    completed = _as_completed(((work.remote(name), name) for name in ("slow", "quick")), 2)
    assert next(completed)[0] == "quick"
    wait_for((tmp_path / "slow").exists, "the other one has begun")
    completed.close()
    wait_for((tmp_path / "ended").exists, "it was cancelled")


@pytest.mark.ray
def test_a_trial_that_cannot_go_on_says_so_in_one_line(
    make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    state = tmp_path / "retrain/0/trial-0/state.pt"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"not weights")
    job = make_job(compute={"max_failures": 0})
    with pytest.raises(UserError, match=f"^{state} is not a readable checkpoint"):
        retrained(job, tmp_path, {"0": ANY_ARCH})


@pytest.fixture(scope="module")
def plain_colors(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set that any recipe but a bad one learns at once: the class is the colour."""
    root = tmp_path_factory.mktemp("colors")
    for label, color in enumerate(("red", "lime", "blue")):
        for split, number in (("train", 40), ("val", 4)):
            folder = root / "images" / split / str(label)
            folder.mkdir(parents=True)
            for index in range(number):
                Image.new("RGB", (32, 32), color).save(folder / f"{index}.png")
    config = DataConfig(source="imagefolder", path=str(root / "images"))
    import_dataset(config, str(root / "data"), seed=0)
    return str(root / "data")


@pytest.fixture
def another_cluster() -> Iterator[None]:
    """A second cluster on this machine: Ray must not take one for the other."""
    program = "import ray; ray.init(address='local', num_cpus=1); print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    yield
    process.communicate(b"\n", timeout=60)


@pytest.mark.ray
@pytest.mark.parametrize("num_workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_bad_recipe_is_stopped_early(
    make_job: MakeJob,
    plain_colors: str,
    ray_cluster: None,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    num_workers: int,
):
    if num_workers > 1:
        request.getfixturevalue("another_cluster")
    config = {"num_trials": 2, "epochs": 30, "grace_epochs": 3, "learning_rate": [1e-9, 0.1]}
    job = make_job(
        seed=seed_of_a_good_and_a_bad_recipe(RetrainConfig(**config)),
        data={"path": plain_colors, "color_jitter": 0, "lighting": 0},
        compute={"workers_per_trial": num_workers},
        retrain=config,
    )
    result = retrained(job, tmp_path, {"0": ANY_ARCH})["0"]
    good, bad = storage.read_json(f"{tmp_path}/retrain/0/curves.json")
    assert good["epochs"][2]["holdout_top1"] > bad["epochs"][2]["holdout_top1"] + 0.2
    assert (len(good["epochs"]), len(bad["epochs"])) == (30, 3)
    if num_workers > 1:  # the news that a trial is to stop takes them about a second
        assert 3 <= len(curves(tmp_path / "retrain/0", 1)) < 30
    assert [trial["stopped"] for trial in (good, bad)] == [False, True]
    assert result["trial"] == 0


def seed_of_a_good_and_a_bad_recipe(config: RetrainConfig) -> int:
    for seed in range(1000):
        good, bad = (recipe["learning_rate"] for recipe in draw_recipes(config, seed))
        if good > 0.03 and bad < 1e-7:
            return seed
    raise AssertionError("no seed gives such recipes")


@pytest.mark.ray
@pytest.mark.slow
def test_trials_may_have_several_workers(make_job: MakeJob, ray_cluster: None, tmp_path: Path):
    job = make_job(compute={"workers_per_trial": 2}, retrain={"num_trials": 1, "epochs": 2})
    result = retrained(job, tmp_path, {"0": ANY_ARCH})["0"]
    assert [epoch["epoch"] for epoch in curves(tmp_path / "retrain/0")] == [0, 1]
    assert result["trial"] == 0
    assert torch.load(tmp_path / "retrain/0/model.pt", weights_only=True)["arch"] == list(ANY_ARCH)
