"""One search for ten latency limits, beside what the published notebook printed.

    python benchmarks/ofa_search.py --data DIR [--json FILE] [--seeds 5] [--first-seed 0]
        [--no-long]
    python benchmarks/ofa_search.py --data DIR --defaults [--seeds 3]

DIR holds the published note10/ latency tables and acc_predictor.pth of Once-for-All's
MobileNetV3 (width 1.2). Prints, for every limit, the accuracy that the published predictor
gives our answers after a short (1 s), a middle (10 s) and a long (100 s) search, the mean
of what the notebook printed, and the best known. With --defaults it runs `nasray front` instead,
for 1, 3 and 10 limits, with its default number of candidates and with the most, and prints the
CPU time of the whole command and the mean of the answers.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from table import Row, show

from nasray.algorithms.annealing import MOST, Annealing, default_budget
from nasray.costs.latency import LatencyTable
from nasray.predictors.predictor import AccuracyPredictor
from nasray.search.predicted import search_predicted
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.population import as_population

LIMITS = [15.0, 20.0, 25.0, 30.0, 35.0, 40.0, 45.0, 50.0, 55.0, 60.0]  # ms
# Predicted top-1 in per cent, from the notebook's outputs: the mean of all its top-down
# searches, and the best that any published search or a local search from there reached.
PRINTED = [78.37, 80.53, 81.62, 82.41, 83.24, 83.70, 84.10, 84.47, 84.77, 84.89]
BEST_KNOWN = [78.75, 80.72, 82.09, 82.97, 83.67, 84.06, 84.81, 84.96, 85.39, 85.25]
BUDGETS = {"1 s": 140_000, "10 s": 2_400_000, "100 s": 25_000_000}  # candidates
FEW = ([30.0], [20.0, 35.0, 50.0], LIMITS)  # of --defaults
PUBLISHED_RATE = 4_800  # candidates a second of the published program, on 2 cores like these


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/ofa")
    parser.add_argument("--json")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--no-long", action="store_true", help="leave out the 100 s search")
    parser.add_argument("--defaults", action="store_true", help="measure `nasray front` instead")
    options = parser.parse_args()
    if options.defaults:
        print_defaults(options)
        return
    space = OfaMobileNetV3()
    cost_of = LatencyTable.load(f"{options.data}/note10", space)
    predictor = AccuracyPredictor.load(f"{options.data}/acc_predictor.pth", space)

    found = {}
    for name, budget in BUDGETS.items():
        if name == "100 s":
            seeds = [] if options.no_long else [0]
        else:
            seeds = range(options.first_seed, options.first_seed + options.seeds)
        found[name] = [search(space, cost_of, predictor, budget, seed) for seed in seeds]
    print_table(found)
    rate = BUDGETS["10 s"] * len(found["10 s"]) / sum(seconds for _, seconds in found["10 s"])
    show(rows(found, rate, floor_rate(predictor)), options.json)


def print_defaults(options):
    print(
        "CPU seconds (user + sys) and predicted top-1 (%, mean of the limits; least of the seeds)"
    )
    for limits in FEW:
        for budget in dict.fromkeys((default_budget(len(limits)), MOST)):
            seeds = range(options.first_seed, options.first_seed + options.seeds)
            runs = [front(options.data, limits, budget, seed) for seed in seeds]
            top1 = [np.mean([answer["predicted_accuracy"] for answer in each]) for each, _ in runs]
            print(
                f"{len(limits):>3} limit(s) {budget:>10,} candidates "
                f"{np.mean([seconds for _, seconds in runs]):>8.1f} s "
                f"{100 * np.mean(top1):>8.2f} {100 * min(top1):>8.2f}",
                flush=True,
            )


def front(data, limits, budget, seed):
    """The answers of `nasray front`, and the CPU seconds that it takes from start to end."""
    command = [sys.executable, "-m", "nasray", "front", "ofa_mobilenetv3", f"--seed={seed}"]
    command += [f"--predictor={data}/acc_predictor.pth", f"--latency-table={data}/note10"]
    command += [f"--limit={limit}" for limit in limits]
    if budget != default_budget(len(limits)):
        command.append(f"--budget={budget}")
    before = cpu_seconds()
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return [json.loads(line) for line in found.stdout.splitlines()], cpu_seconds() - before


def cpu_seconds():
    """Of all processes that this one has started and that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def search(space, cost_of, predictor, budget, seed):
    """Answers in the order of LIMITS, checked against their own numbers, and seconds."""
    started = time.perf_counter()
    annealing = Annealing(space, cost_of, LIMITS, seed, budget=budget)
    steps = search_predicted(annealing, cost_of, predictor.begin, lag=2)
    while annealing.told < budget:
        next(steps)
    seconds = time.perf_counter() - started
    answers = annealing.answers()
    for answer in answers:
        population = as_population([answer.arch])
        assert cost_of(population)[0] == answer.cost <= answer.limit
        assert abs(predictor.exact(population)[0] - answer.fitness) < 1e-6
    return answers, seconds


def print_table(found):
    print("predicted top-1, %, mean over seeds (latency of seed 0, ms)")
    heads = [name for name in found if found[name]]
    print(f"{'limit':>8}{'printed':>10}{'best known':>12}" + "".join(f"{h:>18}" for h in heads))
    for index, limit in enumerate(LIMITS):
        line = f"{limit:>5.0f} ms{PRINTED[index]:>10.2f}{BEST_KNOWN[index]:>12.2f}"
        for name in heads:
            cost = found[name][0][0][index].cost
            line += f"{means(found[name])[index]:>9.2f} ({cost:6.2f})"
        print(line)


def rows(found, rate, floor):
    short, middle = means(found["1 s"]), means(found["10 s"])
    # The known figures have two decimals, and so have ours where they are compared.
    table = [
        Row("1 s: least above the printed mean", least(short, PRINTED), "points", ">= 0"),
        Row("10 s: least above the best known", least(middle, BEST_KNOWN), "points", ">= 0"),
    ]
    if found["100 s"]:
        long = means(found["100 s"])
        above = float((long - middle).max())
        table.append(Row("100 s: most above the 10 s", above, "points", "<= 0.05"))
    for name in ("1 s", "10 s"):
        seconds = max(seconds for _, seconds in found[name])
        bound = name.split()[0]
        table.append(Row(f"{name}: wall time, slowest seed", seconds, "s", f"<= {bound}"))
    threads = torch.get_num_threads()
    return [
        *table,
        Row("candidates bred, priced and predicted", rate, "a second", ">= 130000"),
        Row("the same / the published program's", rate / PUBLISHED_RATE, "ratio", ">= 20"),
        Row(f"predictor's matrix products alone, {threads} threads", floor, "a second"),
        Row("search / matrix products alone", rate / floor, "ratio", ">= 0.6"),
    ]


def means(searches):
    """Mean top-1 over the seeds for each limit, per cent."""
    return np.array([[100 * a.fitness for a in answers] for answers, _ in searches]).mean(axis=0)


def least(ours, known):
    return float((np.round(ours, 2) - known).min().round(2))


def floor_rate(predictor, rows=512, repeats=400):
    """Candidates a second if nothing but the layers' products had to be computed.

    By the quickest product this machine has: the median over many, of the two libraries.
    """
    sizes = [tuple(weight.shape) for weight, _ in predictor.layers]
    operations = sum(2 * n * m for n, m in sizes)
    hidden, weight, bias = torch.rand(rows, 400), torch.rand(400, 400), torch.rand(400)
    products = [lambda: hidden @ weight]
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        products.append(
            lambda: torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "relu", [], "")
        )
    quickest = 0.0
    with torch.inference_mode():
        for product in products:
            seconds = []
            for _ in range(repeats):
                started = time.perf_counter()
                product()
                seconds.append(time.perf_counter() - started)
            quickest = max(quickest, 2 * rows * 400 * 400 / np.median(seconds))
    return float(quickest / operations)


if __name__ == "__main__":
    main()
