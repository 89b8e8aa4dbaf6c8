"""Searches on made-up fitnesses, for the tests of algorithms and of the loop around them."""

import random

import numpy as np

from nasray.algorithms import make_algorithm, make_schedule
from nasray.algorithms.annealing import Annealing
from nasray.algorithms.verified import VerifiedSearch
from nasray.config import SearchConfig
from nasray.search.candidate import Evaluation
from nasray.search.driver import Direct, run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.shufflenet import ShuffleNet

SPACE = ShuffleNet()


def closeness(arch):
    """Highest at one architecture in the middle of the space."""
    target = np.tile((1, 6), 20)
    return 1.0 - float(np.abs(np.array(arch) - target).sum()) / 200


def evaluate(arch):
    return Evaluation(fitness=closeness(arch), seconds=1.0)


def limited(unlimited, *limits):
    """Limits over the space whose costs are compiled already."""
    found = Limits.__new__(Limits)
    found.space, found.limits = SPACE, limits
    found.table, found.latency = unlimited.table, None
    return found


def config(algorithm="genetic", **changes):
    """Settings of a search of seconds; "verify" is an algorithm here like any other."""
    if algorithm == "verify":
        changes |= {"verify": True, "proposals": 1000}
    else:
        changes["algorithm"] = algorithm
    return SearchConfig(
        **({"population_size": 20, "num_generations": 6, "num_parents": 6} | changes)
    )


def fit(population, top1, *, seed):
    """Least squares on the genes, as a predictor."""
    genes = np.column_stack((population, np.ones(len(population)))).astype(np.float64)
    weights = np.linalg.lstsq(genes, np.array(top1), rcond=None)[0].round(6)
    return Linear(weights)


class Linear:
    def __init__(self, weights):
        self.weights = weights

    def begin(self, population):
        return lambda: population @ self.weights[:-1] + self.weights[-1]


def make(limits, settings, seed):
    """An algorithm of the table; with verify = true the search that a predictor proposes for."""
    if settings.verify:
        return VerifiedSearch(limits.space, settings, limits, seed, inner_search=Annealing, fit=fit)
    return make_algorithm(limits.space, settings, limits, seed)


def search(folder, limits, seed=0, evaluate=evaluate, pool=None, early_stopping=None, **changes):
    """One search to its end, of any algorithm: all candidates."""
    settings = config(**changes)
    return run_search(
        make(limits, settings, seed),
        make_schedule(settings),
        limits,
        pool or Direct(evaluate),
        History(str(folder)),
        early_stopping=early_stopping,
    )


def archs_of(candidates):
    return [candidate.arch for candidate in candidates]


class AnyOrder(Direct):
    """Ends evaluations in an order of its own, of at most `number` under way at once."""

    def __init__(self, evaluate, number, seed):
        super().__init__(evaluate)
        self.number, self.rng = number, random.Random(seed)

    def next(self):
        index = self.rng.randrange(min(self.number, len(self.waiting)))
        position, arch = self.waiting[index]
        del self.waiting[index]
        return position, self.evaluate(arch)
