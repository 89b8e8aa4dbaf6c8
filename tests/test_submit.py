"""`ray job submit` to a cluster with token authentication runs a job as a laptop does."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import FinishedRun, assert_same_weights, evaluations, psutil, wait_for

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent  # where `ray` and `nasray` are, as in an active environment

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class Head:
    """A head node of its own, as `ray start --head` makes one."""

    url: str
    environment: dict[str, str]

    def submit(self, *entrypoint: str, folder: Path, **environment: str) -> tuple[int, str]:
        """Submit a job with `folder` as its working directory, and wait for its end."""
        command = [BIN / "ray", "job", "submit", "--address", self.url, "--working-dir", folder]
        return self.call(*command, "--", *entrypoint, **environment)

    def call(self, *command: str | Path, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            list(map(str, command)),
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def head(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    token = tmp_path_factory.mktemp("head") / "token"
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, client, agent = free_ports(4)
    # Ray's sockets lie in here, and a socket's path may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        variables = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": temp,
        }
        command = [BIN / "ray", "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}"]  # it takes the jobs
        command += [f"--temp-dir={temp}", "--disable-usage-stats"]
        with open(token.with_name("log"), "w") as log:
            process = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            ports = (dashboard, agent)
            wait_for(lambda: all(map(listens, ports)) or process.poll(), "the head is up")
            assert process.poll() is None, token.with_name("log").read_text()
            yield Head(f"http://127.0.0.1:{dashboard}", variables)
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            for each in (process, *family):
                each.kill()
            process.wait()
            psutil.wait_procs(family, timeout=10)


def free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def listens(port: int) -> bool:
    with socket.socket() as found:
        return found.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def checkout(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the repository holds, a job, and a run that git ignores."""
    folder = tmp_path_factory.mktemp("checkout") / "nasray"
    shutil.copytree(ROOT / "nasray", folder / "nasray")
    shutil.copy(ROOT / ".gitignore", folder)
    shutil.copy(finished_run.job_file, folder / "job.toml")
    (folder / "runs/old").mkdir(parents=True)
    return folder


def test_a_job_submitted_to_a_cluster_ends_as_one_on_a_laptop_does(
    head: Head, checkout: Path, finished_run: FinishedRun, tmp_path: Path
):
    run_dir = tmp_path / "run"
    done = shutil.ignore_patterns("history", "search.json", "retrain", "export", "report.html")
    shutil.copytree(finished_run.folder, run_dir, ignore=done)
    code, output = head.submit("nasray", "run", "job.toml", str(run_dir), folder=checkout)
    assert code == 0 and "succeeded" in output, output
    assert "Warning" not in output
    _, actors = head.call(BIN / "ray", "summary", "actors", "--address", head.url)
    assert "Evaluator" in actors and "ImplicitFunc" in actors  # not in a cluster of the job's own
    assert (run_dir / "report.html").exists()
    assert evaluations(run_dir) == evaluations(finished_run.folder)
    assert_same_weights(run_dir / "retrain/0/model.pt", f"{finished_run.folder}/retrain/0/model.pt")


def test_what_git_ignores_is_not_uploaded_and_a_relative_run_dir_is_warned_of(
    head: Head, checkout: Path
):
    code, output = head.submit("sh", "-c", "ls; nasray export out", folder=checkout)
    assert code != 0
    names = output.splitlines()
    assert "job.toml" in names and "runs" not in names
    assert "Warning: RUN_DIR out lies in this Ray job's working directory" in output
    assert "Error: " in output and "out is not a run directory" in output


def test_without_the_token_nothing_is_accepted(head: Head, checkout: Path):
    code, output = head.submit("true", folder=checkout, RAY_AUTH_MODE="disabled")
    assert code != 0
    assert "Unauthorized" in output
