"""What trackers show of a run, read back from their stores: each step once, whatever happened."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nasray.config import Job
from nasray.errors import UserError
from nasray.pipeline import tracking
from nasray.pipeline.run import Run, opened
from nasray.pipeline.trackers import MLflow, require
from nasray.pipeline.tracking import tracked
from nasray.search.candidate import FAILED, Candidate, Evaluation
from nasray.search.history import History
from nasray.storage import files as storage
from tests.conftest import free_ports, seeded_chance, wait_for
from tests.tracked import INSTALLED, Curves, mlflow_runs, read_mlflow, read_tensorboard

needs_mlflow = pytest.mark.skipif(
    "mlflow" not in INSTALLED,
    reason="MLflow is not installed, or not the packages of its store in a file",
)
needs_tensorboard = pytest.mark.skipif(
    "tensorboard" not in INSTALLED, reason="TensorBoard is not installed"
)
needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="Weights & Biases is not installed"
)
# Of the packages themselves, in threads of theirs as well.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning")
]
MACS = [{"cost": "macs", "max": 3e6}, {"cost": "macs", "max": 1e10}]


@pytest.fixture(autouse=True)
def environment_without_trackers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr(tracking, "JOIN_S", 300.0)  # a machine may be busy
    yield


def job_for(*to: str, **sections: object) -> Job:
    values = {"data": {"source": "synthetic"}, "tracking": {"to": to}} | sections
    return Job.model_validate(values)


def epochs(number: int, **more: object) -> list[dict[str, object]]:
    return [
        {"epoch": k, "loss": 1 / (k + 1), "val_top1": None if k % 2 else k / 10, **more}
        for k in range(number)
    ]


def evaluated(position: int, fitness: float) -> Candidate:
    return Candidate(arch=(position,), fitness=fitness, costs={"macs": (1 + position) * 1e6})


STORES = [
    pytest.param("tensorboard", {}, read_tensorboard, marks=needs_tensorboard),
    pytest.param("mlflow", {}, read_mlflow, marks=needs_mlflow),
    pytest.param("mlflow", {"uri": "file://{folder}/mlruns"}, read_mlflow, marks=needs_mlflow),
]


@pytest.mark.parametrize(("tracker", "where", "read"), STORES, ids=["tensorboard", "file", "files"])
def test_a_run_that_is_resumed_has_each_step_once(
    tracker: str, where: dict[str, str], read: Callable[..., Curves], tmp_path: Path
):
    folder = str(tmp_path / "run")
    where = {key: value.format(folder=folder) for key, value in where.items()}
    job = job_for(
        tracker,
        tracking={"to": tracker, **where},
        search={"algorithm": "front", "limits": MACS, "population_size": 4, "num_parents": 2},
    )
    with opened(folder, job) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(3))
        run.history.record(0, (0,), Evaluation(fitness=0.2))
        run.history.record(2, (2,), Evaluation(fitness=0.7))  # the one before is not known yet
    first = read(folder, **where)
    assert first["supernet/loss"] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert first["supernet/val_top1"] == [(1, 0.0), (3, pytest.approx(0.2))]
    assert first["search/best_fitness"] == [(1, pytest.approx(0.2))]
    with opened(folder, job) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(5))
        fitness = (0.2, FAILED, 0.7, 0.5)
        run.history.append([evaluated(k, found) for k, found in enumerate(fitness)])
        run.history.record(4, (4,), Evaluation(fitness=0.9))
        for trial in (0, 1):
            path = run.path(f"retrain/0/trial-{trial}/curves.json")
            storage.write_json(path, epochs(2, holdout_top1=0.5))
        result = {"val_top1": 0.6, "costs": {"macs": 3.0, "params": 5.0, "adds": 9.0}}
        storage.write_json(run.path("retrain/0/result.json"), result)
    with opened(folder, job) as run, tracked(run):  # there is nothing new
        pass
    second = read(folder, **where)
    steps = {key: [step for step, _ in curve] for key, curve in second.items()}
    assert steps["supernet/loss"] == [1, 2, 3, 4, 5]
    assert steps["supernet/val_top1"] == [1, 3, 5]
    best = [(1, 0.2), (2, 0.2), (3, 0.7), (4, 0.7)]
    near = [(step, pytest.approx(value)) for step, value in best]
    assert second["search/best_fitness"] == [*near, (5, pytest.approx(0.9))]
    # Costs are known of whole generations.
    assert second["search/best_within/macs-10000000000"] == near
    assert second["search/best_within/macs-3000000"] == near
    assert steps["search/evaluations"] == [1, 2, 3, 4, 5]
    assert steps["retrain/0/trial-0/loss"] == steps["retrain/0/trial-1/holdout_top1"] == [1, 2]
    answer = ("val_top1", "macs", "params")
    assert [second[f"retrain/0/{key}"] for key in answer] == [
        [(0, pytest.approx(value))] for value in (0.6, 3.0, 5.0)
    ]
    assert "retrain/0/adds" not in second


@needs_tensorboard
def test_a_step_whose_record_was_cut_off_is_written_again(tmp_path: Path):
    job = job_for("tensorboard")
    with opened(str(tmp_path), job) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(4))
    [events] = (tmp_path / "tensorboard").glob("*/events*")
    content = events.read_bytes()  # cut as if the process had been killed in a write
    events.write_bytes(content[: content.rindex(b"supernet/loss") + 5])
    before = read_tensorboard(str(tmp_path))
    assert [step for step, _ in before["supernet/loss"]] == [1, 2, 3]
    with opened(str(tmp_path), job) as run, tracked(run):
        pass
    after = read_tensorboard(str(tmp_path))
    steps = {key: sorted(step for step, _ in curve) for key, curve in after.items()}
    assert steps == {"supernet/loss": [1, 2, 3, 4], "supernet/val_top1": [1, 3]}


@needs_mlflow
def test_a_store_that_was_half_created_is_created_again(tmp_path: Path):
    (tmp_path / "mlflow.db.partial").write_bytes(b"half")
    with opened(str(tmp_path), job_for("mlflow")) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(1))
    assert read_mlflow(str(tmp_path))["supernet/loss"] == [(1, 1.0)]
    assert not (tmp_path / "mlflow.db.partial").exists()


@needs_mlflow
def test_a_server_that_is_down_costs_one_warning_and_gets_everything_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(tracking, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(tracking, "RETRY_S", 0.0)
    folder, [port] = str(tmp_path / "run"), free_ports(1)
    away = {"to": ["mlflow"], "uri": f"http://127.0.0.1:{port}"}
    with opened(folder, job_for(tracking=away)) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(2))
        time.sleep(1)  # for several tries
    [warning] = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert warning.startswith("tracking by MLflow failed (") and "the run goes on" in warning
    there = {"to": ["mlflow"], "uri": f"file://{tmp_path}/store"}
    with opened(folder, job_for(tracking=there)) as run, tracked(run):
        pass
    assert [step for step, _ in read_mlflow(folder, there["uri"])["supernet/loss"]] == [1, 2]


@needs_mlflow
def test_settings_are_parameters_once_they_cannot_change_any_more(tmp_path: Path):
    folder, uri = str(tmp_path / "run"), f"file://{tmp_path}/store"
    where = {"to": ["mlflow"], "uri": uri}
    with opened(folder, job_for(tracking=where)) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(1))
    [found] = mlflow_runs(folder, uri)
    assert found.data.params["supernet.epochs"] == "120"
    assert not [key for key in found.data.params if key.startswith(("search.", "tracking."))]
    search = {"num_generations": 7, "limits": MACS[:1]}
    with opened(folder, job_for(tracking=where, search=search)) as run, tracked(run):
        run.history.append([evaluated(0, 0.5)])
    [found] = mlflow_runs(folder, uri)
    assert found.data.params["search.num_generations"] == "7"
    assert (found.info.status, found.info.run_name) == ("FINISHED", "run")
    with pytest.raises(ZeroDivisionError), opened(folder) as run, tracked(run):
        1 / 0  # noqa: B018
    assert mlflow_runs(folder, uri)[0].info.status == "FAILED"


@needs_tensorboard
def test_a_search_done_anew_is_a_tracked_run_of_its_own(tmp_path: Path):
    job = job_for("tensorboard")
    with opened(str(tmp_path), job) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(2))
        run.history.append([evaluated(0, 0.5), evaluated(1, 0.6)])
    storage.remove(f"{tmp_path}/history")
    with opened(str(tmp_path), job) as run, tracked(run):
        run.history.append([evaluated(0, 0.1)])
    earlier, later = sorted((tmp_path / "tensorboard").iterdir(), key=os.path.getmtime)
    assert [step for step, _ in read_tensorboard(earlier)["search/best_fitness"]] == [1, 2]
    found = read_tensorboard(later)
    assert found["search/best_fitness"] == [(1, pytest.approx(0.1))]
    assert [step for step, _ in found["supernet/loss"]] == [1, 2]


@needs_tensorboard
def test_event_files_of_a_run_in_a_bucket_lie_there(
    s3: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    run = Run("s3://runs/tracked", job_for("tensorboard"))
    for number in (2, 3):
        with tracked(run):
            storage.write_json(run.path("curves/supernet.json"), epochs(number))
    [name] = storage.list_names(run.path("tensorboard"))
    files = storage.list_names(run.path("tensorboard", name))
    for each in files:
        (tmp_path / each).write_bytes(storage.read(run.path("tensorboard", name, each)))
    assert len(files) == 2
    assert [step for step, _ in read_tensorboard(tmp_path)["supernet/loss"]] == [1, 2, 3]


def test_mlflow_keeps_no_file_in_a_bucket():
    with pytest.raises(UserError, match="s3://runs/x is no place .* address of an MLflow server"):
        MLflow(Run("s3://runs/x", job_for("mlflow")), "name")


def test_a_package_that_is_missing_is_named_before_anything_is_done():
    with pytest.raises(UserError, match=r'tracking = "mlflow" needs no_such_one: .*\[track\]'):
        require(["json", "no_such_one"], "mlflow")


@needs_wandb
def test_weights_and_biases_takes_what_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """Without its server, which alone tells what it has; so only that it takes all of it."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    with opened(str(tmp_path), job_for("wandb")) as run, tracked(run):
        storage.write_json(run.path("curves/supernet.json"), epochs(2))
    [log] = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert log.read_bytes().count(b"supernet/loss/step") >= 2
    assert not [each for each in caplog.records if each.levelname == "WARNING"]


@needs_wandb
def test_weights_and_biases_without_a_key_is_refused(tmp_path: Path):
    import wandb

    wandb.teardown()  # which keeps the settings of its first use in a process
    with pytest.raises(UserError, match="knows no key here; say `wandb login`"):
        with opened(str(tmp_path), job_for("wandb")) as run, tracked(run):
            pass


# Trains an epoch and evaluates an architecture every tenth of a second, until it is killed.
DRIVER = """
import itertools, sys, time
from nasray.pipeline import tracking
from nasray.pipeline.run import opened
from tests.pipeline.test_tracking import *
tracking.LOOK_EVERY_S = 0.05
folder, to, number = sys.argv[1], sys.argv[2].split(","), int(sys.argv[3])
with opened(folder, job_for(*to)) as run, tracked(run):
    path = run.path("curves/supernet.json")
    done = len(storage.read_json(path)) if storage.exists(path) else 0
    for k in range(done, number):
        run.history.record(k, (k,), Evaluation(fitness=k / 1000))
        storage.write_json(path, epochs(k + 1))
        time.sleep(0.1)
"""


@pytest.mark.slow
@needs_mlflow
@needs_tensorboard
def test_kills_at_any_moment_leave_no_gap_and_no_step_twice(tmp_path: Path):
    chance, folder = seeded_chance(), str(tmp_path / "run")
    start = [sys.executable, "-c", DRIVER, folder, "mlflow,tensorboard"]
    for _ in range(5):
        with subprocess.Popen([*start, "100000"]) as process:
            before = len(History(f"{folder}/history").single)
            wait_for(lambda before=before: len(History(f"{folder}/history").single) > before, "it")
            time.sleep(chance.uniform(0, 6))
            process.send_signal(signal.SIGKILL)
    number = len(History(f"{folder}/history").single) + 3
    subprocess.run([*start, str(number)], check=True)
    for found in (read_mlflow(folder), read_tensorboard(folder)):
        assert [step for step, _ in sorted(found["supernet/loss"])] == [*range(1, number + 1)]
        assert [step for step, _ in sorted(found["search/best_fitness"])] == [*range(1, number + 1)]
