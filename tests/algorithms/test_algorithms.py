"""What every search algorithm promises, on fitnesses with known optima: no network, no cluster.

Same seed, same history, in any process and any order of completion; resuming, no repeats, limits,
failures. Each test runs over the whole table.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from nasray.algorithms import ALGORITHMS
from nasray.algorithms.genetic import GeneticSearch
from nasray.algorithms.offspring import Offspring
from nasray.config import Limit
from nasray.search.candidate import FAILED, Candidate, Evaluation, best_first
from nasray.search.driver import Direct
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.population import as_population
from nasray.spaces.tiny import Tiny
from tests.search.searches import (
    SPACE,
    AnyOrder,
    archs_of,
    closeness,
    config,
    evaluate,
    limited,
    search,
)

CONTRACT = (*ALGORITHMS, "verify")
every_algorithm = pytest.mark.parametrize("algorithm", CONTRACT)


@pytest.fixture(scope="module")
def unlimited():
    return Limits(SPACE, ())


def test_every_search_by_fitness_beats_random_search(tmp_path, unlimited):
    best = {"genetic": [], "steady": [], "evolution": [], "front": [], "random": []}
    for algorithm, found in best.items():
        for seed in range(5):
            folder = tmp_path / f"{algorithm}{seed}"
            candidates = search(
                folder, unlimited, seed=seed, algorithm=algorithm, num_generations=12
            )
            assert len(candidates) >= 120
            found.append(max(candidate.fitness for candidate in candidates))
    others = max(best.pop("random"))
    assert all(min(found) > others for found in best.values())


@every_algorithm
def test_same_seed_same_history_another_seed_another(tmp_path, unlimited, algorithm):
    runs = [
        archs_of(search(tmp_path / str(index), unlimited, seed=seed, algorithm=algorithm))
        for index, seed in enumerate((0, 0, 1))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_same_histories_in_another_process(tmp_path):
    """String hashes differ between processes; histories must not."""
    program = (
        "import sys, json; import tests.algorithms.test_algorithms as t;"
        "from nasray.search.limits import Limits; from nasray.spaces.tiny import Tiny;"
        "limits = Limits(Tiny(), ());"
        "found = [t.search(sys.argv[1] + name, limits, algorithm=name, evaluate=t.evaluate_tiny)"
        " for name in t.CONTRACT];"
        "print(json.dumps([hash('nasray'), *map(t.archs_of, found)]))"
    )
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program]
        run = subprocess.run(
            [*command, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=True,
            text=True,
        )
        outputs.append(json.loads(run.stdout))
    assert outputs[0][0] != outputs[1][0]
    assert outputs[0][1:] == outputs[1][1:]
    assert len(outputs[0]) == 1 + len(CONTRACT)


def evaluate_tiny(arch):
    return Evaluation(fitness=sum(arch) / 100)


@every_algorithm
def test_nothing_is_evaluated_twice_and_an_exhausted_space_ends_the_search(tmp_path, algorithm):
    # 36 architectures: any repeat would show.
    limits = Limits(Tiny(num_blocks=2), ())
    candidates = search(
        tmp_path, limits, algorithm=algorithm, evaluate=evaluate_tiny, num_generations=30
    )
    assert len(candidates) == len(set(archs_of(candidates))) == 36


@every_algorithm
def test_every_candidate_is_within_the_limits(tmp_path, unlimited, algorithm):
    bounds = {"macs": (250e6, 330e6), "params": (3.0e6, 4.0e6)}
    limits = limited(
        unlimited, *(Limit(cost=cost, min=low, max=high) for cost, (low, high) in bounds.items())
    )
    candidates = search(tmp_path, limits, algorithm=algorithm)
    assert len(candidates) >= 60
    for candidate in candidates:
        for cost, (low, high) in bounds.items():
            assert low <= candidate.costs[cost] <= high


@every_algorithm
def test_a_search_stopped_anywhere_resumes_to_the_same_history(tmp_path, unlimited, algorithm):
    """Later candidates are on record and earlier ones are not; some cannot be evaluated."""

    def moody(arch):
        if sum(arch) % 5 == 0:
            return Evaluation(fitness=FAILED, error="it would not")
        return evaluate(arch)

    undisturbed = search(tmp_path / "undisturbed", unlimited, evaluate=moody, algorithm=algorithm)
    assert 0 < sum(candidate.error == "it would not" for candidate in undisturbed) < 60
    calls, folder = [], tmp_path / "stopped"
    for stop in (0, 3, 11, 20, 31, 50, 1000):

        def dying(arch, stop=stop):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(arch)
            return moody(arch)

        with suppress(KeyboardInterrupt):
            search(folder, unlimited, pool=AnyOrder(dying, 8, stop), algorithm=algorithm)
    assert History(str(folder)).candidates == undisturbed
    assert len(calls) == len(set(calls)) == len(undisturbed)  # nothing evaluated twice


@every_algorithm
def test_neither_order_nor_number_of_evaluators_matters(tmp_path, unlimited, algorithm):
    pools = {"1": Direct(evaluate), "2": AnyOrder(evaluate, 2, 0), "8": AnyOrder(evaluate, 8, 1)}
    found = [
        search(tmp_path / name, unlimited, pool=pool, algorithm=algorithm)
        for name, pool in pools.items()
    ]
    assert found[0] == found[1] == found[2]


def test_a_random_architecture_drawn_in_advance_may_be_returned_as_a_child(unlimited):
    """Many that are drawn are never evaluated, and the best may be among them."""
    offspring = Offspring(unlimited, np.random.default_rng(0))
    assert offspring.random() in offspring.seen
    early, later = list(offspring.drawn)[:2]
    assert offspring.first_new(as_population([early])) == early
    assert offspring.first_new(as_population([early])) is None
    assert offspring.random() == later
    assert offspring.first_new(as_population([later])) is None


def test_parents_are_kept_and_the_last_offspring_are_evaluated(tmp_path, unlimited):
    """Generations after the first hold population_size less the parents, all evaluated."""
    search(tmp_path, unlimited, random_parent_prob=0.0)
    sizes = [len(generation) for generation in History(str(tmp_path))]
    assert sizes == [20] + [14] * 5


def test_other_members_become_parents_by_chance(unlimited):
    algorithm = GeneticSearch(SPACE, config(population_size=1000, num_parents=10), unlimited, 0)
    generation = [
        Candidate(arch=arch, fitness=closeness(arch), costs={}) for arch in algorithm.ask()
    ]
    algorithm.tell(generation)
    best = archs_of(best_first(generation)[:10])
    assert archs_of(algorithm.parents)[:10] == best
    assert 70 <= len(algorithm.parents) - 10 <= 130  # a tenth of 990


def test_a_population_of_nothing_but_parents_still_gets_offspring(tmp_path, unlimited):
    candidates = search(tmp_path, unlimited, random_parent_prob=1.0)
    assert [candidate.generation for candidate in candidates[-5:]] == [1, 2, 3, 4, 5]


def test_children_carry_their_parents_genes(unlimited):
    algorithm = GeneticSearch(
        SPACE, config(mutation_prob=0.0, random_parent_prob=0.0), unlimited, 0
    )
    generation = [
        Candidate(arch=arch, fitness=closeness(arch), costs={}) for arch in algorithm.ask()
    ]
    algorithm.tell(generation)
    parents = np.array(archs_of(algorithm.parents))
    for child in algorithm.ask():
        assert all(gene in parents[:, column] for column, gene in enumerate(child))
