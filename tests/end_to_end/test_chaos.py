"""Kills at random moments change nothing in what a search finds, and lose no evaluation.

The slow form kills evaluators, nodes and the driver many times over, for every seed.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from nasray.search.candidate import Evaluation
from nasray.search.driver import Direct
from nasray.search.history import History
from tests.conftest import psutil, ray_processes, seeded_chance, wait_for
from tests.end_to_end.chaos_driver import fitness, name_of, search

pytestmark = pytest.mark.ray

DRIVER = Path(__file__).with_name("chaos_driver.py")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    """What each algorithm finds where nothing goes wrong, in one process."""
    pool = Direct(lambda arch: Evaluation(fitness=fitness(arch)))
    folder = tmp_path_factory.mktemp("undisturbed")
    return {name: search(f"{folder}/{name}", name, pool) for name in ("steady", "genetic")}


@pytest.fixture
def cluster(environment: None):
    """A head without evaluators and two nodes with room for two each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    yield cluster, nodes
    cluster.shutdown()


def start(
    folder: Path, cluster: Cluster, algorithm: str, *run: str, **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, DRIVER, folder, cluster.address, algorithm, *run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def on_record(folder: Path) -> set[str]:
    """Names of the architectures whose evaluation is on storage."""
    single = (folder / "history" / "_evaluations" / "search").glob("*.json")
    found = {name_of(json.loads(path.read_text())["arch"]) for path in single}
    return found | {name_of(c.arch) for c in History(f"{folder}/history").candidates}


def disturb(folder, cluster, nodes, algorithm, *, seed, kills, pause_s):
    """Search to the end under kills: how many of each kind, and what began after a record."""
    chance = random.Random(seed)
    counts = dict.fromkeys(("evaluator", "node", "driver"), 0)
    deaths: list[tuple[set[str], int]] = []  # of the driver: what was on record, and when
    process = start(folder, cluster, algorithm)
    wait_for(lambda: list((folder / "begun").glob("*")), "the first evaluation begins")
    while process.poll() is None:
        time.sleep(chance.uniform(0, 2 * pause_s))
        kind = chance.choice([kind for kind in kills if counts[kind] < kills[kind]] or ["none"])
        if kind == "evaluator" and (pids := ray_processes("Sleeper")):
            with suppress(psutil.NoSuchProcess):  # of a node that is just going
                psutil.Process(chance.choice(pids)).kill()
        elif kind == "node":
            cluster.remove_node(nodes.pop(chance.randrange(2)), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=2))
        elif kind == "driver" and process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            time.sleep(0.5)  # for what its evaluators have begun already
            deaths.append((on_record(folder), time.time_ns()))
            process = start(folder, cluster, algorithm)
        else:
            continue
        counts[kind] += 1
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    repeated = [
        name
        for name, began in begun(folder)
        if any(name in known and began > died for known, died in deaths)
    ]
    return counts, repeated, stdout


def begun(folder: Path) -> list[tuple[str, int]]:
    names = [path.name.split("-") for path in (folder / "begun").iterdir()]
    return [(name, int(began)) for name, began, _ in names]


def check(folder: Path, expected: list) -> None:
    found = History(f"{folder}/history").candidates
    assert [(c.arch, c.fitness, c.generation) for c in found] == [
        (c.arch, c.fitness, c.generation) for c in expected
    ]


def test_kills_of_evaluators_a_node_and_the_driver_change_nothing(cluster, undisturbed, tmp_path):
    kills = {"evaluator": 3, "node": 1, "driver": 1}
    seed = seeded_chance().randrange(10**6)
    counts, repeated, _ = disturb(tmp_path, *cluster, "steady", seed=seed, kills=kills, pause_s=0.7)
    check(tmp_path, undisturbed["steady"])
    assert counts["evaluator"] and not repeated


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["steady", "genetic"])
@pytest.mark.parametrize("seed", range(10))
def test_many_kills_change_nothing(cluster, undisturbed, tmp_path, algorithm, seed):
    kills = {"evaluator": 12, "node": 4, "driver": 4}
    counts, repeated, stdout = disturb(
        tmp_path, *cluster, algorithm, seed=seed, kills=kills, pause_s=0.7
    )
    found = {c.arch for c in History(f"{tmp_path}/history").candidates}
    lost = sum(c.arch not in found for c in undisturbed[algorithm])
    print(
        f"{algorithm}, seed {seed}: killed {counts}, evaluations lost: {lost}, done again: "
        f"{len(repeated)}; {stdout.strip()}"
    )
    check(tmp_path, undisturbed[algorithm])
    assert not repeated


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_full_node_a_hang_and_a_driver_that_slept_through_a_takeover_change_nothing(
    cluster, undisturbed, tmp_path, monkeypatch, s3, seed
):
    """On an object store: a disk is full on one of three nodes, the very first evaluation hangs,
    and the driver is stopped at any moment for longer than its lease lasts, then goes on beside the
    one that has taken over.
    """
    chance, (made, _) = random.Random(seed), cluster
    algorithm = ("steady", "genetic")[seed % 2]
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    run = f"s3://runs/chaos-{seed}"
    (tmp_path / "full").write_text(made.add_node(num_cpus=2).node_id)
    (tmp_path / "hang").touch()
    first = start(tmp_path, made, algorithm, run)
    wait_for(lambda: list((tmp_path / "begun").glob("*")), "the first evaluation begins")
    time.sleep(chance.uniform(0, 6))
    first.send_signal(signal.SIGSTOP)
    stopped_ns = time.time_ns()
    second = start(tmp_path, made, algorithm, run)
    if chance.random() < 0.8:  # else it wakes while the other one starts, or waits for it
        wait_for(
            lambda: any(began > stopped_ns + 2e9 for _, began in begun(tmp_path)),
            "the second driver has taken over",
            timeout_s=600,
        )
    time.sleep(chance.uniform(0, 5))
    first.send_signal(signal.SIGCONT)
    outcomes = [(each.communicate(), each.returncode) for each in (first, second)]
    ended_well = [printed for (printed, _), code in outcomes if code == 0]
    assert ended_well, outcomes
    for (_, complaint), code in outcomes:
        assert code == 0 or "taken over" in complaint or "in use" in complaint, outcomes
    assert not (tmp_path / "hang").exists()
    found = {c.arch for c in History(f"{run}/history").candidates}
    lost = sum(c.arch not in found for c in undisturbed[algorithm])
    print(f"{algorithm}, seed {seed}: {ended_well[0].strip()}, evaluations lost: {lost}")
    check(run, undisturbed[algorithm])


@pytest.mark.slow
def test_a_full_disk_is_waited_for(undisturbed, tmp_path, caplog):
    """A disk of 1.5 MB that is full after some evaluations, and is emptied after two seconds."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k,nr_inodes=1000", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    try:
        (disk / "filler").write_bytes(bytes(1_400_000))
        remover = subprocess.Popen(["sh", "-c", f"sleep 2; rm {disk}/filler"])
        search(str(disk), "steady", Direct(lambda arch: Evaluation(fitness=fitness(arch))))
        remover.wait()
        assert "No space left on device" in caplog.text
        check(disk, undisturbed["steady"])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
