"""Bayesian search: its distances, its process, and that it finds more in few evaluations."""

import numpy as np
import pytest

from nasray.algorithms.bayesian import BayesianSearch, _Process, ranked
from nasray.config import SearchConfig
from nasray.search.candidate import FAILED, Candidate
from nasray.search.limits import Limits
from nasray.spaces.population import random_population
from tests.search.searches import SPACE, search


@pytest.fixture(scope="module")
def limits():
    return Limits(SPACE, ())


def make(limits, **changes):
    return BayesianSearch(SPACE, SearchConfig(**changes), limits, 0)


def test_distances_count_other_operations_and_the_places_of_all_other_choices(limits):
    rng = np.random.default_rng(0)
    rows, columns = random_population(SPACE.genes, 7, rng), random_population(SPACE.genes, 5, rng)
    expected = np.zeros((7, 5))
    for gene, each in enumerate(SPACE.genes):
        own, other = rows[:, gene, None].astype(int), columns[:, gene].astype(int)
        span = len(each.choices) - 1
        expected += (own != other) if each.kind == "op" else abs(own - other) / span
    np.testing.assert_allclose(make(limits)._distances(rows, columns), expected, atol=1e-9)


def test_the_process_is_that_of_the_textbook():
    """Rasmussen and Williams (2006), equations 2.25, 2.26 and 2.30."""
    rng = np.random.default_rng(0)
    points, new = rng.random((6, 3)), rng.random((4, 3))
    targets, length, noise = rng.normal(size=6), 2.0, 0.1

    def distances(a, b):
        return np.abs(a[:, None] - b).sum(axis=2)

    process = _Process(distances(points, points), targets, length, noise)
    covariance = np.exp(-distances(points, points) / length) + noise * np.eye(6)
    kernel = np.exp(-distances(new, points) / length)
    inverse = np.linalg.inv(covariance)
    mean, deviation = process.predict(distances(new, points))
    np.testing.assert_allclose(mean, kernel @ inverse @ targets)
    np.testing.assert_allclose(deviation**2, 1 - (kernel @ inverse * kernel).sum(axis=1))
    likelihood = -0.5 * targets @ inverse @ targets - 0.5 * np.linalg.slogdet(covariance)[1]
    assert process.log_likelihood == pytest.approx(likelihood)
    # What is believed is believed: the mean there stays, the doubt shrinks.
    believing = process.believing(distances(new, points), distances(new, new))
    both = distances(new, np.concatenate((points, new)))
    again, less = believing.predict(both)
    np.testing.assert_allclose(again, mean, atol=1e-9)
    assert (less < deviation).all()


def test_ranks_are_normal_quantiles_and_ties_share_one():
    candidates = [Candidate(arch=(0,), fitness=f, costs={}) for f in (0.1, 0.9, 0.5, 0.5)]
    found = ranked(candidates)
    assert found[0] == -found[1] and found[2] == found[3] == pytest.approx(0)


def test_it_finds_more_in_few_evaluations_than_genetic_search(limits, tmp_path):
    best = {
        name: [
            max(c.fitness for c in search(tmp_path / f"{name}{seed}", limits, seed, **settings))
            for seed in range(2)
        ]
        for name in ("bayesian", "genetic")
        for settings in [{"algorithm": name, "num_parents": 10, "lag": 4}]
    }
    assert min(best["bayesian"]) > max(best["genetic"])


def test_what_is_pending_is_not_asked_for_again_and_what_failed_is_forgotten(limits):
    algorithm = make(limits)
    archs = [arch for _ in range(20) for arch in algorithm.ask()]
    assert len(set(archs)) == 20 and algorithm.pending == archs
    algorithm.tell([Candidate(arch=archs[0], fitness=FAILED, costs={})])
    algorithm.tell([Candidate(arch=archs[1], fitness=0.5, costs={})])
    assert algorithm.pending == archs[2:] and len(algorithm.known) == 1
