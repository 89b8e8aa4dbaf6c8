"""The search that serves all limits at once: no network, no cluster."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest

from nasray.algorithms import annealing as module
from nasray.algorithms.annealing import Annealing, default_budget
from nasray.algorithms.many_limits import annealing_search
from nasray.config import Limit, SearchConfig
from nasray.costs.latency import LatencyTable
from nasray.errors import InfeasibleError
from nasray.predictors.predictor import AccuracyPredictor
from nasray.search.candidate import Candidate
from nasray.search.evaluated import Evaluated
from nasray.search.limits import FeasibleSampler, Limits
from nasray.search.predicted import search_predicted
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.population import as_architectures, as_population, random_population
from nasray.spaces.space import Gene
from nasray.spaces.tiny import Tiny

OFA = Path(__file__).parents[3] / "shared" / "data" / "ofa"
SPACE = OfaMobileNetV3()


@dataclass(frozen=True)
class Small:
    """A made-up space of 59,049 rows, in which gene 0 switches off genes 8 and 9."""

    name: str = "small"
    genes: tuple[Gene, ...] = tuple(Gene(f"gene{index}", "gene", (1, 2, 3)) for index in range(10))

    def canonical(self, population):
        population = population.copy()
        population[population[:, 0] == 0, 8:] = 0
        return population


class Plain(Small):
    def canonical(self, population):
        return population


SMALL = Small()


def prices(space, seed=0):
    """Costs that grow with every choice that has an effect."""
    weights = 0.5 + np.random.default_rng(seed).random(len(space.genes))
    return lambda population: 10 + (space.canonical(population) * weights).sum(axis=1)


def worths(space, seed=0):
    """Fitnesses with effects of genes and of pairs: many local optima."""
    rng = np.random.default_rng((seed, 1))
    single = rng.random(len(space.genes))
    pairs = rng.normal(size=(len(space.genes), len(space.genes))) / 4

    def fitness(population):
        rows = space.canonical(population).astype(np.float64)
        return 0.5 + (rows @ single + np.einsum("ni,ij,nj->n", rows, pairs, rows)) / 1000

    return fitness


def run(search, price, fitness, generations):
    for _ in range(generations):
        population = search.ask()
        search.tell(Evaluated(population, price(population), fitness(population)))
    return search.answers()


def everything(space):
    sizes = [range(len(gene.choices)) for gene in space.genes]
    return np.array(list(product(*sizes)), dtype=np.int8)


@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_best_of_all_architectures_at_every_limit(seed):
    price, fitness = prices(SMALL, seed), worths(SMALL, seed)
    limits = [12.0, 14.0, 16.0, 18.0, 20.0]
    found = run(Annealing(SMALL, price, limits, seed, size=400, budget=20_000), price, fitness, 40)
    all_of_them = everything(SMALL)
    costs, fitnesses = price(all_of_them), fitness(all_of_them)
    for answer in found:
        assert answer.fitness == pytest.approx(fitnesses[costs <= answer.limit].max(), abs=1e-12)


def test_the_budget_grows_with_the_number_of_limits_to_that_of_ten():
    budgets = [default_budget(number) for number in (1, 2, 9, 10, 40)]
    assert budgets == [50_000, 270_000, 1_810_000, 2_000_000, 2_000_000]


def test_every_answer_has_its_own_numbers_and_is_within_its_limit():
    price, fitness = prices(SPACE), worths(SPACE)
    limits = [60.0, 50.0, 40.0, 30.0, 20.0, 15.0]
    found = run(Annealing(SPACE, price, limits, 0, size=400, budget=20_000), price, fitness, 10)
    assert [answer.limit for answer in found] == limits
    for answer in found:
        population = as_population([answer.arch])
        assert price(population)[0] == answer.cost <= answer.limit
        assert fitness(population)[0] == pytest.approx(answer.fitness, abs=1e-12)
        np.testing.assert_array_equal(SPACE.canonical(population), population)


@pytest.mark.skipif(not OFA.exists(), reason=f"the published tables are not at {OFA}")
def test_two_limits_far_apart_return_and_beat_the_published_search():
    """The published top-down search never came back from these (docs/spec.md, OFA 2.6, D2)."""
    price = LatencyTable.load(str(OFA / "note10"), SPACE)
    predictor = AccuracyPredictor.load(str(OFA / "acc_predictor.pth"), SPACE)
    found = run(
        Annealing(SPACE, price, [60.0, 15.0], 0, size=1000, budget=20_000), price, predictor, 40
    )
    assert [answer.limit for answer in found] == [60.0, 15.0]
    for answer in found:
        population = as_population([answer.arch])
        assert price(population)[0] == answer.cost <= answer.limit
        assert predictor.exact(population)[0] == pytest.approx(answer.fitness, abs=1e-6)
    assert found[0].fitness > 0.845 and found[1].fitness > 0.783


def test_limits_in_any_order_and_twice_are_answered_as_asked():
    price, fitness = prices(SPACE), worths(SPACE)
    found = run(
        Annealing(SPACE, price, [20, 40, 30, 20], 0, size=200, budget=20_000), price, fitness, 5
    )
    assert [answer.limit for answer in found] == [20, 40, 30, 20]
    assert found[0] == found[3]
    ordered = run(
        Annealing(SPACE, price, [20, 30, 40], 0, size=200, budget=20_000), price, fitness, 5
    )
    assert ordered == [found[0], found[2], found[1]]


def test_a_looser_limit_is_never_answered_worse():
    price, fitness = prices(SPACE), worths(SPACE)
    found = run(
        Annealing(SPACE, price, [20, 30, 40, 50], 0, size=200, budget=20_000), price, fitness, 5
    )
    values = [answer.fitness for answer in found]
    assert values == sorted(values)


def test_a_limit_below_the_smallest_network_names_the_smallest():
    price = prices(SPACE)
    with pytest.raises(InfeasibleError, match=r"a limit of 9.5 is below .* 10.0; raise it"):
        Annealing(SPACE, price, [30, 9.5], 0, budget=1000)
    with pytest.raises(InfeasibleError, match="one limit or more"):
        Annealing(SPACE, price, [], 0, budget=1000)
    found = run(Annealing(SPACE, price, [10.0], 0, size=50, budget=20_000), price, worths(SPACE), 2)
    assert found[0].arch == (0,) * 46


def test_the_smallest_network_need_not_be_all_first_choices():
    weights = np.tile((-1.0, 2.0), 5)
    within = FeasibleSampler(Plain(), lambda population: population.astype(np.float64) @ weights)
    assert within.smallest == (2, 0) * 5
    assert within.smallest_cost == -10


def test_random_starts_are_within_tight_limits_and_differ_under_loose_ones():
    price = prices(SPACE)
    ceilings = np.repeat([10.5, 30.0], 200)
    drawn = FeasibleSampler(SPACE, price).draw(ceilings, np.random.default_rng(0))
    assert (price(drawn) <= ceilings).all()
    assert len(np.unique(drawn[200:], axis=0)) > 150
    assert price(drawn[200:]).std() > 2


def test_how_long_a_prediction_takes_changes_nothing():
    price, fitness = prices(SPACE), worths(SPACE)
    answers = []
    for seconds in ([0.0], [0.02, 0.0], [0.0, 0.02, 0.01]):
        waits = cycle(seconds)

        def slow(population, waits=waits):
            time.sleep(next(waits))
            return fitness(population)

        search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=20_000)
        with ThreadPoolExecutor(2) as threads:
            steps = search_predicted(
                search, price, lambda population: threads.submit(slow, population).result, lag=2
            )
            for _ in range(30):
                next(steps)
        answers.append(search.answers())
    assert answers[0] == answers[1] == answers[2]


def test_the_next_generation_is_made_while_one_is_predicted():
    price, fitness = prices(SPACE), worths(SPACE)
    search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=20_000)
    happened = []

    def begin(population):
        happened.append("begun")
        return lambda: happened.append("waited for") or fitness(population)

    next(search_predicted(search, price, begin, lag=2))
    assert happened == ["begun", "begun", "waited for"]
    assert search.told == 200


def test_children_are_made_anew_until_they_are_within_their_limit(monkeypatch):
    price, fitness = prices(SPACE), worths(SPACE)

    def over(tries):
        monkeypatch.setattr(module, "MAX_TRIES", tries)
        search = Annealing(SPACE, price, [20, 40], 0, size=400, budget=20_000)
        run(search, price, fitness, 20)
        children = search.ask()
        return (price(children) > search.slot_limits[search.pending[-1][1]]).mean()

    assert over(1) > 0.5 and over(3) < 0.4 and over(30) < 0.1


def test_an_answer_does_not_change_after_it_was_given():
    price, fitness = prices(SPACE), worths(SPACE)
    search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=20_000)
    before = run(search, price, fitness, 2)
    slots = search.slots
    copy = slots.population.copy()
    numbers = [(answer.arch, answer.cost, answer.fitness) for answer in before]
    after = run(search, price, fitness, 20)
    assert after != before
    assert [(answer.arch, answer.cost, answer.fitness) for answer in before] == numbers
    np.testing.assert_array_equal(slots.population, copy)


def test_slots_hold_what_is_within_their_limit_with_its_own_numbers():
    price, fitness = prices(SPACE), worths(SPACE)
    search = Annealing(SPACE, price, [20, 30, 40], 0, size=240, budget=2400)
    for _ in range(10):
        run(search, price, fitness, 1)
        assert (search.slots.costs <= search.slot_limits).all()
        np.testing.assert_array_equal(price(search.slots.population), search.slots.costs)
        own = fitness(search.slots.population)
        np.testing.assert_allclose(own, search.slots.fitness, rtol=1e-12)


def test_chains_take_worse_children_at_first_and_hardly_any_at_last(monkeypatch):
    """The share of generations' slots that got worse, hot and cold; without heat none does."""
    price, fitness = prices(SPACE), worths(SPACE)

    def worse(heat, cold):
        monkeypatch.setattr(module, "HOT", heat)
        monkeypatch.setattr(module, "COLD", cold)
        search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=20_000)
        shares = []
        steps = search_predicted(search, price, lambda p: lambda: fitness(p), lag=2)
        while search.told < search.budget:
            before = search.slots.fitness
            next(steps)
            shares.append(float((search.slots.fitness < before).mean()))
        return np.mean(shares[:30]), np.mean(shares[-30:])

    hot, cold = worse(0.5, 0.005)
    assert hot > 0.05 and hot > 10 * cold
    assert worse(1e-12, 1e-12) == (0, 0)


def test_annealing_finds_more_than_climbing_where_there_are_many_optima(monkeypatch):
    price, fitness = prices(SPACE), worths(SPACE)

    def found():
        searches = [Annealing(SPACE, price, [25, 35], s, size=400, budget=40_000) for s in range(4)]
        return np.mean([a.fitness for s in searches for a in run(s, price, fitness, 100)])

    annealed = found()
    monkeypatch.setattr(module, "HOT", 1e-9)
    monkeypatch.setattr(module, "COLD", 1e-9)
    assert annealed > found()


def test_what_has_no_fitness_is_never_kept():
    price, fitness = prices(SPACE), worths(SPACE)

    def allowed(population):
        return np.where(population[:, 45] == 1, fitness(population), -np.inf)

    search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=4000)
    found = run(search, price, allowed, 20)
    assert all(answer.arch[45] == 1 for answer in found) and len(found) == 2


def test_members_of_a_limit_are_different_and_best_first():
    price, fitness = prices(SPACE), worths(SPACE)
    search = Annealing(SPACE, price, [20, 40], 0, size=400, budget=4000)
    run(search, price, fitness, 10)
    for limit in (20, 40):
        members = search.members(limit)
        values = fitness(members)
        assert len(np.unique(members, axis=0)) == len(members) > 3
        assert (np.diff(values) <= 0).all() and (price(members) <= limit).all()


def test_any_part_of_a_generation_may_be_told_in_any_order():
    price, fitness = prices(SPACE), worths(SPACE)
    search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=20_000)
    run(search, price, fitness, 3)
    population = search.ask()
    slot_of = {
        child.tobytes(): slot for child, slot in zip(population, search.pending[-1][1], strict=True)
    }
    told, before = population[::-1][:50].copy(), search.slots.population
    search.tell(Evaluated(told, price(told), fitness(told)))
    taken = np.flatnonzero((search.slots.population != before).any(axis=1))
    for slot in taken.tolist():  # by its own child, or one that exceeds the limit of its own slot
        child = search.slots.population[slot]
        own = slot_of[child.tobytes()]
        assert slot == own or price(child[None])[0] > search.slot_limits[own]
    assert len(taken) > 5
    assert len(search.ask()) == 200


def test_a_generation_is_made_once_and_serves_all_limits_alike():
    space = OfaMobileNetV3(num_classes=10, resolution=64, resolutions=(48, 64), width=0.5)
    macs = Limits(space, ()).costs_of(random_population(space.genes, 500, np.random.default_rng(0)))
    maxima = np.quantile(macs["macs"], np.linspace(0.3, 1, 5)).tolist()
    limits = Limits(space, [Limit(cost="macs", max=limit) for limit in maxima])
    search = annealing_search(space, SearchConfig(population_size=10, num_parents=5), limits, 0)
    core = search.population
    served = np.zeros(len(maxima), dtype=int)  # by what was asked for first
    for generation in range(12):
        archs = search.ask()
        population, slots = core.pending[0]
        served += np.bincount(slots // core.slots_per_limit, minlength=len(maxima))
        assert len(core.pending) == 1 or not set(as_architectures(population)) >= set(archs)
        costs = limits.costs(archs)
        search.tell(
            [
                Candidate(arch=arch, fitness=sum(arch), costs=cost, generation=generation)
                for arch, cost in zip(archs, costs, strict=True)
            ]
        )
    assert served.sum() == 120 and served.min() == served.max()


def test_as_an_algorithm_its_answers_are_for_the_limits_on_the_first_cost():
    space = Tiny()
    limits = Limits(space, ())
    maxima = np.quantile(limits.costs_of(everything(space))["macs"], [0.5, 0.8]).tolist()
    most = float(np.median(limits.costs_of(everything(space))["params"]))
    limits.limits = (
        Limit(cost="macs", max=maxima[0]),
        Limit(cost="params", max=most),
        Limit(cost="macs", max=maxima[1]),
    )
    search = annealing_search(space, SearchConfig(population_size=11, num_parents=5), limits, 0)
    assert search.limits.maxima == maxima
    seen = []
    for generation in range(4):
        archs = search.ask()
        assert len(archs) == 11
        costs = limits.costs(archs)
        assert all(cost["params"] <= most and cost["macs"] <= maxima[1] for cost in costs)
        seen += archs
        search.tell(
            [
                Candidate(arch=arch, fitness=sum(arch), costs=cost, generation=generation)
                for arch, cost in zip(archs, costs, strict=True)
            ]
        )
    assert len(set(seen)) == len(seen)
    assert any(cost["macs"] <= maxima[0] for cost in limits.costs(seen))


def test_unassigned_rows_take_slots_only_where_they_are_better_and_bring_no_heat():
    price, fitness = prices(SPACE), worths(SPACE)
    search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=4000)
    run(search, price, fitness, 10)
    change, before = search.change, search.slots.fitness
    others = np.zeros((50, 46), dtype=np.int64)  # of another type, too
    search.tell(Evaluated(others, price(others), np.full(50, before.min() - 1)))
    assert search.change == change
    np.testing.assert_array_equal(search.slots.fitness, before)
    search.tell(Evaluated(others, price(others), np.full(50, before.max() + 1)))
    assert (search.slots.fitness > before).sum() > 3
    assert search.answers()[0].arch == (0,) * 46


def test_no_change_of_two_genes_makes_an_answer_better():
    price, fitness = prices(SPACE), worths(SPACE)
    search = Annealing(SPACE, price, [20, 40], 0, size=200, budget=60_000)
    steps = search_predicted(search, price, lambda p: lambda: fitness(p), lag=2)
    while search.told < search.budget:
        next(steps)
    for answer in search.answers():
        near = search._neighbourhood(answer)
        center = np.array(answer.arch)
        changed = (near != center).sum(axis=1)
        active = search.activity(near) | search.activity(center[None])
        assert near.shape[0] > 100 and changed.min() == 1
        assert ((near != center) & active).sum(axis=1).max() >= 2
        assert price(near).max() <= answer.limit
        assert fitness(near).max() <= answer.fitness
