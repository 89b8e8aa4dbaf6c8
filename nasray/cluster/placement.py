"""The resources and node labels that each role requests.

A lost node costs training an epoch, but only one evaluation. So training and retraining avoid
spot nodes, and evaluators prefer them. The node label ray.io/market-type tells them apart; nodes
without it, such as a laptop, take every role.
"""

import logging
import math
from collections.abc import Collection
from typing import Any

import ray
from ray._private import state

from nasray.config import ComputeConfig
from nasray.errors import UserError

logger = logging.getLogger(__name__)

MARKET = "ray.io/market-type"
ACCELERATOR = "ray.io/accelerator-type"
NODE = "ray.io/node-id"
Labels = dict[str, str]


def on_gpu(compute: ComputeConfig, num_gpus: float) -> bool:
    """Whether a role that needs `num_gpus` at once runs on GPUs: by compute.device, or if there
    are as many.
    """
    if compute.device != "auto":
        return compute.device == "gpu"
    found = ray.cluster_resources().get("GPU", 0)
    if 0 < found < num_gpus:
        logger.warning(
            "%g GPUs are fewer than the %g requested, so CPUs are used; lower [compute] "
            'num_workers or gpus_per_evaluator, or set device = "gpu" to wait for more',
            found,
            num_gpus,
        )
    return 0 < num_gpus <= found


def worker_labels(compute: ComputeConfig, *, gpu: bool) -> Labels:
    """The label selector of training workers and trials."""
    return {MARKET: "!spot"} | _accelerator(compute, gpu) | compute.worker_labels


def evaluator_options(compute: ComputeConfig) -> dict[str, Any]:
    """The resources and labels of an evaluator, as options of its Ray actor.

    With fewer GPUs than evaluators, those that find none wait for one.
    """
    gpus = compute.gpus_per_evaluator
    gpu = on_gpu(compute, gpus)
    if gpu and (found := ray.cluster_resources().get("GPU", 0)) < gpus * compute.num_evaluators:
        logger.warning(
            "%g GPUs take %d of the %d evaluators at once; the others wait for more GPUs",
            found,
            found / gpus,
            compute.num_evaluators,
        )
    anywhere = _accelerator(compute, gpu) | compute.evaluator_labels
    options: dict[str, Any] = {
        "num_cpus": compute.cpus_per_evaluator,
        "num_gpus": gpus if gpu else 0,
        "label_selector": {MARKET: "spot"} | anywhere,
    }
    if MARKET not in anywhere:
        options["fallback_strategy"] = [{"label_selector": anywhere}]
    return options


def avoiding(options: dict[str, Any], nodes: Collection[str]) -> dict[str, Any]:
    """These options of an actor, which is placed on none of the `nodes`, ids."""
    if not nodes:
        return options
    others = {NODE: f"!in({','.join(sorted(nodes))})"}
    found = options | {"label_selector": others | options["label_selector"]}
    if "fallback_strategy" in options:
        found["fallback_strategy"] = [
            {"label_selector": others | each["label_selector"]}
            for each in options["fallback_strategy"]
        ]
    return found


def nodes_with_room(num_cpus: float = 0, num_gpus: float = 0) -> dict[str, str]:
    """The addresses, by id, of the nodes alive that have so many CPUs and GPUs, busy or not."""
    return {
        node["NodeID"]: node.get("NodeManagerAddress", node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and _num_that_fit(node, num_cpus, num_gpus) >= 1
    }


def num_places(labels: Labels, num_cpus: float, num_gpus: float = 0) -> int:
    """How many processes with so many CPUs and GPUs the nodes have room for, busy or not.

    `labels` is the label selector that keeps the processes to some of the nodes.
    """
    return sum(
        int(_num_that_fit(node, num_cpus, num_gpus))
        for node in ray.nodes()
        if node["Alive"] and _is_selected(node.get("Labels", {}), labels)
    )


def _num_that_fit(node: dict[str, Any], num_cpus: float, num_gpus: float) -> float:
    """How many processes with so many CPUs and GPUs a node has room for if it is idle."""
    resources, wanted = node.get("Resources", {}), {"CPU": num_cpus, "GPU": num_gpus}
    shares = (resources.get(name, 0) // number for name, number in wanted.items() if number)
    return min(shares, default=math.inf)


def _is_selected(labels: Labels, selector: Labels) -> bool:
    """Whether a node with these labels is one for a label selector: "a", "!a", "in(a,b)"."""
    for key, condition in selector.items():
        positive = condition.removeprefix("!")
        inside = positive.startswith("in(")
        values = positive[3:-1].split(",") if inside else [positive]
        if (labels.get(key) in [value.strip() for value in values]) == condition.startswith("!"):
            return False
    return True


def node_of_dead(actor: Any) -> str:
    """The id of the node on which an actor ended; empty if it was never placed."""
    actor_id = getattr(actor, "_actor_id", None)
    found = state.actors(actor_id.hex()) if actor_id else {}
    return found.get("Address", {}).get("NodeID", "")


def check_labels(compute: ComputeConfig) -> None:
    """Check the labels in [compute], which Ray would only do when it places the first worker.

    Raises:
        UserError: Ray does not accept a label.
    """
    gpu = {ACCELERATOR: compute.accelerator_type} if compute.accelerator_type else {}
    for key, labels in (
        ("accelerator_type", gpu),
        ("worker_labels", compute.worker_labels),
        ("evaluator_labels", compute.evaluator_labels),
    ):
        try:
            ray.remote(check_labels).options(label_selector=labels)  # this call checks them
        except ValueError as error:
            raise UserError(f"compute.{key} = {getattr(compute, key)!r}: {error}") from None
    if gpu and compute.device == "cpu":
        raise UserError('compute.accelerator_type is of GPUs, but compute.device = "cpu"')


def _accelerator(compute: ComputeConfig, gpu: bool) -> Labels:
    return {ACCELERATOR: compute.accelerator_type} if gpu and compute.accelerator_type else {}
