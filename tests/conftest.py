"""What tests with a real Ray cluster share: the cluster, a small data set, jobs, its processes.

Such tests use the "tiny" space on 32-pixel pictures, so that what takes their time is Ray.
"""

import os
import random
import secrets
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

# Ray brings it along, and has it importable by its own name only after `import ray`.
from ray.thirdparty_files import psutil

from nasray.config import DataConfig, Job
from nasray.data.importing import import_dataset
from nasray.search.history import History

MakeJob = Callable[..., Job]

JOB = """
[space]
name = "tiny"
resolution = 32

[data]
source = "parquet"
holdout_per_class = 8
min_crop_area = 0.5

[compute]
device = "cpu"
num_workers = 2
num_evaluators = 2

[supernet]
epochs = 8
batch_size = 16
learning_rate = 0.05
warmup_epochs = 1
channel_warmup_start = 0
channel_warmup_epochs = 7
num_val_archs = 2
val_calibration_images = 40

[search]
population_size = 8
num_generations = 3
num_parents = 2
limits = [{ cost = "macs", max = 1.2e6 }]
calibration_images = 40
batch_size = 20
num_baseline = 2

[retrain]
num_trials = 2
epochs = 8
batch_size = 16
learning_rate = [0.02, 0.1]
warmup_epochs = 1
grace_epochs = 1
"""


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
def ray_cluster(begun_run: "BegunRun | None") -> Iterator[None]:
    """One cluster on this machine for all tests, with its dashboard: Tune needs it."""
    if begun_run:
        begun_run.process.wait(timeout=300)  # lest its processes be taken for the cluster's
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
    """Make JOB, which takes seconds, with other values: make_job(supernet={"epochs": 1})."""

    def make(*, seed: int = 0, **changes: dict[str, Any]) -> Job:
        sections = tomllib.loads(JOB)
        sections["data"]["path"] = small_data
        for name, values in changes.items():
            sections[name] |= values
        return Job.model_validate({"seed": seed, **sections})

    return make


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test that starts Ray through a fixture as "ray"; have all such tests come last.

    The others run while the finished run, which begins with the session, is under way.
    """
    for item in items:
        if needs_run(item) or "ray_cluster" in item.fixturenames:
            item.add_marker("ray")
    items.sort(key=lambda item: bool(item.get_closest_marker("ray")))


def needs_run(item: pytest.Item) -> bool:
    """Whether a test looks at the finished run."""
    return "finished_run" in item.fixturenames


@dataclass(frozen=True)
class BegunRun:
    """JOB being done from beginning to end by one `nasray run` that nothing disturbs."""

    folder: str  # of the job file and what the run prints; its directory is in it
    process: subprocess.Popen


@pytest.fixture(scope="session", autouse=True)
def begun_run(
    environment: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[BegunRun | None]:
    if not any(map(needs_run, request.session.items)):
        yield None
        return
    folder = tmp_path_factory.mktemp("finished")
    job_file, small_data = folder / "job.toml", request.getfixturevalue("small_data")
    job_file.write_text(JOB.replace("[data]", f'[data]\npath = "{small_data}"'))
    with open(folder / "stdout", "w") as stdout, open(folder / "stderr", "w") as stderr:
        process = start_nasray("run", job_file, folder / "run", stdout=stdout, stderr=stderr)
    yield BegunRun(str(folder), process)
    process.kill()
    process.wait()


@dataclass(frozen=True)
class FinishedRun:
    folder: str
    job_file: str
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def finished_run(begun_run: BegunRun) -> FinishedRun:
    begun_run.process.wait(timeout=300)
    folder = Path(begun_run.folder)
    stdout, stderr = ((folder / name).read_text() for name in ("stdout", "stderr"))
    assert begun_run.process.returncode == 0, stderr
    return FinishedRun(str(folder / "run"), str(folder / "job.toml"), stdout, stderr)


def start_nasray(*arguments: str | Path, **output: Any) -> subprocess.Popen:
    """Start a command of nasray's as a process of its own, with its output in pipes or `output`."""
    return subprocess.Popen(
        [sys.executable, "-m", "nasray", *map(str, arguments)],
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | output),
        text=True,
    )


def wait_for(condition: Callable[[], Any], what: str, *, timeout_s: float = 120.0) -> Any:
    """Poll `condition` until it holds and return what it returned."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"{what}: not within {timeout_s:g} s")


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


def listening_beyond_loopback(pid: int) -> list[tuple[str, str]]:
    """What a process and those below it listen on other than this machine's own addresses."""
    root = psutil.Process(pid)
    found = []
    for process in (root, *root.children(recursive=True)):
        with suppress(psutil.Error):  # it has just ended
            for each in process.net_connections(kind="inet"):
                if each.status == psutil.CONN_LISTEN:
                    found.append((process.name(), each.laddr.ip.removeprefix("::ffff:")))
    assert found, "nothing listens at all"
    return [(name, ip) for name, ip in found if not ip.startswith(("127.", "::1"))]


@contextmanager
def started(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen]:
    """A process with its output in `log`, ended together with all its children."""
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, **options)
    try:
        yield process
    finally:
        family = []
        with suppress(psutil.NoSuchProcess):
            family = psutil.Process(process.pid).children(recursive=True)
        for each in (process, *family):
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        psutil.wait_procs(family, timeout=10)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server with a bucket "runs": the environment of programs that use it."""
    [port] = free_ports(1)
    server = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    url = f"http://127.0.0.1:{port}"
    with started(server, tmp_path_factory.mktemp("s3") / "log"):
        wait_for(lambda: listens(port), "the S3 server is up")
        urllib.request.urlopen(urllib.request.Request(f"{url}/runs", method="PUT")).close()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }


def seeded_chance() -> random.Random:
    """Draws the moment of a kill. NASRAY_TEST_SEED repeats a test that failed with that seed."""
    seed = int(os.environ.get("NASRAY_TEST_SEED") or secrets.randbelow(10**6))
    print(f"NASRAY_TEST_SEED={seed}")  # which pytest shows if the test fails
    return random.Random(seed)


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


def assert_same_weights(path: str | Path, other: str | Path) -> None:
    """Compare every tensor of two files of weights, bit by bit."""
    states = [torch.load(each, weights_only=True)["state"] for each in (path, other)]
    assert states[0].keys() == states[1].keys()
    different = [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert not different


def evaluations(run_dir: str | Path) -> list[tuple]:
    """What a search has found, in order: (generation, arch, fitness)."""
    candidates = History(f"{run_dir}/history").candidates
    return [(found.generation, found.arch, found.fitness) for found in candidates]
