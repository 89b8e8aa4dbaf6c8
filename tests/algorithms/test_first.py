"""Architectures that the first generation holds, whatever the algorithm asks for."""

import pytest

from nasray.algorithms import ALGORITHMS, ONE_AT_A_TIME, make_algorithm, make_schedule
from nasray.algorithms.first import WithFirst
from nasray.config import MULTI_LIMIT, Limit, SearchConfig
from nasray.search.candidate import Evaluation
from nasray.search.driver import Direct, run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures, as_population
from nasray.spaces.space import largest
from nasray.spaces.tiny import Tiny

SPACE = Tiny()
FREE = Limits(SPACE, ())


class Counting:
    """Asks for (0, ...), (1, ...) and so on, and keeps what it is told."""

    def __init__(self):
        self.next, self.told = 0, []

    def ask(self):
        self.next += 1
        return [(self.next - 1, 0), (self.next - 1, 1)]

    def tell(self, candidates):
        self.told.append([candidate for candidate in candidates])


def test_they_come_once_after_what_the_algorithm_asks_for():
    inner = Counting()
    algorithm = WithFirst(inner, [(7, 7), (0, 1), (7, 7)], FREE, 100)
    assert algorithm.ask() == [(0, 0), (0, 1), (7, 7)]
    algorithm.tell(["a", "b", "c"])
    assert inner.told == [["a", "b", "c"]]
    assert algorithm.ask() == [(1, 0), (1, 1)]


def test_a_resumed_search_that_is_only_told_does_not_ask_for_them_again():
    algorithm = WithFirst(Counting(), [(7, 7)], FREE, 100)
    algorithm.tell(["a"])
    assert algorithm.ask() == [(0, 0), (0, 1)]


def test_what_came_first_is_not_asked_for_again_by_the_algorithm():
    algorithm = WithFirst(Counting(), [(1, 1), (2, 0)], FREE, 100)
    assert algorithm.ask() == [(0, 0), (0, 1), (1, 1), (2, 0)]
    algorithm.tell(["a", "b", "c", "d"])
    assert algorithm.ask() == [(1, 0)]
    resumed = WithFirst(Counting(), [(0, 1)], FREE, 100)
    resumed.tell(["a"])
    assert resumed.ask() == [(0, 0)]


def test_they_count_among_the_most_that_are_asked_for():
    algorithm = WithFirst(Counting(), [(7, 7), (8, 8)], FREE, 5)
    algorithm.tell(algorithm.ask())
    assert algorithm.ask() == [(1, 0)]
    only = WithFirst(Counting(), [(0, 1), (8, 8), (9, 9)], FREE, 3)
    assert only.ask() == [(0, 1), (8, 8), (9, 9)]


def search(folder, algorithm, limits, first=(), **sizes):
    """A search as the pipeline does it, on the tiny space: all candidates."""
    config = SearchConfig(algorithm=algorithm, **sizes)
    most = config.evaluations or config.most_evaluations
    return run_search(
        WithFirst(make_algorithm(SPACE, config, limits, 0), first, limits, most),
        make_schedule(config),
        limits,
        Direct(lambda arch: Evaluation(fitness=sum(arch) / 100)),
        History(str(folder)),
    )


@pytest.mark.parametrize("algorithm", [each for each in ALGORITHMS if each not in ONE_AT_A_TIME])
def test_no_more_are_evaluated_than_are_paid_for(tmp_path, algorithm):
    smallest = tuple(gene.first for gene in SPACE.genes)
    ends = as_architectures(SPACE.canonical(as_population([largest(SPACE), smallest])))
    found = search(tmp_path, algorithm, FREE, ends, evaluations=20)
    assert 18 <= len(found) <= 20  # genetic search keeps a parent or two more by chance
    assert set(ends) <= {each.arch for each in found if each.generation == 0}
    resumed = search(tmp_path, algorithm, FREE, ends, evaluations=20)
    assert resumed == found


@pytest.mark.parametrize("algorithm", MULTI_LIMIT)
def test_every_limit_has_a_candidate_however_few_architectures_are_within(tmp_path, algorithm):
    tops = [1.001 * FREE.bounds("macs")[0], 9e5, 1.2e6]
    limits = Limits(SPACE, [Limit(cost="macs", max=top) for top in tops])
    sizes = {"population_size": 6, "num_parents": 2, "num_generations": 3}
    found = search(tmp_path, algorithm, limits, **sizes)
    assert len(found) == 18
    assert all(any(each.costs["macs"] <= top for each in found) for top in tops)
