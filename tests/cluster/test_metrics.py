"""What Ray exports to Prometheus, and what the dashboard in clusters/ asks for."""

import json
import os
import re
import urllib.request
from pathlib import Path

import pytest
import ray

from nasray.cluster import metrics
from nasray.evaluation.pool import Pool
from nasray.search.candidate import Evaluation
from tests.conftest import wait_for

ROOT = Path(__file__).parents[2]
NAMES = {f"ray_{name}" for name in metrics.WHAT}


def test_the_dashboard_asks_for_these_metrics_and_no_others():
    dashboard = json.loads((ROOT / "clusters/grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert set(re.findall(r"\w*nasray_\w+", " ".join(queries))) == NAMES
    for query in queries:
        for name, labels in re.findall(r"ray_(nasray_\w+)\{(.+?)\}", query):
            tags = metrics.WHAT[name][1]
            assert set(re.findall(r"(\w+)=", labels)) <= set(tags), query
    variables = {each["name"] for each in dashboard["templating"]["list"]}
    asked = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard)))
    assert asked - {"__rate_interval", "__all"} == variables


def test_docs_name_every_metric():
    text = (ROOT / "docs/run.md").read_text()
    assert set(re.findall(r"`(ray_nasray_\w+)`", text)) == NAMES


@ray.remote(num_cpus=1)
class Square:
    """Squares numbers, and dies of the first attempt at 3."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def ready(self) -> None:
        metrics.training("mine", "supernet", 120.0)

    def evaluate(self, attempt: int, number: int) -> Evaluation:
        if number == 3 and attempt == 1:
            os._exit(1)
        return Evaluation(fitness=number**2, attempt=attempt)


def exported() -> dict[tuple[str, str], float]:
    """The values of nasray's metrics by name and by what else there is beside the run."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    text = urllib.request.urlopen(url).read().decode()
    found = re.findall(r'^(ray_nasray_\w+)\{(.*run="mine".*)\} (\S+)$', text, re.M)
    which = re.compile(r'(?:state|network)="(\w+)"')
    return {(name, "".join(which.findall(labels))): float(value) for name, labels, value in found}


@pytest.mark.ray
def test_ray_exports_what_the_pool_and_training_tell(ray_cluster: None):
    with Pool(
        lambda left_out: Square.remote(), number=2, max_failures=1, nodes=lambda: {}, run="mine"
    ) as pool:
        pool.metrics.best.set(0.5)
        for number in range(5):
            pool.submit(number, number)
        assert {key: found.fitness for key, found in (pool.next() for _ in range(5))} == {
            number: number**2 for number in range(5)
        }

        expected = {
            ("ray_nasray_evaluations_total", "succeeded"): 5.0,
            ("ray_nasray_lost_evaluators_total", ""): 1.0,
            ("ray_nasray_repeated_evaluations_total", ""): 1.0,
            ("ray_nasray_best_fitness", ""): 0.5,
            ("ray_nasray_evaluators", "idle"): float(len(pool.idle)),
            ("ray_nasray_evaluators", "busy"): 0.0,
            ("ray_nasray_training_images_per_second", "supernet"): 120.0,
        }
        assert {name for name, _ in expected} == NAMES
        found: dict[tuple[str, str], float] = {}

        def is_exported() -> bool:  # which each process does every few seconds
            pool._check_times()
            found.update(exported())
            return expected.items() <= found.items()

        try:
            wait_for(is_exported, "all is exported")
        finally:
            print(found)
