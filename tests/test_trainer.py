"""A supernet's training ends in the same weights, whatever happens to it on the way."""

import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import MakeJob, assert_same_weights, ray_processes, wait_for

from nasray import storage
from nasray.config import Job
from nasray.errors import UserError
from nasray.trainer import train_supernet

pytestmark = pytest.mark.ray


def train(job: Job, run_dir: Path) -> str:
    return train_supernet(job, str(run_dir), job.data.path)


def curves(run_dir: Path) -> list[dict]:
    """The epochs recorded, without what the clock decides."""
    path = f"{run_dir}/curves/supernet.json"
    epochs = storage.read_json(path) if storage.exists(path) else []
    return [{key: epoch[key] for key in epoch if key != "seconds"} for epoch in epochs]


@pytest.fixture(scope="module")
def undisturbed(make_job: MakeJob, ray_cluster: None, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed")
    train(make_job(supernet={"epochs": 6}), run_dir)
    return run_dir


def test_training_records_every_epoch(undisturbed: Path):
    epochs = curves(undisturbed)
    assert [epoch["epoch"] for epoch in epochs] == list(range(6))
    assert [epoch["lowest_scale"] for epoch in epochs[:2]] == [2.0, 1.0]
    assert all(0 < epoch["val_top1"] <= 1 for epoch in epochs)


def test_a_killed_worker_changes_no_weight(undisturbed: Path, make_job, ray_cluster, tmp_path):
    chance, killed = random.Random(), []

    def kill() -> None:
        wait_for(lambda: curves(tmp_path), "the first epoch is recorded")
        time.sleep(chance.uniform(0, 1))  # any moment from there on
        killed.extend(ray_processes("RayTrainWorker")[:1])
        for pid in killed:
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    path = train(make_job(supernet={"epochs": 6}), tmp_path)
    killer.join()
    assert killed
    assert_same_weights(path, f"{undisturbed}/supernet.pt")
    assert curves(tmp_path) == curves(undisturbed)
