"""What tests with a real Ray cluster share: the cluster, a small data set, jobs, its processes.

Such tests use the "tiny" space on 32-pixel pictures, so that what takes their time is Ray.
"""

import os
import secrets
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch

# Ray brings it along, and has it importable by its own name only after `import ray`.
from ray.thirdparty_files import psutil

from nasray.config import DataConfig, Job
from nasray.datasets import import_dataset

MakeJob = Callable[..., Job]

SETTINGS: dict[str, dict[str, Any]] = {
    "space": {"name": "tiny", "resolution": 32},
    "data": {"source": "parquet", "holdout_per_class": 8, "min_crop_area": 0.5},
    "compute": {"device": "cpu", "num_workers": 2, "num_evaluators": 2},
    "supernet": {
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": 0.05,
        "warmup_epochs": 1,
        "channel_warmup_start": 1,
        "channel_warmup_epochs": 2,
        "num_val_archs": 2,
        "val_calibration_images": 40,
    },
    "search": {
        "population_size": 6,
        "num_generations": 3,
        "num_parents": 2,
        "limits": [{"cost": "macs", "max": 1.2e6}],
        "calibration_images": 40,
        "batch_size": 20,
        "num_baseline": 2,
    },
    "retrain": {
        "num_trials": 2,
        "epochs": 3,
        "batch_size": 16,
        "learning_rate": [0.02, 0.1],
        "warmup_epochs": 1,
        "grace_epochs": 1,
    },
}


@pytest.fixture(scope="session", autouse=True)
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches and Ray's token out of the home directory, here and in what is started here."""
    folder = tmp_path_factory.mktemp("environment")
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NASRAY_CACHE", str(folder / "cache"))
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.3")
        patch.delenv("RAY_ADDRESS", raising=False)
        yield


@pytest.fixture(scope="session")
def ray_cluster(environment: None) -> Iterator[None]:
    """One cluster on this machine for all tests, with its dashboard: Tune needs it."""
    ray.init(address="local", num_cpus=max(4, os.cpu_count() or 1), log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of an imported data set: 4 classes of 24 training and 8 validation pictures."""
    path = str(tmp_path_factory.mktemp("small") / "data")
    config = DataConfig(
        source="synthetic", num_classes=4, train_per_class=24, val_per_class=8, image_side=32
    )
    import_dataset(config, path, seed=0)
    return path


@pytest.fixture(scope="session")
def make_job(small_data: str) -> MakeJob:
    """Make a job of two workers, two evaluators and a few seconds; sections as keywords."""

    def make(*, seed: int = 0, **changes: dict[str, Any]) -> Job:
        sections = {name: {**values, **changes.pop(name, {})} for name, values in SETTINGS.items()}
        assert not changes, f"no such section: {list(changes)}"
        sections["data"]["path"] = small_data
        return Job.model_validate({"seed": seed, **sections})

    return make


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float = 60.0) -> Any:
    """Poll `condition` until it holds and return what it returned."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {timeout_s:g} s")


def ray_processes(name: str, parent: int | None = None) -> list[int]:
    """Ids of the processes below `parent` (this one) that run a Ray actor or task of `name`."""
    found = []
    for process in psutil.Process(parent).children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # it has just ended
            continue
        if title.startswith("ray::") and name in title:
            found.append(process.pid)
    return found


def assert_same_weights(path: str, other: str) -> None:
    """Compare every tensor of two files of weights, bit by bit."""
    states = [torch.load(each, weights_only=True)["state"] for each in (path, other)]
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not different
