"""How busy a search keeps its evaluators, and what each evaluation costs the driver.

    python benchmarks/pool.py [--json FILE] [--evaluators 10 100 1000]
        [--steady-only] [--sigma 0.8]

Evaluators are simulated, a hundred in one asynchronous actor: an evaluation is a sleep. Its
time is heavy-tailed (log-normal; --sigma 0.8: one in a hundred takes six times the median)
because of the machine, not of the architecture: another try draws anew. 2 % are lost half-way.
Busy: the share of evaluators' time that is spent in evaluations, from when all are up until
the last candidate is submitted. Driver: CPU time of the process that generates offspring,
records to a folder on disk, and talks to Ray. What a process does once is done before: pyarrow
imports pandas for the first record, which is nothing in a search of hours but much of these
seconds.
"""

import argparse
import asyncio
import random
import tempfile
import time

import numpy as np
import pandas  # noqa: F401  see above
import ray
from table import Row, show

from nasray.algorithms import make_algorithm, make_schedule
from nasray.config import SearchConfig
from nasray.evaluation.pool import Pool
from nasray.search.candidate import Evaluation
from nasray.search.driver import run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.shufflenet import ShuffleNet

PER_ACTOR = 100
LOST = 0.02
ROUNDS = 24  # evaluations for each evaluator
GENERATIONS = 3
# Candidates under way for each evaluator, so that a slow one holds nobody up until it is
# overtaken: past 1.5 times what 19 of 20 take, some 6 medians at sigma 0.8.
LAG = 12
SECONDS = {10: 1.0, 100: 2.0, 1000: 5.0}  # mean of an evaluation: shorter where there are few


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--evaluators", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument(
        "--steady-only", action="store_true", help="leave out the generations, minutes of waiting"
    )
    parser.add_argument("--sigma", type=float, default=0.8)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=4, log_to_driver=False, include_dashboard=False)
    space = ShuffleNet()
    limits = Limits(space, ())
    rows = []
    for number in options.evaluators:
        steady = measure(limits, number, options.sigma, algorithm="steady")
        rows += [
            Row(
                f"{number} evaluators: busy, steady, lag {LAG * number}",
                *(steady[0], "share", ">= 0.97"),
            ),
            Row(f"{number} evaluators: driver, steady", steady[1], "ms"),
            Row(f"{number} evaluators: lost and done again", steady[2], "times"),
        ]
        if not options.steady_only:
            waves = measure(limits, number, options.sigma, algorithm="genetic")
            rows += [
                Row(f"{number} evaluators: busy, generations of {2 * number}", waves[0], "share"),
                Row(f"{number} evaluators: driver, generations", waves[1], "ms"),
            ]
    ray.shutdown()
    show(rows, options.json)


def measure(limits, number, sigma, *, algorithm):
    """One search: (busy share, driver's ms per evaluation, evaluations lost)."""
    mean = SECONDS.get(number, 5.0)
    actors = [Simulated.remote(mean, sigma, each) for each in range(-(-number // PER_ACTOR))]
    started = iter(range(10**9))
    config = SearchConfig(
        algorithm=algorithm,
        population_size=2 * number,
        num_parents=min(50, number),
        num_generations=ROUNDS // 2 if algorithm == "steady" else GENERATIONS,
        lag=LAG * number,
    )
    pool = Pool(
        lambda left_out: actors[next(started) % len(actors)],
        number=number,
        max_failures=5,
        end=lambda actor: None,
    )
    submitted = []
    submit = pool.submit

    def noting(position, arch, rule):
        submitted.append(time.time())
        submit(position, arch)

    pool.submit = noting
    with tempfile.TemporaryDirectory() as folder, pool:
        begun, cpu = time.time(), time.process_time()
        found = run_search(
            make_algorithm(limits.space, config, limits, 0),
            make_schedule(config),
            limits,
            pool,
            History(folder),
        )
        cpu = time.process_time() - cpu
    spans = counted([span for actor in actors for span in ray.get(actor.spans.remote())])
    for actor in actors:
        ray.kill(actor)
    # All are up once as many evaluations have begun; the last candidate ends the window.
    start = np.sort(spans[:, 0])[number - 1]
    end = max(submitted)
    inside = np.clip(spans, start, end)
    busy = float((inside[:, 1] - inside[:, 0]).sum() / (number * (end - start)))
    lost = sum(candidate.attempt > 1 for candidate in found)
    print(
        f"{algorithm}, {number} evaluators: {len(found)} evaluations in {time.time() - begun:.0f} s"
    )
    return busy, 1000 * cpu / len(found), lost


def counted(spans):
    """Begin and end of the evaluations that led to a result, and of those that were lost.

    Of one that two evaluators tried, the first answer counts; the other's time is wasted.
    """
    first = {}
    for begun, ended, arch, lost in sorted(spans, key=lambda span: span[1]):
        first.setdefault((arch, begun if lost else None), (begun, ended))
    return np.array(list(first.values()))


@ray.remote(num_cpus=0, max_concurrency=4 * PER_ACTOR)
class Simulated:
    """Many evaluators at once that only wait."""

    def __init__(self, mean, sigma, seed):
        self.mean, self.sigma, self.done = mean, sigma, []
        self.chance = random.Random(seed)

    async def ready(self):
        pass

    async def node(self):
        return ray.get_runtime_context().get_node_id()

    async def evaluate(self, attempt, arch):
        seconds = self.mean * self.chance.lognormvariate(-(self.sigma**2) / 2, self.sigma)
        lost = self.chance.random() < LOST
        begun = time.time()
        await asyncio.sleep(seconds / 2 if lost else seconds)
        self.done.append((begun, time.time(), hash(arch), lost))
        if lost:
            raise RuntimeError("lost")
        return Evaluation(fitness=sum(arch) / 1000, seconds=seconds, attempt=attempt)

    async def spans(self):
        return self.done


if __name__ == "__main__":
    main()
