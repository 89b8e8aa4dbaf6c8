"""Every search algorithm on fitnesses with known optima: no network, no cluster."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nasray import storage
from nasray.config import Limit, SearchConfig
from nasray.errors import InfeasibleError, UserError
from nasray.search import ALGORITHMS
from nasray.search.candidate import Candidate, best_first, pareto_front
from nasray.search.driver import run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.shufflenet import ShuffleNet
from nasray.spaces.space import random_population
from nasray.spaces.tiny import Tiny

SPACE = ShuffleNet()
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


@dataclass(frozen=True)
class Score:
    fitness: float
    seconds: float = 1.0


def closeness(arch):
    """Highest at one architecture in the middle of the space."""
    target = np.tile((1, 6), 20)
    return 1.0 - float(np.abs(np.array(arch) - target).sum()) / 200


def evaluate(archs, finished):
    scores = [Score(closeness(arch)) for arch in archs]
    for index, score in enumerate(scores):
        finished(index, score)
    return scores


@pytest.fixture(scope="module")
def unlimited():
    return Limits(SPACE, ())


def limited(unlimited, *limits):
    """Limits over the space whose costs are compiled already."""
    found = Limits.__new__(Limits)
    found.space, found.limits = SPACE, limits
    found.table, found.latency = unlimited.table, None
    return found


def config(**changes):
    return SearchConfig(
        **({"population_size": 20, "num_generations": 6, "num_parents": 6} | changes)
    )


def search(folder, limits, seed=0, evaluate=evaluate, **changes):
    history = History(str(folder))
    return run_search(limits.space, config(**changes), limits, evaluate, history, seed=seed)


def archs_of(candidates):
    return [candidate.arch for candidate in candidates]


def test_genetic_search_beats_random_search(tmp_path, unlimited):
    best = {"genetic": [], "random": []}
    for algorithm, found in best.items():
        for seed in range(5):
            folder = tmp_path / f"{algorithm}{seed}"
            candidates = search(
                folder, unlimited, seed=seed, algorithm=algorithm, num_generations=12
            )
            assert len(candidates) >= 120
            found.append(max(candidate.fitness for candidate in candidates))
    assert min(best["genetic"]) > max(best["random"])


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
        "import sys, json; sys.path.insert(0, sys.argv[1]); import test_search as t;"
        "from nasray.search.limits import Limits; from nasray.spaces.tiny import Tiny;"
        "limits = Limits(Tiny(), ());"
        "found = [t.search(sys.argv[2] + name, limits, algorithm=name, evaluate=t.evaluate_tiny)"
        " for name in t.ALGORITHMS];"
        "print(json.dumps([hash('nasray'), *map(t.archs_of, found)]))"
    )
    outputs = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", program, os.path.dirname(__file__)]
        run = subprocess.run(
            [*command, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            text=True,
        )
        outputs.append(json.loads(run.stdout))
    assert outputs[0][0] != outputs[1][0]
    assert outputs[0][1:] == outputs[1][1:]
    assert len(outputs[0]) == 1 + len(ALGORITHMS)


def evaluate_tiny(archs, finished):
    scores = [Score(sum(arch) / 100) for arch in archs]
    for index, score in enumerate(scores):
        finished(index, score)
    return scores


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
@pytest.mark.parametrize("stop_after", [0, 7, 20, 33])
def test_a_search_stopped_anywhere_resumes_to_the_same_history(
    tmp_path, unlimited, algorithm, stop_after
):
    undisturbed = search(tmp_path / "undisturbed", unlimited, algorithm=algorithm)
    calls = []

    class Killed(Exception):
        pass

    def dying(archs, finished):
        scores = []
        for index, arch in enumerate(archs):
            if len(calls) == stop_after:
                raise Killed
            calls.append(arch)
            scores.append(Score(closeness(arch)))
            finished(index, scores[-1])
        return scores

    with pytest.raises(Killed):
        search(tmp_path / "stopped", unlimited, algorithm=algorithm, evaluate=dying)

    def counting(archs, finished):
        calls.extend(archs)
        return evaluate(archs, finished)

    resumed = search(tmp_path / "stopped", unlimited, algorithm=algorithm, evaluate=counting)
    assert resumed == undisturbed
    assert len(calls) == len(set(calls)) == len(undisturbed)  # nothing evaluated twice


def test_the_order_in_which_evaluations_finish_does_not_matter(tmp_path, unlimited):
    def backwards(archs, finished):
        scores = [Score(closeness(arch)) for arch in archs]
        for index in reversed(range(len(archs))):
            finished(index, scores[index])
        return scores

    forwards = search(tmp_path / "f", unlimited)
    assert search(tmp_path / "b", unlimited, evaluate=backwards) == forwards


def test_a_history_of_another_job_is_refused(tmp_path, unlimited):
    search(tmp_path, unlimited, seed=0)
    with pytest.raises(UserError, match="recorded with another job"):
        search(tmp_path, unlimited, seed=1)


def test_a_damaged_generation_is_named(tmp_path, unlimited):
    search(tmp_path, unlimited)
    (tmp_path / "generation-0002.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(UserError, match="generation-0002.parquet: not .* remove it and the later"):
        History(str(tmp_path))
    pq.write_table(pa.table({"fitness": [0.5]}), tmp_path / "generation-0002.parquet")
    with pytest.raises(UserError, match="generation-0002.parquet: not a readable generation"):
        History(str(tmp_path))


def test_history_is_one_parquet_file_a_generation_with_every_cost(tmp_path, unlimited):
    import pyarrow.parquet as pq

    candidates = search(tmp_path, unlimited)
    assert storage.list_names(str(tmp_path)) == [f"generation-{g:04d}.parquet" for g in range(6)]
    table = pq.read_table(str(tmp_path / "generation-0000.parquet"))
    assert {"arch", "fitness", "seconds", "generation", "macs", "params"} <= set(table.column_names)
    assert table.num_rows == 20
    assert History(str(tmp_path)).candidates == candidates


def test_parents_are_kept_and_the_last_offspring_are_evaluated(tmp_path, unlimited):
    """Generations after the first hold population_size less the parents, all evaluated."""
    search(tmp_path, unlimited, random_parent_prob=0.0)
    sizes = [len(generation) for generation in History(str(tmp_path))]
    assert sizes == [20] + [14] * 5


def test_other_members_become_parents_by_chance(unlimited):
    algorithm = ALGORITHMS["genetic"](
        SPACE, config(population_size=1000, num_parents=10), unlimited, 0
    )
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


def test_the_value_an_unreachable_limit_names_can_be_reached(unlimited):
    for cost in ("micronet_score", "score:single_path_one_shot", "macs"):
        with pytest.raises(InfeasibleError) as raised:
            Limits(SPACE, [Limit(cost=cost, max=1e-3)])
        smallest = float(str(raised.value).split(",")[-1].split(";")[0])
        Limits(SPACE, [Limit(cost=cost, max=smallest)])


def test_children_carry_their_parents_genes(unlimited):
    algorithm = ALGORITHMS["genetic"](
        SPACE, config(mutation_prob=0.0, random_parent_prob=0.0), unlimited, 0
    )
    generation = [
        Candidate(arch=arch, fitness=closeness(arch), costs={}) for arch in algorithm.ask()
    ]
    algorithm.tell(generation)
    parents = np.array(archs_of(algorithm.parents))
    for child in algorithm.ask():
        assert all(gene in parents[:, column] for column, gene in enumerate(child))


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
