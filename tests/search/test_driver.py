"""The loop of a search: what it evaluates, records and tells, whatever fails."""

from contextlib import suppress

import pytest

from nasray.algorithms import ONE_AT_A_TIME, make_schedule
from nasray.errors import EvaluationError, UserError
from nasray.search.candidate import FAILED, Evaluation
from nasray.search.driver import Direct, run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.search.racing import EarlyStopping
from nasray.search.scores import FITNESS
from tests.search.searches import (
    SPACE,
    AnyOrder,
    archs_of,
    closeness,
    config,
    evaluate,
    make,
    search,
)


@pytest.fixture(scope="module")
def unlimited():
    return Limits(SPACE, ())


class Racing(AnyOrder):
    """Evaluates those who come near their incumbent on 100 images, all others on 40."""

    def __init__(self, number, seed):
        super().__init__(self.race, number, seed)
        self.rules = {}

    def submit(self, position, arch, rule=None):
        self.rules[arch] = rule
        super().submit(position, arch)

    def race(self, arch):
        fitness, rule = closeness(arch), self.rules[arch]
        if rule is not None and fitness < rule[0].fitness - 0.02:
            return Evaluation(fitness=fitness, images=40, judged=b"\xff" * 5 + b"\0" * 8)
        return Evaluation(fitness=fitness, images=100)


class Told(EarlyStopping):
    """Returns what a rule would be made of, instead of a model fitted to it."""

    def __init__(self, settings):
        vars(self).update(vars(EarlyStopping.of(SPACE, settings, make_schedule(settings))))

    def rule(self, arch):
        if len(self.incumbents) < self.num_incumbents or len(self.fitted_to) < 20:
            return None
        return self.incumbents[-1], self.fitted_to


@pytest.mark.parametrize("algorithm", ["genetic", "steady"])
def test_races_learn_from_what_was_told_whoever_evaluates(tmp_path, unlimited, algorithm):
    pools = [Racing(1, 0), Racing(8, 1)]
    found = [
        search(
            tmp_path / str(index),
            unlimited,
            pool=pool,
            early_stopping=Told(config(algorithm=algorithm, racing=True)),
            algorithm=algorithm,
        )
        for index, pool in enumerate(pools)
    ]
    assert found[0] == found[1] and pools[0].rules == pools[1].rules
    assert {candidate.images for candidate in found[0]} == {40, 100}
    position = {candidate.arch: index for index, candidate in enumerate(found[0])}
    for index, candidate in enumerate(found[0]):
        rule = pools[0].rules[candidate.arch]
        assert (rule is None) == (index < 20 + (algorithm == "steady") * 15)
        if rule:
            incumbent, known = rule
            images = [each.images for each in known]
            assert images.count(100) >= 20 and incumbent.images == 100
            assert images.count(40) == len(images) - images.count(100)
            newest = max(position[arch] for arch in archs_of([*known, incumbent]))
            assert newest < index
    assert 40 in images  # in the end


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


@pytest.mark.parametrize("algorithm", ONE_AT_A_TIME)
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


def test_a_lagged_search_asks_for_more_whenever_one_ends_in_order(tmp_path, unlimited):
    """No barrier: with the first one done, another begins, whatever the others do."""
    submitted = []

    class FirstOnly(Direct):
        def submit(self, position, arch, rule=None):
            submitted.append(position)
            super().submit(position, arch)

        def next(self):
            if len(submitted) > 4:
                raise KeyboardInterrupt
            return super().next()

    with suppress(KeyboardInterrupt):
        search(tmp_path, unlimited, pool=FirstOnly(evaluate), algorithm="steady", lag=4)
    assert submitted == [0, 1, 2, 3, 4]


def test_costs_are_known_before_an_evaluation_is_waited_for(tmp_path, unlimited, monkeypatch):
    """Compiling them takes seconds, in which the pool would give evaluators nothing to do."""
    events = []
    costs = Limits.costs
    monkeypatch.setattr(Limits, "costs", lambda *given: events.append("costs") or costs(*given))

    class Noting(Direct):
        def next(self):
            events.append("next")
            return super().next()

    search(tmp_path, unlimited, pool=Noting(evaluate), population_size=12, num_generations=2)
    assert events[0] == "costs" and events.count("costs") == 2 and events.count("next") > 12


def test_a_search_in_which_nothing_can_be_evaluated_ends_at_once_and_can_be_repeated(
    tmp_path, unlimited
):
    calls = []

    def hopeless(arch):
        calls.append(arch)
        return Evaluation(fitness=FAILED, error="no such file")

    with pytest.raises(EvaluationError, match="first 5 arch.*; the last, {.*}: no such file"):
        search(tmp_path, unlimited, evaluate=hopeless)
    assert len(calls) == 5
    assert search(tmp_path, unlimited) == search(tmp_path / "undisturbed", unlimited)


def test_a_history_of_another_job_is_refused(tmp_path, unlimited):
    search(tmp_path, unlimited, seed=0)
    with pytest.raises(UserError, match="recorded with another job"):
        search(tmp_path, unlimited, seed=1)


def test_the_best_so_far_is_told_in_the_units_of_the_fitness(tmp_path, unlimited):
    told, best, values = [], [], iter([FAILED, -0.5, -0.75, -0.25])
    settings = config(algorithm="random", num_generations=1, population_size=4, num_parents=2)
    run_search(
        make(unlimited, settings, 0),
        make_schedule(settings),
        unlimited,
        Direct(lambda arch: Evaluation(fitness=next(values), images=10)),
        History(str(tmp_path)),
        show=lambda done, text: told.append(text),
        tell_best=best.append,
        fitness=FITNESS["log_likelihood"],
    )
    assert told[1].endswith("2 evaluated, 1 failed, best -0.50 nats")
    assert best == [-0.5, -0.5, -0.25]
