"""Random architectures within limits: which are drawn, and the smallest one."""

import itertools

import numpy as np
import pytest

from nasray.config import Limit
from nasray.errors import InfeasibleError, UserError
from nasray.search.candidate import Candidate, pareto_front
from nasray.search.limits import FeasibleSampler, Limits
from nasray.spaces.population import as_architectures, as_population, random_population
from nasray.spaces.shufflenet import ShuffleNet
from nasray.spaces.tiny import Tiny
from tests.search.searches import SPACE, limited, search


@pytest.mark.parametrize("space", [Tiny(), ShuffleNet(resolution=32)], ids=["tiny", "shufflenet"])
def test_the_descent_ends_at_the_smallest_sum_that_the_tables_know(space):
    limits = Limits(space, ())
    for cost in ("macs", "params", "micronet_score"):
        sampler = FeasibleSampler(
            space, lambda population, cost=cost: limits.cost_of(cost, population)
        )
        assert sampler.smallest_cost == pytest.approx(limits.bounds(cost)[0], rel=1e-12)
        assert limits.costs([sampler.smallest])[0][cost] == sampler.smallest_cost


def test_a_space_is_drawn_until_every_feasible_architecture_was_seen():
    space = Tiny()
    low, high = Limits(space, ()).bounds("macs")
    limits = Limits(space, [Limit(cost="macs", max=(low + high) / 2)])
    choices = [range(gene.first, len(gene.choices)) for gene in space.genes]
    every = space.canonical(as_population(list(itertools.product(*choices))))
    feasible = set(as_architectures(limits.feasible(every)))
    assert 100 < len(feasible) < len(set(as_architectures(every)))
    seen, rng = set(), np.random.default_rng(0)
    first = limits.draw(10, rng, seen)
    rest = limits.draw(10_000, rng, seen)
    assert len(first) == 10 and len(set(first + rest)) == len(first) + len(rest)
    assert set(first + rest) == seen == feasible


def test_nothing_asked_for_is_nothing_drawn():
    assert Limits(Tiny(), ()).draw(0, np.random.default_rng(0), set()) == []


@pytest.fixture(scope="module")
def unlimited():
    return Limits(SPACE, ())


def test_the_value_an_unreachable_limit_names_can_be_reached(unlimited):
    for cost in ("micronet_score", "score:single_path_one_shot", "macs"):
        with pytest.raises(InfeasibleError) as raised:
            Limits(SPACE, [Limit(cost=cost, max=1e-3)])
        smallest = float(str(raised.value).split(",")[-1].split(";")[0])
        Limits(SPACE, [Limit(cost=cost, max=smallest)])


@pytest.mark.parametrize(
    ("limit", "reachable"),
    [
        (Limit(cost="macs", max=100e6), "148922792"),
        (Limit(cost="macs", min=900e6), "849514600"),
        (Limit(cost="micronet_score", max=0.1), "raise it to at least that"),
    ],
)
def test_a_limit_out_of_reach_says_the_nearest_value(limit, reachable):
    with pytest.raises(InfeasibleError, match=reachable):
        Limits(SPACE, [limit])


def test_limits_that_exclude_each_other_raise_instead_of_looping(tmp_path, unlimited):
    limits = limited(unlimited, Limit(cost="macs", max=200e6), Limit(cost="params", min=4.5e6))
    with pytest.raises(InfeasibleError, match="loosen one"):
        search(tmp_path, limits)


def test_of_limits_that_exclude_each_other_the_tightest_are_named():
    space = Tiny()
    macs, params = Limits(space, ()).bounds("macs"), Limits(space, ()).bounds("params")
    limits = [
        Limit(cost="macs", max=macs[0]),
        Limit(cost="macs", max=9e5),
        Limit(cost="params", min=params[1]),
    ]
    said = f"limits = macs <= {macs[0]:.10g}, {params[1]:.10g} <= params; loosen one"
    with pytest.raises(InfeasibleError, match=said):
        Limits(space, limits).draw(1, np.random.default_rng(0), set())


def test_an_unknown_cost_is_named():
    with pytest.raises(UserError, match="cost 'latency' is unknown"):
        Limits(SPACE, [Limit(cost="latency", max=3)])


@pytest.mark.parametrize("limit", [Limit(cost="macs", max=153e6), Limit(cost="params", min=7.2e6)])
def test_limits_that_random_draws_never_meet_are_met_by_descent(unlimited, limit):
    rng = np.random.default_rng(0)
    limits = limited(unlimited, limit)
    assert len(limits.feasible(random_population(SPACE.genes, 20_000, rng))) == 0
    found = limits.draw(50, rng, set())
    assert len(set(found)) == 50
    assert not limits.violation(np.array(found, dtype=np.int8)).any()


def test_the_front_is_what_no_other_beats():
    def candidate(macs, fitness):
        return Candidate(arch=(int(macs),), fitness=fitness, costs={"macs": macs})

    points = [(5, 0.5), (3, 0.4), (4, 0.3), (9, 0.9), (5, 0.45), (7, 0.5), (3, 0.4)]
    front = pareto_front([candidate(*point) for point in points], "macs")
    assert [(c.costs["macs"], c.fitness) for c in front] == [(3, 0.4), (5, 0.5), (9, 0.9)]
