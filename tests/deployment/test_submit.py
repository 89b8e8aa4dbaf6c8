"""`ray job submit` to a cluster with token authentication runs a job as a laptop does."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from ray._private.runtime_env import packaging

from nasray.cli.main import main
from nasray.cluster.connect import keep_token_private
from nasray.cluster.tunnel import reached
from nasray.cluster.upload import excludes
from nasray.errors import UserError
from nasray.storage import files as storage
from tests.conftest import (
    FinishedRun,
    assert_same_weights,
    evaluations,
    free_ports,
    listens,
    psutil,
    started,
    wait_for,
)

ROOT = Path(__file__).parents[2]
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

    def nasray(self, verb: str, *arguments: str, **options: Any) -> tuple[int, str]:
        """Call one of our verbs with the head's address, in a folder `cwd`."""
        return self.call(BIN / "nasray", verb, *arguments, "--address", self.url, **options)

    def call(
        self, *command: str | Path, cwd: Path | None = None, **environment: str
    ) -> tuple[int, str]:
        done = subprocess.run(
            list(map(str, command)),
            cwd=cwd,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=280,
        )
        return done.returncode, done.stdout


@pytest.fixture(scope="module")
def head(
    environment: None, s3: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Head]:
    token = tmp_path_factory.mktemp("head") / "token"
    token.write_text(secrets.token_hex(32))
    gcs, dashboard, client, agent = free_ports(4)
    log = token.with_name("log")
    # Ray's sockets lie in here, and a socket's path may have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        variables = os.environ | {
            **s3,
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": temp,
        }
        command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=4", f"--port={gcs}"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        command += [f"--dashboard-agent-listen-port={agent}"]  # it takes the jobs
        command += [f"--temp-dir={temp}", "--disable-usage-stats"]
        with started(command, log, env=variables) as process:
            ports = (dashboard, agent)
            wait_for(lambda: all(map(listens, ports)) or process.poll(), "the head is up")
            assert process.poll() is None, log.read_text()
            yield Head(f"http://127.0.0.1:{dashboard}", variables)


@pytest.fixture(scope="module")
def checkout(finished_run: FinishedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the repository holds, a job, and a run that git ignores."""
    folder = tmp_path_factory.mktemp("checkout") / "nasray"
    shutil.copytree(ROOT / "nasray", folder / "nasray")
    shutil.copy(ROOT / ".gitignore", folder)
    shutil.copy(finished_run.job_file, folder / "job.toml")
    (folder / "runs/old").mkdir(parents=True)
    return folder


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


def test_a_run_submitted_stopped_and_killed_ends_as_one_on_a_laptop_does(
    head: Head,
    checkout: Path,
    finished_run: FinishedRun,
    s3: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    uri = "s3://runs/submitted"
    files, _ = storage.list_below(finished_run.folder)
    done_again = ("history", "search.json", "train/", "lock", "retrain", "export", "report.html")
    for name in files:
        if not name.startswith(done_again):
            content = storage.read(storage.join(finished_run.folder, name))
            storage.write(storage.join(uri, name), content)

    def nasray(verb: str, *arguments: str) -> tuple[int, str]:
        return head.nasray(verb, *arguments, cwd=checkout)

    code, output = nasray("submit", "job.toml", uri, "--no-follow")
    assert code == 0 and f"nasray stop {uri} --address {head.url}" in output, output
    code, output = nasray("submit", "job.toml", uri)
    assert code != 0 and "is running on it" in output, output
    code, output = nasray("stop", uri)
    assert code == 0 and "has ended" in output, output
    code, output = nasray("stop", uri)
    assert code != 0 and f"no job is running on {uri}" in output

    code, output = nasray("submit", "job.toml", uri, "--no-follow")
    assert code == 0, output
    evaluated = f"{uri}/history/_evaluations/search"
    wait_for(lambda: storage.list_names(evaluated), "a candidate has been evaluated")
    [driver] = [each for each in psutil.process_iter() if is_driver(each, uri)]
    driver.kill()
    before = len(storage.list_names(evaluated))

    def told_of_failure() -> str:
        _, output = nasray("status", uri)
        return output if ": failed" in output else ""

    output = wait_for(told_of_failure, "the job is known to have failed")
    told = " ".join(output.split())
    assert ": stopped" in told and f"search begun {before} evaluations" in told

    nasray("submit", "job.toml", uri, "--no-follow")
    code, output = nasray("status", uri, "--follow")
    assert code == 0 and "Report:" in output and "Warning" not in output, output
    _, actors = head.call(BIN / "ray", "summary", "actors", "--address", head.url)
    assert "Evaluator" in actors and "ImplicitFunc" in actors  # not in a cluster of the job's own
    code, output = nasray("status", uri, "--json")
    statuses = [job["status"] for job in json.loads(output)["jobs"]]
    assert statuses == ["STOPPED", "FAILED", "SUCCEEDED"]
    assert evaluations(uri) == evaluations(finished_run.folder)
    assert storage.exists(storage.join(uri, "report.html"))
    weights = "retrain/0/model.pt"
    (tmp_path / "model.pt").write_bytes(storage.read(storage.join(uri, weights)))
    assert_same_weights(tmp_path / "model.pt", f"{finished_run.folder}/{weights}")


def is_driver(process: psutil.Process, uri: str) -> bool:
    try:
        command = process.cmdline()
    except psutil.Error:
        return False
    return command[1:4] == ["-m", "nasray", "run"] and uri in command


@pytest.mark.parametrize(
    "job, run_dir, options, complaint",
    [
        ("job.toml", "runs/x", [], "runs/x: a cluster needs a URI such as s3://bucket/run, or an"),
        ("job.toml", "/runs/x", ["--data", "here"], "--data 'here' is relative; a cluster"),
        ("../job.toml", "/runs/x", [], "not in the working directory, which is uploaded"),
        ("relative.toml", "/runs/x", [], "relative.toml: data.path = 'images' is relative"),
        ("runs/job.toml", "/runs/x", [], "job runs/job.toml: not among the files uploaded"),
        ("done/job.toml", "/runs/x", [], "job done/job.toml: not among the files uploaded"),
        ("job.toml", "s3://", [], "s3:// names no folder; give one such as s3://bucket/run"),
        ("job.toml", "s3://runs/a b", [], "s3://runs/a b: ' ' in a URI; give one without"),
        ("job.toml", "bogus://runs/x", [], "bogus:// is no storage; give a folder, or s3://"),
        ("no.toml", "/runs/x", [], "job no.toml: No such file"),
    ],
)
def test_what_a_cluster_cannot_see_is_refused_before_anything_is_sent(
    checkout: Path,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    run_dir: str,
    options: list[str],
    complaint: str,
):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    text = Path("job.toml").read_text()
    Path("../job.toml").write_text(text)
    for folder in ("runs", "done"):
        Path(folder).mkdir(exist_ok=True)
        Path(folder, "job.toml").write_text(text)
    Path("done/job.json").write_text("{}")
    Path("relative.toml").write_text(re.sub('path = ".*"', 'path = "images"', text))
    assert_refused(["submit", job, run_dir, "--address", "http://127.0.0.1:1", *options], complaint)


@pytest.mark.parametrize(
    "options, complaint",
    [
        (["--address", "http://127.0.0.1:1"], "http://127.0.0.1:1: Failed to connect to Ray"),
        (["--address", "127.0.0.1:1"], "http://127.0.0.1:1: Failed to connect to Ray"),
        (["--cluster", "no.yaml"], "--cluster no.yaml: No such file or directory"),
        (["--cluster", "job.toml"], "--cluster job.toml: not a file of Ray's cluster launcher"),
        ([], "which cluster? --cluster FILE, or --address"),
    ],
)
def test_a_cluster_that_is_not_there_is_one_line(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], complaint: str
):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert_refused(["stop", "/runs/x", *options], complaint)


def test_a_token_that_others_could_read_is_taken_from_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    keep_token_private()  # there is none
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0" * 64)
    token.chmod(0o644)
    keep_token_private()
    assert token.stat().st_mode & 0o777 == 0o600


def assert_refused(command: list[str], complaint: str) -> None:
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 1
    assert complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_run_directories_and_data_sets_are_not_sent(tmp_path: Path):
    sent = ["nasray/run.py", "jobs/mine.toml", "exp[1]/notes"]
    kept = ["exp[1]/run/job.json", "exp[1]/run/train/x", "sets/mine/dataset.json", ".git/x"]
    for name in sent + kept:
        storage.write(str(tmp_path / name), b"{}")
    os.mkfifo(tmp_path / "nasray" / "pipe")  # Ray would open it, and wait
    kept.append("nasray/pipe")
    excluded = packaging._get_excludes(tmp_path, excludes(str(tmp_path)))
    assert [name for name in sent + kept if excluded(tmp_path / name)] == kept


def test_a_tunnel_ends_with_all_that_carries_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`ray dashboard` starts ssh as a child, as this stand-in starts a web server."""
    server = f"{sys.executable} -m http.server --bind 127.0.0.1"
    stand_in(tmp_path, f"{server} $4\ntrue", monkeypatch)
    with reached(None, str(tmp_path / "cloud.yaml")) as url:
        port = int(url.rsplit(":", 1)[1])
        assert listens(port)
    assert not listens(port)


def test_a_tunnel_that_cannot_be_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stand_in(tmp_path, "echo Permission denied\necho Command failed >&2\nexit 1", monkeypatch)
    with pytest.raises(UserError, match="cannot reach its head .Permission denied . Command"):
        with reached(None, str(tmp_path / "cloud.yaml")):
            raise AssertionError


def stand_in(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that is called instead of `ray`, and the file of a cluster far away."""
    program = folder / "ray"
    program.write_text(f"#!/bin/sh\n{lines}\n")
    program.chmod(0o755)
    (folder / "cloud.yaml").write_text("provider: {type: aws}")
    monkeypatch.setattr(sys, "executable", str(folder / "python"))
