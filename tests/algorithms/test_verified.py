"""A predictor proposes, evaluations verify: no cluster, a made-up accuracy."""

from functools import partial

import numpy as np
import pytest

from nasray.algorithms.annealing import Annealing
from nasray.algorithms.random import RandomSearch
from nasray.algorithms.verified import MIN_FITTED, VerifiedSearch
from nasray.config import Limit, SearchConfig
from nasray.predictors.predictor import AccuracyPredictor
from nasray.search.candidate import FAILED, Candidate, Evaluation
from nasray.search.driver import Direct, run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.search.schedules import Schedule
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.population import as_population, random_population

SPACE = OfaMobileNetV3()
WORTH = np.random.default_rng(3).random(len(SPACE.genes))
CONFIG = SearchConfig(population_size=20, num_generations=3, num_parents=2, proposals=20_000)


# 2,000 steps fit better; the promises below do not depend on it.
FIT = partial(AccuracyPredictor.fit, SPACE, steps=150)


def verified(*arguments, **options):
    return VerifiedSearch(SPACE, *arguments, inner_search=Annealing, fit=FIT, **options)


class Predicts:
    """A predictor of what `fitness` says."""

    def __init__(self, fitness):
        self.fitness = fitness

    def begin(self, population):
        return lambda: self.fitness(population).astype(np.float32)


def accuracy(arch):
    return float(0.7 + 0.003 * (np.array(arch) @ WORTH) + 0.002 * np.sin(sum(arch)))


def evaluate(arch):
    return Evaluation(fitness=accuracy(arch), seconds=0.1)


@pytest.fixture(scope="module")
def limits():
    macs = Limits(SPACE, ()).costs_of(random_population(SPACE.genes, 500, np.random.default_rng(0)))
    maxima = np.quantile(macs["macs"], [0.7, 0.3, 0.1])
    most = float(np.quantile(macs["params"], 0.8))
    given = [Limit(cost="macs", max=float(top)) for top in maxima]
    return Limits(SPACE, [*given, Limit(cost="params", max=most)])


def candidates(limits, number, seed=5):
    archs = Limits(SPACE, ()).draw(number, np.random.default_rng(seed), set())
    costs = limits.costs(archs)
    return [
        Candidate(arch=arch, fitness=accuracy(arch), costs=cost)
        for arch, cost in zip(archs, costs, strict=True)
    ]


def search(folder, limits, algorithm, generations=3, evaluate=evaluate):
    schedule = Schedule(asks=generations, repeat_asks=isinstance(algorithm, RandomSearch))
    return run_search(algorithm, schedule, limits, Direct(evaluate), History(str(folder)))


def best_at(found, top):
    return max(c.fitness for c in found if c.costs["macs"] <= top)


def test_it_finds_better_ones_than_as_many_random_evaluations(tmp_path, limits):
    found = search(tmp_path / "a", limits, verified(CONFIG, limits, 0))
    wide = Limits(SPACE, (limits.limits[0], limits.limits[3]))
    random = search(tmp_path / "b", wide, RandomSearch(SPACE, CONFIG, wide, 0))
    assert len(found) == len(random) == 60
    for limit in limits.limits[:3]:
        assert best_at(found, limit.max) > best_at(random, limit.max)


def test_every_candidate_is_new_and_within_the_loosest_rung_and_the_other_limits(tmp_path, limits):
    found = search(tmp_path, limits, verified(CONFIG, limits, 0))
    assert len({candidate.arch for candidate in found}) == len(found)
    assert all(c.costs["macs"] <= limits.limits[0].max for c in found)
    assert all(c.costs["params"] <= limits.limits[3].max for c in found)
    tightest = limits.limits[2].max
    # Proposals serve the tightest limit, too.
    assert any(c.costs["macs"] <= tightest for c in found if c.generation == 2)


def test_the_first_generation_is_random_until_there_is_something_to_fit_to(limits):
    few, enough = candidates(limits, MIN_FITTED - 1), candidates(limits, 60)
    random = verified(CONFIG, limits, 0).ask()
    assert verified(CONFIG, limits, 0, known=few).ask() == random
    proposed = verified(CONFIG, limits, 0, known=enough).ask()
    assert proposed != random
    mean = {
        name: np.mean([accuracy(a) for a in archs])
        for name, archs in (("random", random), ("proposed", proposed))
    }
    assert mean["proposed"] > mean["random"]


def test_a_given_predictor_proposes_the_first_generation(limits):
    prefers_small = Predicts(lambda population: -limits.costs_of(population)["params"])
    asked = verified(CONFIG, limits, 0, predictor=prefers_small).ask()
    random = verified(CONFIG, limits, 0).ask()
    params = [limits.costs_of(as_population(archs))["params"].mean() for archs in (asked, random)]
    assert params[0] < 0.8 * params[1]


def test_a_stopped_search_goes_on_as_if_nothing_had_happened(tmp_path, limits):
    whole = search(tmp_path / "a", limits, verified(CONFIG, limits, 0))
    search(tmp_path / "b", limits, verified(CONFIG, limits, 0), generations=2)
    resumed = search(tmp_path / "b", limits, verified(CONFIG, limits, 0))
    assert [(c.arch, c.fitness) for c in resumed] == [(c.arch, c.fitness) for c in whole]
    assert verified(CONFIG, limits, 1).ask() != [c.arch for c in whole[:20]]


def test_what_cannot_be_evaluated_is_not_proposed_again(tmp_path, limits):
    def moody(arch):
        if sum(arch) % 3 == 0:
            return Evaluation(fitness=FAILED, error="it would not")
        return evaluate(arch)

    found = search(tmp_path, limits, verified(CONFIG, limits, 0), evaluate=moody)
    assert len({candidate.arch for candidate in found}) == len(found) == 60
    assert any(candidate.failed for candidate in found)


def test_the_best_that_the_predictor_found_is_proposed_even_if_no_chain_is_there_now(
    limits, monkeypatch
):
    monkeypatch.setattr(
        "nasray.algorithms.annealing.Annealing.members", lambda self, limit: as_population([])
    )
    macs = limits.limits[0].max
    prefers_large = Predicts(lambda population: limits.costs_of(population)["macs"])
    asked = verified(CONFIG, limits, 0, predictor=prefers_large).ask()
    assert max(cost["macs"] for cost in limits.costs(asked[:3])) > 0.97 * macs
