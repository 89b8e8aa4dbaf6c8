"""clusters/local.yaml: the real autoscaler brings evaluators and takes them away again."""

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from nasray.cluster.placement import evaluator_options, worker_labels
from nasray.config import ComputeConfig
from tests.conftest import (
    FinishedRun,
    assert_same_weights,
    evaluations,
    free_ports,
    listening_beyond_loopback,
    listens,
    psutil,
    started,
    wait_for,
)

CLUSTERS = Path(__file__).parents[2] / "clusters"
BIN = Path(sys.executable).parent
HEAD_NODE = "f" * 51 + "00000"

pytestmark = pytest.mark.ray


@dataclass(frozen=True)
class LocalCluster:
    config: Path
    url: str
    environment: dict[str, str]
    head: psutil.Process

    def nodes(self) -> dict[str, psutil.Process]:
        """The raylets of all nodes but the head's, by node id."""
        found = {}
        for process in self.head.children(recursive=True):
            try:
                command = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if "raylet/raylet " in command:
                [node] = re.findall(r"--node_id=(\w+)", command) or [str(process.pid)]
                found[node] = process
        found.pop(HEAD_NODE, None)
        return found

    def lose_nodes(self) -> None:
        """Kill all nodes but the head's, and all that runs there."""
        nodes = self.nodes().values()
        assert nodes
        for each in [process for node in nodes for process in (node, *node.children(True))]:
            with suppress(psutil.NoSuchProcess):
                each.kill()


@dataclass(frozen=True)
class Submitted:
    process: subprocess.Popen
    log: Path
    run_dir: Path

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def num_evaluated(self) -> int:
        return len(list((self.run_dir / "history/_evaluations/search").glob("*.json")))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        wait_for(lambda: condition() or self.process.poll() is not None, self.log.name)
        assert self.process.poll() is None, self.said

    def wait_for_success(self) -> None:
        assert self.process.wait(timeout=250) == 0, self.said


@contextmanager
def local_cluster(folder: Path) -> Iterator[LocalCluster]:
    """clusters/local.yaml as it is, but for its port."""
    gcs, dashboard, agent, client = free_ports(4)
    config = folder / "local.yaml"
    text = (CLUSTERS / "local.yaml").read_text()
    config.write_text(text.replace("127.0.0.1:6379", f"127.0.0.1:{gcs}"))
    token, log = folder / "token", folder / "log"
    token.write_text(secrets.token_hex(32))
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True) as temp:
        variables = os.environ | {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_TMPDIR": temp,
            "CONFIG": str(config),
            "PORT": str(gcs),
        }
        command = ["sh", str(CLUSTERS / "local.sh"), f"--dashboard-port={dashboard}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--temp-dir={temp}"]
        command += [f"--ray-client-server-port={client}"]
        with started(command, log, env=variables) as process:
            ports = (dashboard, agent)
            wait_for(lambda: all(map(listens, ports)) or process.poll(), "the head is up")
            assert process.poll() is None, log.read_text()
            url = f"http://127.0.0.1:{dashboard}"
            yield LocalCluster(config, url, variables, psutil.Process(process.pid))


@contextmanager
def submitted(cluster: LocalCluster, job_file: str, run_dir: Path) -> Iterator[Submitted]:
    """`nasray submit`, which follows the job until its end."""
    command = [BIN / "nasray", "submit", job_file, run_dir]
    command += ["--cluster", cluster.config, "--address", cluster.url]
    log = run_dir.with_name(f"submit-{cluster.head.pid}.log")
    environment = {"env": cluster.environment, "cwd": Path(job_file).parent}
    with started(list(map(str, command)), log, **environment) as process:
        yield Submitted(process, log, run_dir)


@pytest.mark.slow
def test_evaluator_nodes_come_with_the_work_and_go_and_may_die_meanwhile(
    environment: None, finished_run: FinishedRun, tmp_path: Path
):
    run_dir = tmp_path / "run"
    # The winner stays the same, so it need not be retrained.
    done = shutil.ignore_patterns("history", "search.json", "report.html")
    shutil.copytree(finished_run.folder, run_dir, ignore=done)
    with local_cluster(tmp_path) as cluster:
        assert not cluster.nodes()
        with submitted(cluster, finished_run.job_file, run_dir) as job:
            job.wait_until(lambda: job.num_evaluated >= 3)
            cluster.lose_nodes()
            job.wait_for_success()
        assert "an evaluator was lost" in job.said
        assert evaluations(run_dir) == evaluations(finished_run.folder)
        assert listening_beyond_loopback(cluster.head.pid) == []
        wait_for(lambda: not cluster.nodes(), "all nodes but the head have gone")


@pytest.mark.slow
def test_a_run_survives_the_loss_of_its_trainer_of_an_evaluator_and_of_the_head(
    environment: None, finished_run: FinishedRun, tmp_path: Path
):
    run_dir = tmp_path / "run"
    curves = run_dir / "curves/supernet.json"
    with local_cluster(tmp_path) as cluster:
        with submitted(cluster, finished_run.job_file, run_dir) as job:
            job.wait_until(lambda: curves.exists() and len(json.loads(curves.read_text())) >= 2)
            cluster.lose_nodes()
            job.wait_until(lambda: job.num_evaluated >= 3)
            cluster.lose_nodes()
            job.wait_until(lambda: job.num_evaluated >= 12)
        # Here all of it is killed, the head first.
    with local_cluster(tmp_path) as cluster:
        with submitted(cluster, finished_run.job_file, run_dir) as job:
            job.wait_for_success()
    assert evaluations(run_dir) == evaluations(finished_run.folder)
    for weights in ("supernet.pt", "retrain/0/model.pt"):
        assert_same_weights(run_dir / weights, f"{finished_run.folder}/{weights}")


def test_evaluators_prefer_spot_nodes_and_training_avoids_them(ray_cluster: None):
    compute = ComputeConfig(device="cpu")
    assert worker_labels(compute, gpu=False) == {"ray.io/market-type": "!spot"}
    options = evaluator_options(compute)
    assert options["label_selector"] == {"ray.io/market-type": "spot"}
    assert options["fallback_strategy"] == [{"label_selector": {}}]


def test_a_job_says_where_its_roles_run(ray_cluster: None):
    compute = ComputeConfig(
        device="gpu",
        gpus_per_evaluator=0.25,
        accelerator_type="T4",
        worker_labels={"ray.io/market-type": "in(spot, on-demand)"},
        evaluator_labels={"ray.io/market-type": "spot"},
    )
    assert worker_labels(compute, gpu=True) == {
        "ray.io/market-type": "in(spot, on-demand)",
        "ray.io/accelerator-type": "T4",
    }
    options = evaluator_options(compute)
    assert options["num_gpus"] == 0.25 and options["num_cpus"] == 1
    assert options["label_selector"] == {
        "ray.io/market-type": "spot",
        "ray.io/accelerator-type": "T4",
    }
    assert "fallback_strategy" not in options  # spot or nothing
