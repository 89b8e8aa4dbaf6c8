"""Every search algorithm on fitnesses with known optima: no network, no cluster."""

import errno
import json
import os
import random
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nasray.algorithms import ALGORITHMS, GENERATIONAL, ONE_BY_ONE, make_algorithm
from nasray.algorithms.offspring import Offspring
from nasray.config import Limit, SearchConfig
from nasray.errors import EvaluationError, InfeasibleError, UserError
from nasray.search.candidate import FAILED, Candidate, Evaluation, best_first, pareto_front
from nasray.search.driver import Direct, run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.population import as_population, random_population
from nasray.spaces.shufflenet import ShuffleNet
from nasray.spaces.tiny import Tiny
from nasray.storage import files as storage

SPACE = ShuffleNet()
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)


def closeness(arch):
    """Highest at one architecture in the middle of the space."""
    target = np.tile((1, 6), 20)
    return 1.0 - float(np.abs(np.array(arch) - target).sum()) / 200


def evaluate(arch):
    return Evaluation(fitness=closeness(arch), seconds=1.0)


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


def search(folder, limits, seed=0, evaluate=evaluate, pool=None, **changes):
    algorithm = make_algorithm(limits.space, config(**changes), limits, seed)
    return run_search(algorithm, limits, pool or Direct(evaluate), History(str(folder)))


def archs_of(candidates):
    return [candidate.arch for candidate in candidates]


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
        "import sys, json; sys.path.insert(0, sys.argv[1]); import test_algorithms as t;"
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
    """Stopped after so many evaluations, again and again in one run, then left to end."""
    undisturbed = search(tmp_path / "undisturbed", unlimited, algorithm=algorithm)
    calls = []

    class Killed(Exception):
        pass

    def dying(arch):
        if len(calls) == stop_after:
            raise Killed
        calls.append(arch)
        return evaluate(arch)

    for stop_after in (0, 7, 20, 33):
        with pytest.raises(Killed):
            search(tmp_path / "stopped", unlimited, algorithm=algorithm, evaluate=dying)
        assert len(calls) == stop_after
    stop_after = None
    resumed = search(tmp_path / "stopped", unlimited, algorithm=algorithm, evaluate=dying)
    assert resumed == undisturbed
    assert len(calls) == len(set(calls)) == len(undisturbed)  # nothing evaluated twice


class AnyOrder(Direct):
    """Ends evaluations in an order of its own, of at most `number` under way at once."""

    def __init__(self, evaluate, number, seed):
        super().__init__(evaluate)
        self.number, self.rng = number, random.Random(seed)

    def next(self):
        index = self.rng.randrange(min(self.number, len(self.waiting)))
        position, arch = self.waiting[index]
        del self.waiting[index]
        return position, self.evaluate(arch)


@every_algorithm
def test_neither_order_nor_number_of_evaluators_matters(tmp_path, unlimited, algorithm):
    pools = {"1": Direct(evaluate), "2": AnyOrder(evaluate, 2, 0), "8": AnyOrder(evaluate, 8, 1)}
    found = [
        search(tmp_path / name, unlimited, pool=pool, algorithm=algorithm)
        for name, pool in pools.items()
    ]
    assert found[0] == found[1] == found[2]


class Racing(AnyOrder):
    """Judges on 100 images those who come near their bar, and on 40 all others."""

    def __init__(self, number, seed):
        super().__init__(lambda arch: self.race(arch), number, seed)
        self.rivals = {}

    def submit(self, position, arch, rivals=None):
        self.rivals[arch] = rivals
        super().submit(position, arch)

    def race(self, arch):
        fitness, rivals = closeness(arch), self.rivals[arch]
        lost = rivals is not None and fitness < rivals.bar.fitness - 0.02
        if lost:
            return Evaluation(fitness=fitness, images=40, judged=b"\xff" * 5 + b"\0" * 8)
        return Evaluation(fitness=fitness, images=100)


@pytest.mark.parametrize("algorithm", ["genetic", "steady"])
def test_races_learn_from_what_was_told_whoever_evaluates(tmp_path, unlimited, algorithm):
    pools = [Racing(1, 0), Racing(8, 1)]
    found = [
        search(tmp_path / str(index), unlimited, pool=pool, algorithm=algorithm)
        for index, pool in enumerate(pools)
    ]
    assert found[0] == found[1] and pools[0].rivals == pools[1].rivals
    assert {candidate.images for candidate in found[0]} == {40, 100}
    position = {candidate.arch: index for index, candidate in enumerate(found[0])}
    for index, candidate in enumerate(found[0]):
        rivals = pools[0].rivals[candidate.arch]
        assert (rivals is None) == (index < 20 + (algorithm == "steady") * 15)
        if rivals:
            judged = [known.images for known in rivals.known]
            assert judged.count(100) >= 20 and rivals.bar.images == 100
            assert judged.count(40) == len(judged) - judged.count(100)
            newest = max(position[arch] for arch in archs_of([*rivals.known, rivals.bar]))
            assert newest < index
    assert 40 in judged  # in the end


@pytest.mark.parametrize("algorithm", ["genetic", "steady"])
def test_a_search_stopped_with_holes_in_its_history_resumes(tmp_path, unlimited, algorithm):
    """Later candidates are on record and earlier ones are not; some cannot be evaluated."""

    def moody(arch):
        if sum(arch) % 5 == 0:
            return Evaluation(fitness=FAILED, error="it would not")
        return evaluate(arch)

    undisturbed = search(tmp_path / "undisturbed", unlimited, evaluate=moody, algorithm=algorithm)
    calls, folder = [], tmp_path / "stopped"
    for stop in (3, 11, 30, 31, 50, 1000):

        class Killed(Exception):
            pass

        def dying(arch, stop=stop):
            if len(calls) == stop:
                raise Killed
            calls.append(arch)
            return moody(arch)

        with suppress(Killed):
            search(folder, unlimited, pool=AnyOrder(dying, 8, stop), algorithm=algorithm)
    assert History(str(folder)).candidates == undisturbed
    assert len(calls) == len(set(calls)) == len(undisturbed)


@pytest.mark.parametrize("number", [1, 4, 12])
def test_when_a_search_is_hopeless_depends_on_no_evaluator_and_no_crash(
    tmp_path, unlimited, number
):
    """The first five fail, and it ends; five later ones do not matter, wherever it is killed."""
    order = archs_of(search(tmp_path / "order", unlimited, population_size=12))

    def failing(few, calls=None, stop=0):
        def once(arch):
            if calls is not None and len(calls) == stop:
                raise KeyboardInterrupt
            calls is not None and calls.append(arch)
            return Evaluation(fitness=FAILED, error="boom") if arch in few else evaluate(arch)

        return AnyOrder(once, number, 3)

    with pytest.raises(EvaluationError, match="none of the first 5 .*boom"):
        search(tmp_path / "a", unlimited, pool=failing(order[:5]), population_size=12)
    few = order[3:8]
    undisturbed = search(tmp_path / "b", unlimited, pool=failing(few), population_size=12)
    for stop in (3, 1000):
        with suppress(KeyboardInterrupt):
            pool = failing(few, [], stop)
            found = search(tmp_path / "c", unlimited, pool=pool, population_size=12)
    assert found == undisturbed and sum(candidate.failed for candidate in found) == 5


def test_failures_in_a_row_end_a_search_and_what_succeeded_is_kept(tmp_path, unlimited):
    calls = []

    def gone_later(arch):
        calls.append(arch)
        if 30 < len(calls) <= 50:
            return Evaluation(fitness=FAILED, error="the mount is gone")
        return evaluate(arch)

    with pytest.raises(EvaluationError, match="latest 20 architectures .* the mount is gone"):
        search(tmp_path / "a", unlimited, evaluate=gone_later, algorithm="steady")
    assert len(calls) == 50
    found = search(tmp_path / "a", unlimited, evaluate=gone_later, algorithm="steady")
    assert found == search(tmp_path / "b", unlimited, algorithm="steady")
    assert len(calls) == len(found) + 20


@pytest.mark.parametrize("algorithm", ONE_BY_ONE)
@pytest.mark.parametrize("lag", [1, 5])
def test_a_lagged_search_keeps_lag_evaluations_under_way(tmp_path, unlimited, algorithm, lag):
    pool = AnyOrder(evaluate, lag, 0)
    under_way = []
    submit, end = pool.submit, pool.next
    pool.submit = lambda *arguments: (submit(*arguments), under_way.append(len(pool.waiting)))
    pool.next = lambda: (under_way.append(len(pool.waiting)), end())[1]
    search(tmp_path, unlimited, pool=pool, algorithm=algorithm, lag=lag)
    assert max(under_way) == lag
    assert History(str(tmp_path)).candidates[-1].generation == 5
    other = search(tmp_path / "other", unlimited, algorithm=algorithm, lag=lag + 1)
    assert other != History(str(tmp_path)).candidates  # the lag belongs to the job


def test_a_newcomer_that_is_still_to_come_may_be_born_as_a_child(unlimited):
    """They are drawn in advance: many are never evaluated, and the best may be among them."""
    offspring = Offspring(unlimited, np.random.default_rng(0))
    assert offspring.newcomer() in offspring.seen
    early, later = list(offspring.newcomers)[:2]
    assert offspring.first_new(as_population([early])) == early
    assert offspring.first_new(as_population([early])) is None
    assert offspring.newcomer() == later
    assert offspring.first_new(as_population([later])) is None


def test_a_lagged_search_asks_for_more_whenever_one_ends_in_order(unlimited):
    """No barrier: with the first one done, another begins, whatever the others do."""
    algorithm = make_algorithm(SPACE, config(algorithm="steady", lag=4), unlimited, 0)
    first = [algorithm.ask()[0] for _ in range(4)]
    assert algorithm.ask() == []
    algorithm.tell(Candidate(arch=first[0], fitness=0.5, costs={}))
    assert len(algorithm.ask()) == 1
    assert algorithm.ask() == []


def test_a_candidate_that_cannot_be_evaluated_is_recorded_and_the_search_goes_on(
    tmp_path, unlimited
):
    def moody(arch):
        if sum(arch) % 3 == 0:
            return Evaluation(fitness=FAILED, error="it would not")
        return evaluate(arch)

    for algorithm in ALGORITHMS:
        folder = tmp_path / algorithm
        found = search(folder, unlimited, evaluate=moody, algorithm=algorithm)
        failed = [candidate for candidate in found if candidate.failed]
        assert 0 < len(failed) < len(found)
        assert all(candidate.error == "it would not" for candidate in failed)
        assert History(str(folder)).candidates == found
        # What failed is nobody's parent, and is not asked for again.
        calls = []
        search(folder, unlimited, evaluate=calls.append, algorithm=algorithm)
        assert calls == []


def test_a_search_in_which_nothing_can_be_evaluated_ends_at_once_and_can_be_repeated(
    tmp_path, unlimited
):
    calls = []

    def hopeless(arch):
        calls.append(arch)
        return Evaluation(fitness=FAILED, error="no such file")

    with pytest.raises(EvaluationError, match="first 5 architectures .*; the last: no such file"):
        search(tmp_path, unlimited, evaluate=hopeless)
    assert len(calls) == 5
    assert search(tmp_path, unlimited) == search(tmp_path / "undisturbed", unlimited)


def test_a_history_of_another_job_is_refused(tmp_path, unlimited):
    search(tmp_path, unlimited, seed=0)
    with pytest.raises(UserError, match="recorded with another job"):
        search(tmp_path, unlimited, seed=1)


@pytest.mark.parametrize(
    "damage", [b"", b"PAR1 and then nothing", "another table", "half", "a bit"]
)
def test_a_damaged_file_is_made_again_from_the_single_evaluations(
    tmp_path, unlimited, damage, caplog
):
    undisturbed = search(tmp_path, unlimited)
    path = tmp_path / "search-0002.parquet"
    whole = path.read_bytes()
    if damage == "a bit":
        numbers = [np.float64(c.fitness).tobytes() for c in undisturbed if c.generation == 2]
        place = next(whole.index(number) for number in numbers if number in whole)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    elif damage == "another table":
        pq.write_table(pa.table({"fitness": [0.5]}), path)
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "half" else damage)
    assert len(History(str(tmp_path))) == 2
    assert "search-0002.parquet is damaged" in caplog.text
    calls = []
    assert search(tmp_path, unlimited, evaluate=calls.append) == undisturbed
    assert calls == [] and len(History(str(tmp_path))) == 6
    # Without them only what the file held is evaluated again.
    path.write_bytes(b"")
    History(str(tmp_path)).close()

    def counting(arch):
        calls.append(arch)
        return evaluate(arch)

    assert search(tmp_path, unlimited, evaluate=counting) == undisturbed
    assert calls == [c.arch for c in undisturbed if c.generation == 2]


def test_a_damaged_single_evaluation_is_done_again(tmp_path, unlimited, caplog):
    undisturbed = search(tmp_path, unlimited)
    (tmp_path / "search-0005.parquet").unlink()
    last = sorted((tmp_path / "_evaluations" / "search").iterdir())[-1]
    last.write_text(last.read_text()[:40])
    calls = []

    def counting(arch):
        calls.append(arch)
        return evaluate(arch)

    assert search(tmp_path, unlimited, evaluate=counting) == undisturbed
    assert calls == [undisturbed[-1].arch]
    assert f"{last.name} is of no use" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"fitness": float("nan")},
        {"images": 9, "correct": ""},
        {"images": 1, "correct": "gA==", "judged": "wA=="},  # two bits
        {"images": 1, "correct": "gAA=", "judged": "gA=="},  # two bytes
    ],
)
def test_a_single_evaluation_that_none_gives_is_done_again(tmp_path, unlimited, change):
    undisturbed = search(tmp_path, unlimited)
    (tmp_path / "search-0005.parquet").unlink()
    last = sorted((tmp_path / "_evaluations" / "search").iterdir())[-1]
    last.write_text(json.dumps(json.loads(last.read_text()) | change))
    assert search(tmp_path, unlimited) == undisturbed


def test_a_history_without_a_later_column_goes_on(tmp_path, unlimited, caplog):
    """Older versions did not write which images a dropped candidate was judged on."""
    undisturbed = search(tmp_path, unlimited)
    for path in tmp_path.glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["judged"]), path)
    (tmp_path / "search-0005.parquet").unlink()
    for path in (tmp_path / "_evaluations" / "search").iterdir():
        entry = json.loads(path.read_text())
        del entry["judged"]
        path.write_text(json.dumps(entry))
    calls = []
    assert search(tmp_path, unlimited, evaluate=calls.append) == undisturbed
    assert not calls and "damaged" not in caplog.text


def test_files_of_other_names_are_no_history(tmp_path, unlimited):
    undisturbed = search(tmp_path, unlimited)
    (tmp_path / "search-0001 (copy).parquet").write_bytes(b"")
    assert History(str(tmp_path)).candidates == undisturbed


def test_history_is_one_parquet_data_set(tmp_path, unlimited):
    def judged(arch):
        seen = {"images": 3, "slices": (0.5, 0.25), "correct": b"\x01\x02", "judged": b"\x01\x03"}
        return replace(evaluate(arch), **seen, node="n")

    candidates = search(tmp_path, unlimited, evaluate=judged)
    names = storage.list_names(str(tmp_path))
    assert names == ["_evaluations", *(f"search-{number:04d}.parquet" for number in range(6))]
    table = pq.read_table(str(tmp_path))
    wanted = (
        "source position generation arch genes fitness seconds images slices correct judged error"
    )
    wanted += " evaluator node attempt macs params"
    assert set(wanted.split()) <= set(table.column_names)
    assert table["position"].to_pylist() == list(range(len(candidates)))
    assert json.loads(table["arch"][3].as_py()) == SPACE.to_json(candidates[3].arch)
    assert tuple(table["genes"][3].as_py()) == candidates[3].arch
    assert History(str(tmp_path)).candidates == candidates
    assert (candidates[3].correct, candidates[3].judged) == (b"\x01\x02", b"\x01\x03")
    assert candidates[3].node == "n"
    # Another source in the same data set is not the search's.
    History(str(tmp_path), "listed").append(candidates[:2])
    assert History(str(tmp_path)).candidates == candidates
    assert pq.read_table(str(tmp_path)).num_rows == len(candidates) + 2


def test_a_storage_that_fails_for_a_while_loses_nothing(tmp_path, unlimited, monkeypatch, caplog):
    undisturbed = search(tmp_path / "undisturbed", unlimited)
    write, chance = storage._write_once, random.Random(0)
    pauses = []
    monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)

    def flaky(*arguments):
        if chance.random() < 0.3:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(storage, "_write_once", flaky)
    assert search(tmp_path / "flaky", unlimited) == undisturbed
    assert len(pauses) > 10 and "No space left on device; trying again" in caplog.text


def test_parents_are_kept_and_the_last_offspring_are_evaluated(tmp_path, unlimited):
    """Generations after the first hold population_size less the parents, all evaluated."""
    search(tmp_path, unlimited, random_parent_prob=0.0)
    sizes = [len(generation) for generation in History(str(tmp_path))]
    assert sizes == [20] + [14] * 5


def test_other_members_become_parents_by_chance(unlimited):
    algorithm = GENERATIONAL["genetic"](
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
    algorithm = GENERATIONAL["genetic"](
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
