"""Measure latencies on a node of a cluster that has the device: one Ray task, on its own.

Blocks are measured one after the other on one device; a second task would disturb the first.
"""

import logging
from collections.abc import Sequence
from typing import Any

import ray

from nasray.cluster.worker import raise_user_error
from nasray.costs.latency_files import read_lines
from nasray.costs.latency_measure import measure, wanted_blocks
from nasray.costs.latency_timing import Setup
from nasray.progress import following
from nasray.spaces.space import Space
from nasray.storage import files as storage

logger = logging.getLogger(__name__)


def measure_on_cluster(
    space: Space,
    table: str,
    *,
    setup: dict[str, Any],
    resolutions: Sequence[int] | None,
    labels: dict[str, str],
) -> None:
    """measure() `space` into `table` on a node with these `labels`, e.g. of an accelerator.

    `setup` holds the fields of a Setup, which only the node can check. `table` must be a
    path or URI that the node sees.

    Raises:
        UserError: what measure() or Setup refuses on the node.
    """
    on_gpu = setup["device"] == "cuda"
    task = _measure.options(
        num_cpus=setup["threads"], num_gpus=1 if on_gpu else 0, label_selector=labels
    )
    path = storage.absolute(table)

    def look() -> tuple[int, str]:
        done = len(read_lines(path)) if storage.exists(path) else 0
        return min(done, total), "blocks begun"

    if labels and not any(labels.items() <= node["Labels"].items() for node in ray.nodes()):
        logger.warning("no node has the labels %s yet; waiting for one that joins", labels)
    total = len(wanted_blocks(space, resolutions))
    with following("latency", total, look):
        try:
            ray.get(task.remote(space, path, setup, resolutions))
        except ray.exceptions.RayTaskError as error:
            raise_user_error(error)
            raise


# A process for this alone: threads that it has tied to cores stay so.
@ray.remote(max_retries=3, max_calls=1)
def _measure(
    space: Space, path: str, setup: dict[str, Any], resolutions: Sequence[int] | None
) -> None:
    """Measure what the table lacks. After a lost node Ray runs this again elsewhere."""
    measure(space, path, setup=Setup(**setup), resolutions=resolutions)
