"""How good a search's best is after so many evaluations: ours and Optuna's, on true accuracies.

    python benchmarks/search_quality.py --truth FILE [--json FILE] [--plot FILE.html]
        [--seeds 50] [--evaluations 500]

FILE is NAS-Bench-Macro's table of all networks (CSV: arch, mean_acc, params, macs). Regret:
points of CIFAR-10 top-1 between the best network of the space and the best that a search
has evaluated by then, mean over the seeds with its 95 % interval. Optuna's samplers may ask
for a network again; that costs them nothing. Needs `pip install optuna`.
"""

import argparse
import multiprocessing
import os
import time
import warnings

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # before numpy; each process has one core

from collections import deque
from functools import partial

import numpy as np
import optuna
import torch
from macro_table import POOLING_AND_BIAS, read_truth
from table import Row, show

from nasray.algorithms import ALGORITHMS, make_algorithm, make_schedule
from nasray.algorithms.annealing import Annealing
from nasray.algorithms.verified import VerifiedSearch
from nasray.config import SearchConfig
from nasray.predictors.predictor import AccuracyPredictor
from nasray.search.candidate import Candidate
from nasray.search.limits import Limits
from nasray.spaces.nasbench_macro import NasBenchMacro
from nasray.spaces.population import as_population

TRUTH = "nas-bench-macro_unique3969.csv"
BUDGETS = (50, 100, 200, 500)
# Settings of the searches in which a generation counts: small ones learn sooner.
CONFIG = {"population_size": 20, "num_parents": 10, "num_generations": 1000, "lag": 4}
LEFT_OUT = ("vanilla", "top-down", "bottom-up")  # without limits they are one and the same


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", default="../shared/data/nasbench_macro/" + TRUTH)
    parser.add_argument("--json")
    parser.add_argument("--plot")
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--only", nargs="*", help="names of some searches")
    options = parser.parse_args()

    names = [f"nasray {name}" for name in ALGORITHMS if name not in LEFT_OUT]
    names += ["nasray evaluations", "optuna TPE", "optuna NSGA-II"]
    # Fits a predictor for every generation, some minutes for each search: if asked for.
    names = [name for name in [*names, "nasray verify"] if name in (options.only or names)]
    work = [
        (name, seed, options.evaluations, options.truth)
        for name in names
        for seed in range(options.seeds)
    ]
    curves = {name: [] for name in names}
    seconds = dict.fromkeys(names, 0.0)
    with multiprocessing.get_context("spawn").Pool() as pool:
        for name, curve, took in pool.imap(search, work):
            curves[name].append(curve)
            seconds[name] += took / options.seeds
            if len(curves[name]) == options.seeds:
                print(line(name, np.array(curves[name]), seconds[name]), flush=True)
    curves = {name: np.array(found) for name, found in curves.items()}
    if options.plot:
        plot(curves, options.plot)
    show(list(rows(curves, options.evaluations)), options.json)


def search(work):
    """One search: its regret after each evaluation, and the seconds it took without them."""
    name, seed, number, path = work
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    truth = read_truth(path)
    space = NasBenchMacro()
    check(space, truth)
    family, kind = name.split(" ")
    run = run_optuna if family == "optuna" else run_nasray
    started = time.perf_counter()
    found = run(kind, space, truth, seed, number)
    took = time.perf_counter() - started
    best = max(top1 for top1, *_ in truth.values())
    return name, 100 * (best - np.maximum.accumulate(found)), took


def check(space, truth):
    """The space is the published one: canonical forms, parameters and MACs agree."""
    archs = list(truth)
    assert (space.canonical(as_population(archs)) == as_population(archs)).all()
    sample = archs[:: len(archs) // 20]
    for arch, cost in zip(sample, Limits(space, ()).costs(sample), strict=True):
        assert (cost["params"], cost["macs"] - POOLING_AND_BIAS) == truth[arch][1:], arch


def run_nasray(kind, space, truth, seed, number):
    """The true top-1 of what is evaluated, in order."""
    limits = Limits(space, ())
    if kind == "verify":
        config = SearchConfig(**CONFIG, verify=True, proposals=5000)
        fit = partial(AccuracyPredictor.fit, space)
        algorithm = VerifiedSearch(space, config, limits, seed, inner_search=Annealing, fit=fit)
    elif kind == "evaluations":  # what a job gets that says no more than that
        config = SearchConfig(evaluations=number)
        algorithm = make_algorithm(space, config, limits, seed)
    else:
        # Annealing has to know when the search ends.
        generations = number // CONFIG["population_size"] if kind == "front" else 1000
        config = SearchConfig(**CONFIG | {"num_generations": generations}, algorithm=kind)
        algorithm = make_algorithm(space, config, limits, seed)
    found, pending = [], deque()
    while len(found) < number:
        while len(pending) < make_schedule(config).lag and (archs := algorithm.ask()):
            pending.append(archs)
        if not pending:  # every network is evaluated
            break
        archs = pending.popleft()
        found += [truth[arch][0] for arch in archs]
        algorithm.tell(
            [
                Candidate(arch=arch, fitness=truth[arch][0], costs=cost)
                for arch, cost in zip(archs, limits.costs(archs), strict=True)
            ]
        )
    return found[:number]


def run_optuna(kind, space, truth, seed, number):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    samplers = {"TPE": optuna.samplers.TPESampler, "NSGA-II": optuna.samplers.NSGAIISampler}
    study = optuna.create_study(direction="maximize", sampler=samplers[kind](seed=seed))
    known = {}
    for _ in range(4 * number):
        trial = study.ask()
        genes = [trial.suggest_categorical(gene.name, range(3)) for gene in space.genes]
        arch = tuple(space.canonical(as_population([genes]))[0].tolist())
        known.setdefault(arch, truth[arch][0])
        study.tell(trial, known[arch])
        if len(known) == number:
            break
    found = list(known.values())
    return found + [max(found)] * (number - len(found))


def rows(curves, number):
    budgets = [budget for budget in BUDGETS if budget <= number]
    for name, found in curves.items():
        for budget in budgets:
            mean = float(found[:, budget - 1].mean())
            yield Row(f"{name}: mean regret after {budget}", mean, "points")
    ours = [name for name in curves if name.startswith("nasray")]
    theirs = [name for name in curves if name.startswith("optuna")]
    if not ours or not theirs:
        return
    best = min(ours, key=lambda name: sum(curves[name][:, b - 1].mean() for b in budgets))
    for budget in budgets:
        least = min(curves[name][:, budget - 1].mean() for name in theirs)
        behind = curves[best][:, budget - 1].mean() - least
        yield Row(f"{best} - best of Optuna after {budget}", float(behind), "points", "<= 0")


def line(name, found, seconds):
    """One line of the table: mean regret and half the 95 % interval after each budget."""
    cells = ""
    for budget in BUDGETS:
        if budget <= found.shape[1]:
            values = found[:, budget - 1]
            cells += f"{values.mean():10.3f} ± {1.96 * values.std() / len(values) ** 0.5:.3f}"
    return f"{name:<18}{cells}   {seconds:6.1f} s a search"


def plot(curves, path):
    import plotly.graph_objects as go

    figure = go.Figure(
        [
            go.Scatter(x=np.arange(1, found.shape[1] + 1), y=found.mean(axis=0), name=name)
            for name, found in curves.items()
        ]
    )
    figure.update_layout(
        xaxis_title="evaluations", yaxis_title="mean regret, points of top-1", yaxis_type="log"
    )
    figure.update_xaxes(type="log")
    figure.write_html(path)


if __name__ == "__main__":
    main()
