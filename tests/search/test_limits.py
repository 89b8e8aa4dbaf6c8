"""Random architectures within limits: which are drawn, and the smallest one."""

import itertools

import numpy as np
import pytest

from nasray.config import Limit
from nasray.search.limits import FeasibleSampler, Limits
from nasray.spaces.population import as_architectures, as_population
from nasray.spaces.shufflenet import ShuffleNet
from nasray.spaces.tiny import Tiny


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
