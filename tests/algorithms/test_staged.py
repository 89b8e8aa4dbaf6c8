"""The published multi-limit searches, without their defects: no network, no cluster."""

from pathlib import Path

import numpy as np
import pytest

from nasray.algorithms.staged import STRATEGIES, Staged, prune
from nasray.costs.latency import LatencyTable
from nasray.errors import InfeasibleError
from nasray.predictors.predictor import AccuracyPredictor
from nasray.search.evaluated import Evaluated
from nasray.search.predicted import search_predicted
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.population import as_population, random_population

OFA = Path(__file__).parents[3] / "shared" / "data" / "ofa"
SPACE = OfaMobileNetV3()
WEIGHTS = 0.5 + np.random.default_rng(0).random(46)
RESOLUTION = 45  # its column
every_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def price(population):
    return 10 + (SPACE.canonical(population) * WEIGHTS).sum(axis=1)


def fitness(population):
    return 0.5 + (SPACE.canonical(population) * WEIGHTS[::-1]).sum(axis=1) / 1000


def staged(limits, strategy, seed=0, **options):
    return Staged(SPACE, price, limits, strategy=strategy, seed=seed, **options)


def tell(search, population):
    search.tell(Evaluated(population, price(population), fitness(population)))


def run(search, price=price, begin=lambda population: lambda: fitness(population)):
    for _ in search_predicted(search, price, begin):
        if search.finished:
            return search.answers()


@every_strategy
def test_every_answer_is_within_its_limit_and_recomputes_to_its_numbers(strategy):
    limits = [20.0, 45.0, 30.0, 15.0, 30.0]
    found = run(staged(limits, strategy, size=40, generations=(12, 6)))
    assert [answer.limit for answer in found] == limits
    for answer in found:
        population = as_population([answer.arch])
        assert price(population)[0] == answer.cost <= answer.limit
        assert fitness(population)[0] == answer.fitness
    assert found[2] == found[4]


@pytest.mark.parametrize(
    ("strategy", "order"),
    [("vanilla", (40, 30, 20)), ("top-down", (40, 30, 20)), ("bottom-up", (20, 30, 40))],
)
def test_limits_are_searched_in_the_published_order_and_length(strategy, order):
    search = staged([30, 40, 20], strategy, size=20, generations=(5, 3))
    seen = []
    while not search.finished:
        seen.append(search.limit)
        population = search.ask()
        assert (price(population) <= search.limit).all() and len(population) >= 18
        tell(search, population)
    assert seen == [order[0]] * 5 + [order[1]] * 3 + [order[2]] * 3


def test_defaults_are_500_generations_and_100_for_each_later_limit():
    assert staged([30, 40, 20], "top-down").generations == [500, 100, 100]
    assert staged([30, 40], "vanilla").generations == [500, 500]


@pytest.mark.skipif(not OFA.exists(), reason=f"the published tables are not at {OFA}")
@every_strategy
def test_two_limits_far_apart_return(strategy):
    """The published program never came back from these (docs/spec.md, OFA 2.6, D2)."""
    table = LatencyTable.load(str(OFA / "note10"), SPACE)
    predictor = AccuracyPredictor.load(str(OFA / "acc_predictor.pth"), SPACE)
    search = Staged(
        SPACE, table, [60.0, 15.0], strategy=strategy, seed=0, size=50, generations=(20, 20)
    )
    found = run(search, table, predictor.begin)
    assert [answer.limit for answer in found] == [60, 15]
    for answer in found:
        population = as_population([answer.arch])
        assert table(population)[0] == answer.cost <= answer.limit
        assert predictor.exact(population)[0] == pytest.approx(answer.fitness, abs=1e-6)


def test_pruning_lowers_the_resolution_too_and_leaves_its_argument_alone():
    largest = tuple(len(gene.choices) - 1 for gene in SPACE.genes)
    lowered = set()
    for seed in range(8):
        pruned = prune(largest, 40.0, SPACE, price, np.random.default_rng(seed))
        assert price(as_population([pruned]))[0] <= 40 < price(as_population([largest]))[0]
        lowered.add(pruned[RESOLUTION])
    assert largest[RESOLUTION] == 4 and min(lowered) < 4
    assert prune(largest, 1000.0, SPACE, price, np.random.default_rng(0)) == largest
    assert prune(largest, 0.0, SPACE, price, np.random.default_rng(0)) == (0,) * 46


def test_top_down_goes_on_from_the_looser_answer_and_vanilla_does_not():
    for strategy, kept in (("top-down", True), ("vanilla", False)):
        search = staged([45, 44], strategy, size=40, generations=(10, 1))
        while search.stage == 0:
            population = search.ask()
            tell(search, population)
        record = np.array(search.found[45.0].arch)
        nearest = int((search.ask() != record).sum(axis=1).min())
        assert (nearest < 8) is kept and (nearest > 12) is not kept, (strategy, nearest)


def test_an_answer_that_the_next_limit_allows_is_where_it_begins():
    """Also on a pool, which evaluates nothing again and so never tells of it."""
    search = staged([45, 44.9], "top-down", size=40, generations=(10, 2))
    while search.stage == 0:
        population = search.ask()
        loose = price(population) <= 44.9  # so the answer for the first is one for the second
        tell(search, population[loose])
    record = search.found[45.0]
    assert search.found[44.9].arch == record.arch
    population = search.ask()
    unseen = (population != np.array(record.arch)).any(axis=1)
    tell(search, population[unseen])
    assert record.arch in set(map(tuple, search.known.population.tolist()))


def test_bottom_up_keeps_the_population_of_the_tighter_limit():
    search = staged([20, 40], "bottom-up", size=40, generations=(6, 1))
    while search.limit == 20:
        population = search.ask()
        tell(search, population)
    assert search.answers()[1].fitness >= search.answers()[0].fitness
    assert len(search.known) > 30


@every_strategy
def test_answers_do_not_change_while_later_limits_are_searched(strategy):
    search = staged([20, 30, 40], strategy, size=30, generations=(4, 4))
    given = {}
    while not search.finished:
        stage = search.stage
        population = search.ask()
        tell(search, population)
        if search.stage > stage:
            given[search.order[stage]] = search.found[search.order[stage]]
    assert {answer.limit: answer for answer in search.answers()} == given


def test_kernel_and_expansion_of_a_block_mutate_together():
    search = staged([1e9], "vanilla", size=400, mutation_prob=0.1)
    parents = random_population(SPACE.genes, 4000, np.random.default_rng(1))
    changed = search._mutate(parents) != parents
    both, kernel = (changed[:, :20] & changed[:, 20:40]).mean(), changed[:, :20].mean()
    assert kernel == pytest.approx(0.1 * 2 / 3, rel=0.1)  # a redraw may give the old value
    assert both == pytest.approx(0.1 * 4 / 9, rel=0.1)  # independent genes: 0.004


def test_a_limit_below_the_smallest_network_is_refused():
    with pytest.raises(InfeasibleError, match=r"a limit of 9 is below the smallest .*, 10.0;"):
        staged([30, 9], "top-down")
