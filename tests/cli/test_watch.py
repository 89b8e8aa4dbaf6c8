"""`nasray watch` follows a run to its end, on a terminal and elsewhere."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from nasray.cli.main import main
from nasray.config import parse_job
from nasray.storage import files as storage
from nasray.storage import locks
from tests.conftest import start_nasray, wait_for

STAGES = ("data", "supernet", "search", "retrain", "export", "report")


@pytest.fixture
def run(tmp_path: Path) -> str:
    """A run directory whose training has begun."""
    folder, values = str(tmp_path / "run"), {"data": {"source": "synthetic"}}
    values["supernet"] = {"epochs": 4, "channel_warmup_start": 0}
    storage.write_json(f"{folder}/job.json", {"job": parse_job(values, "test").model_dump()})
    storage.write_json(f"{folder}/fingerprint.json", "a hash")
    train(folder, 1)
    return folder


def train(folder: str, epochs: int) -> None:
    storage.write_json(f"{folder}/curves/supernet.json", epochs * [{"loss": 1.0, "val_top1": 0.5}])


def finish(folder: str) -> None:
    storage.write(f"{folder}/supernet.pt", b"")
    summary = {"num_evaluations": 20, "winner": {"fitness": 0.75}}
    storage.write_json(f"{folder}/search.json", summary)
    storage.write_json(f"{folder}/retrain/0/result.json", {"val_top1": 0.5})
    for name in ("export/0.onnx", "report.html"):
        storage.write(f"{folder}/{name}", b"")


def test_a_run_is_followed_by_lines_until_it_is_finished(run: str, tmp_path: Path):
    with open(tmp_path / "out", "w") as out:
        process = start_nasray("watch", run, "--every", "0.1", stdout=out)

        def says(text: str) -> bool:
            assert process.poll() is None
            return text in (tmp_path / "out").read_text()

        wait_for(lambda: says("no nasray process works on it"), "that nobody works on it")
        with locks.held(run):
            wait_for(lambda: says("epoch 1 of 4"), "one epoch")
            train(run, 2)
            wait_for(lambda: says("epoch 2 of 4, hold-out 50.0%"), "another one")
            (tmp_path / "run/curves/supernet.json").write_text("{")
            wait_for(lambda: says("cannot be read now: "), "what is amiss")
            train(run, 4)
            finish(run)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines[0].split() == ["data", "done", "synthetic"]
    assert len([line for line in lines if "epoch 2 of 4" in line]) == 1  # as long as it is so
    assert "search done 20 evaluations, best 75.00 %" in [" ".join(line.split()) for line in lines]


def test_a_terminal_shows_one_screen_that_ctrl_c_leaves(run: str):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "nasray", "watch", run, "--every", "0.1"]
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "LINES": "30"}
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, env=environment)
    said = ""

    def read(text: str) -> None:
        nonlocal said
        end = time.monotonic() + 120
        while text not in said and time.monotonic() < end:
            if select.select([ours], [], [], 0.5)[0]:
                said += os.read(ours, 65536).decode()
        assert text in said

    with locks.held(run):
        read("epoch 1 of 4")
        train(run, 2)
        read("epoch 2 of 4")
        read("about ")  # so long it still takes
        assert "\x1b[1A" in said  # it goes up to write over what it showed before
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    read("the run goes on")
    os.close(theirs)
    os.close(ours)


def test_what_is_no_run_is_one_line(tmp_path: Path):
    result = CliRunner().invoke(main, ["watch", str(tmp_path)])
    assert result.exit_code == 1
    assert re.fullmatch(r"Error: \S+ is not a run directory: it has no job.json\n", result.stderr)


def test_a_finished_run_is_shown_once(run: str):
    finish(run)
    result = CliRunner().invoke(main, ["watch", run])
    assert result.exit_code == 0
    assert tuple(line.split()[0] for line in result.stdout.splitlines()) == STAGES
