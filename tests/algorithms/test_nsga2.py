"""NSGA-II against plain definitions and an exhaustive search."""

from itertools import product

import numpy as np

from nasray.algorithms.nsga2 import Nsga2, crowding, rank
from nasray.search.evaluated import Evaluated
from nasray.spaces.tiny import Tiny

SPACE = Tiny()


def everything():
    return np.array(list(product(*(range(len(g.choices)) for g in SPACE.genes))), dtype=np.int8)


def losses_of(population):
    """Two objectives that contradict each other, and a third."""
    weights = np.random.default_rng(0).random((2, population.shape[1]))
    size, worth = population @ weights[0], population @ weights[1] + np.sin(population.sum(axis=1))
    return np.stack([-worth, size, (population - 1.5).clip(0).sum(axis=1)], axis=1)


def evaluated(population):
    losses = losses_of(population)
    return Evaluated(population, losses[:, 1:], -losses[:, 0])


def dominates(one, two):
    return (one <= two).all() and (one < two).any()


def test_ranks_are_those_of_peeling_off_fronts_one_by_one():
    losses = np.random.default_rng(0).integers(0, 6, size=(60, 3)).astype(float)
    ranks = rank(losses)
    left, number = set(range(60)), 0
    while left:
        front = {i for i in left if not any(dominates(losses[j], losses[i]) for j in left)}
        assert {int(i) for i in np.flatnonzero(ranks == number)} == front
        left, number = left - front, number + 1


def test_crowding_is_the_distance_of_the_neighbours_within_a_rank():
    losses = np.array([[0, 4], [1, 2], [3, 1], [4, 0], [9, 9]], dtype=float)
    found = crowding(losses, np.array([0, 0, 0, 0, 1]))
    assert np.isinf(found[[0, 3, 4]]).all()
    np.testing.assert_allclose(found[[1, 2]], [3 / 4 + 3 / 4, 3 / 4 + 2 / 4])


def test_it_finds_almost_the_whole_front_of_a_small_space():
    every = everything()
    losses = losses_of(every)
    best = {tuple(row) for row in every[rank(losses) == 0].tolist()}
    search = Nsga2(SPACE, seed=0, size=120, mutation_prob=0.1)
    for _ in range(60):
        search.tell(evaluated(search.ask()))
    np.testing.assert_array_equal(evaluated(search.members.population).costs, search.members.costs)
    found = search.members.population[search.ranks == 0]
    hits = [tuple(row) in best for row in found.tolist()]
    assert len(set(map(tuple, found.tolist()))) == len(found)
    assert np.mean(hits) > 0.9 and sum(hits) > min(60, 0.5 * len(best))


def test_a_known_architecture_is_kept_once():
    search = Nsga2(SPACE, seed=0, size=10)
    population = everything()[:8]
    search.tell(evaluated(population))
    search.tell(evaluated(population))
    assert len(search.members) == 8
