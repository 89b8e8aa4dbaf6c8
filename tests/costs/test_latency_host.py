"""Latencies of another machine, over ssh: a host that has python3, numpy and onnxruntime.

A program of ours takes ssh's place and runs what it is given in a shell of this machine, where
python3 sees none of the packages of this environment but those two.
"""

import ast
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from nasray.costs import latency_board
from nasray.costs.latency import LatencyTable
from nasray.costs.latency_board import Sessions, numbers_of, pinned, ranges_of
from nasray.costs.latency_check import check
from nasray.costs.latency_files import block_key, read_lines
from nasray.costs.latency_measure import measure
from nasray.costs.latency_onnx import to_onnx
from nasray.costs.latency_timing import (
    Setup,
    describe,
    place_at,
    time_blocks,
    time_network,
    time_onnx,
)
from nasray.errors import UserError
from nasray.spaces.supernet import build_subnet
from tests.costs.test_latency import TINY, measure_quickly

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
SETUP = Setup(runtime="onnxruntime")
ARCH = TINY.named["largest"]

# Finds the command behind ssh's options and the host's name; a login says something, too.
SSH = """#!/bin/sh
while [ "$1" != -- ]; do shift; done
shift 2
echo "Welcome to the board"
echo "a warning of no importance" >&2
PATH={path} exec /bin/sh -c "exec $*"
"""
PYTHON = """#!/bin/sh
exec /usr/bin/env -i PYTHONPATH={packages} {python} -s -S "$@"
"""


def write_program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """The folder of the packages that the host "me@board" has."""
    ours, there, packages = (tmp_path / name for name in ("ours", "there", "packages"))
    for folder in (ours, there, packages):
        folder.mkdir()
    write_program(ours / "ssh", SSH.format(path=there))
    write_program(there / "python3", PYTHON.format(packages=packages, python=sys.executable))
    for name in ("numpy", "onnxruntime"):
        [package] = importlib.util.find_spec(name).submodule_search_locations
        (packages / name).symlink_to(package)
    monkeypatch.setenv("PATH", f"{ours}:{os.environ['PATH']}")
    return packages


@pytest.fixture
def network() -> bytes:
    blocks = [block for block in TINY.decode(ARCH) if block is not None]
    return to_onnx(build_subnet(blocks).eval(), (1, 3, 16, 16), "fp32")


def test_a_host_without_torch_times_blocks_and_networks(packages):
    with place_at("me@board", SETUP) as place:
        times = time_blocks(TINY, ARCH, SETUP, place=place)
        blocks = [block for block in TINY.decode(ARCH) if block is not None]
        assert [key for key, _ in times] == [block_key(block) for block in blocks]
        assert all(ms > 0 for _, ms in times)
        assert time_network(TINY, ARCH, SETUP, place=place) > 0
        held = list(dict.fromkeys(f"tiny 0 fp32 {key}" for key, _ in times))
        assert place.missing(["another", *held]) == ["another"]  # kept for the next network
        # This machine is the host, and its onnxruntime is ours.
        assert describe(TINY, SETUP, place=place) == describe(TINY, SETUP)
    assert place.process.poll() == 0


def test_a_table_is_measured_on_a_host_and_checked_there(packages, tmp_path, monkeypatch):
    setup = Setup(runtime="onnxruntime", precision="int8", batch_size=2, cpus=CORE)
    path = str(tmp_path / "board.csv")
    with place_at("me@board", setup) as place:
        measure_quickly(TINY, path, monkeypatch, setup=setup, place=place)
        said = describe(TINY, setup, place=place)
    table = LatencyTable.load(path, TINY)
    assert table.provenance == said and said["precision"] == "int8" and said["cpus"] == CORE
    assert said["affinity"] == f"1 of {os.cpu_count()} cores: {CORE}"
    assert len(check(TINY, table, host="me@board", num_archs=2).rows) == 2
    (packages / "onnxruntime").unlink()
    with pytest.raises(UserError, match="^me@board has no onnxruntime"):
        check(TINY, table, host="me@board", num_archs=2)


def test_a_measurement_goes_on_after_a_lost_connection(packages, tmp_path):
    path = str(tmp_path / "board.csv")
    with place_at("me@board", SETUP) as place:
        with pytest.raises(UserError, match=r"^the connection to me@board was lost \(a warning"):
            measure(TINY, path, setup=SETUP, place=place, show=lambda *_: place.process.kill())
    first = {line["block"]: line["samples_ms"] for line in read_lines(path)}
    assert len(first) == len(TINY.gene_columns)  # one network

    def interrupt(done: int, text: str) -> None:
        raise KeyboardInterrupt

    with place_at("me@board", SETUP) as place, pytest.raises(KeyboardInterrupt):
        measure(TINY, path, setup=SETUP, place=place, show=interrupt)
    after = {line["block"]: line["samples_ms"] for line in read_lines(path)}
    assert after.keys() > first.keys()
    assert all(after[key].startswith(samples) for key, samples in first.items())


def test_what_a_host_lacks_is_one_line(packages, tmp_path, monkeypatch):
    def complaint() -> str:
        with pytest.raises(UserError) as caught, place_at("me@board", SETUP):
            pass
        assert "\n" not in str(caught.value)
        return str(caught.value)

    (packages / "onnxruntime").unlink()
    lacking = "me@board has no {}: python3 -m pip install onnxruntime there"
    assert complaint() == lacking.format("onnxruntime")
    (packages / "numpy").unlink()
    assert complaint() == lacking.format("numpy")
    old = f"exec {sys.executable} -c 'import sys; sys.version_info = (3, 7, 9); exec(sys.argv[2])'"
    write_program(tmp_path / "there" / "python3", f'#!/bin/sh\n{old} "$@"\n')
    assert complaint() == (
        "me@board cannot measure: python3 is older than 3.8; install a newer one"
    )
    (tmp_path / "there" / "python3").unlink()
    assert complaint().startswith("me@board has no python3 (")
    (tmp_path / "ours" / "ssh").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "ours"))
    assert complaint() == "me@board is reached by ssh: install OpenSSH's client here"


@pytest.mark.skipif(not shutil.which("ssh"), reason="OpenSSH's client is not here")
def test_a_host_that_ssh_does_not_reach_is_one_line():
    with pytest.raises(UserError) as caught, place_at("me@board.invalid", SETUP):
        pass
    assert str(caught.value).startswith("ssh does not reach me@board.invalid (ssh: Could not res")
    assert str(caught.value).endswith("; `ssh me@board.invalid true` must work first")


def test_what_a_host_refuses_is_said_with_its_name(packages, network):
    of_the_future = onnx.load_from_string(network)
    of_the_future.opset_import[0].version = 99
    with place_at("me@board", SETUP) as place:
        with pytest.raises(UserError, match="^me@board: onnxruntime .*opset.*; update it: python3"):
            time_onnx(of_the_future.SerializeToString(), SETUP, place=place)
        assert time_onnx(network, SETUP, place=place) > 0  # the connection is there still
    beyond = Setup(runtime="onnxruntime", cpus="100000")
    with pytest.raises(UserError, match="^me@board: cpus = '100000': the cores that can be used"):
        with place_at("me@board", beyond):
            pass
    with pytest.raises(UserError, match="^cpus = '100000': the cores that can be used are "):
        describe(TINY, beyond)
    with pytest.raises(UserError, match="^cpus = '100000': the cores that can be used are "):
        time_network(TINY, ARCH, beyond)
    with pytest.raises(UserError, match="'me@board' measures with runtime = 'onnxruntime' only"):
        place_at("me@board", Setup())


def test_what_is_sent_to_a_host_is_python_3_8_and_needs_no_more_than_onnxruntime():
    tree = ast.parse(Path(latency_board.__file__).read_text(), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_sessions_used_longest_ago_are_dropped_when_memory_is_short(network):
    sessions = Sessions(1, most_bytes=2 * len(network))
    for name in "abc":
        sessions.hold(name, network)
    assert sessions.missing(["a", "d"]) == ["d"]  # "a" is wanted: "b" makes room
    assert list(sessions.held) == ["c", "a"]
    for name in "de":
        sessions.hold(name, network)
    # Those of one network are all kept, however little memory there is.
    assert sessions.missing(["c", "a", "d", "e"]) == []
    assert len(sessions.time(["c"])) == 1
    assert sessions.missing(["e"]) == [] and list(sessions.held) == ["d", "e"]


CORE = str(sorted(os.sched_getaffinity(0))[-1])


def test_cores_are_chosen_and_given_back():
    assert numbers_of("0,4-7, 9") == {0, 4, 5, 6, 7, 9}
    assert ranges_of({0, 4, 5, 6, 7, 9}) == "0,4-7,9" and ranges_of([]) == ""
    before = os.sched_getaffinity(0)
    with pinned(CORE):
        assert os.sched_getaffinity(0) == {int(CORE)}
    assert os.sched_getaffinity(0) == before
    # The kernel takes those that are there.
    with pytest.raises(ValueError, match="the cores that can be used are "):
        with pinned(f"{CORE},{max(before) + 1000}"):
            pass
    assert os.sched_getaffinity(0) == before


def test_steps_follow_one_another_and_runs_that_were_disturbed_do_not_count():
    seen = []

    def run(steps, features):
        seen.append(features)
        return [100.0, 100.0] if len(seen) % 2 else [1.0, 2.0]

    assert latency_board.undisturbed([], "images", run) == pytest.approx([1.0, 2.0])
    assert len(seen) == latency_board.WARMUP_RUNS + latency_board.RUNS
    steps = [lambda features: features + 1, lambda features: seen.append(features)]
    assert np.shape(latency_board.run_in_order(steps, 1)) == (2,) and seen[-1] == 2
