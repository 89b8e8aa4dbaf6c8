"""A search of short evaluations on a cluster, as a process of its own that may be killed.

    python chaos_driver.py FOLDER ADDRESS ALGORITHM [RUN]

RUN/history, or FOLDER/history, is the search's; FOLDER/begun has a file for each evaluation that
began. FOLDER/full holds the ids of nodes whose disk is full. If there is a FOLDER/hang, the first
evaluation takes it away and hangs.
"""

import os
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import numpy as np
import ray

from nasray.algorithms import make_algorithm, make_schedule
from nasray.cluster.placement import avoiding, nodes_with_room
from nasray.config import SearchConfig
from nasray.evaluation.pool import Pool
from nasray.search.candidate import Evaluation
from nasray.search.driver import run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.shufflenet import ShuffleNet
from nasray.storage import locks

NUM_EVALUATIONS = 200
OPTIONS = {"num_cpus": 1, "label_selector": {}}
TARGET = np.tile((1, 6), 20)


def fitness(arch) -> float:
    return 1.0 - float(np.abs(np.array(arch) - TARGET).sum()) / 200


def search(folder: str, algorithm: str, pool) -> list:
    space = ShuffleNet()
    limits = Limits(space, ())
    config = SearchConfig(
        algorithm=algorithm,
        population_size=20,
        num_generations=NUM_EVALUATIONS // 20,
        num_parents=6,
        lag=8,
    )
    made = make_algorithm(space, config, limits, 0)
    return run_search(made, make_schedule(config), limits, pool, History(f"{folder}/history"))


def name_of(arch) -> str:
    return "".join(f"{gene:x}" for gene in arch)


@ray.remote
class Sleeper:
    """Takes a tenth of a second for each evaluation."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def ready(self) -> None:
        full = self.folder / "full"
        if full.exists() and self.node() in full.read_text():
            with open("/dev/full", "w", buffering=1) as file:
                file.write("what is cached\n")  # raises what a full disk does

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def evaluate(self, attempt: int, arch, rule) -> Evaluation:
        (self.folder / "begun" / f"{name_of(arch)}-{time.time_ns()}-{uuid.uuid4().hex[:6]}").touch()
        with suppress(FileNotFoundError):
            (self.folder / "hang").unlink()
            time.sleep(1e6)
        time.sleep(0.1)
        return Evaluation(fitness=fitness(arch), attempt=attempt)


def main() -> None:
    folder, address, algorithm, *run = sys.argv[1:]
    ray.init(address=address, log_to_driver=False)
    os.makedirs(f"{folder}/begun", exist_ok=True)
    place = run[0] if run else folder
    locks.RENEW_EVERY_S = 0.5
    with locks.held(place if run else f"{folder}/lock"):
        pool = Pool(
            lambda left_out: Sleeper.options(**avoiding(OPTIONS, left_out)).remote(folder),
            number=2 if run else 4,  # beside those of a driver that is stopped
            max_failures=10,
            limit_s=10.0,
            nodes=lambda: nodes_with_room(1),
        )
        with pool:
            found = search(place, algorithm, pool)
        print(f"{len(found)} evaluations, {pool.num_lost} evaluators lost")


if __name__ == "__main__":
    main()
