"""The pool: evaluators that are lost, fail, hang, are idle, or find no place.

Most tests run evaluators that are threads of this process, called as Ray calls its actors; two
run actors of a real cluster.
"""

import os
import threading
import time
import traceback
from collections.abc import Callable, Collection
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from nasray.errors import EvaluationError, UserError
from nasray.evaluation import pool as pool_module
from nasray.evaluation.pool import Pool
from nasray.search.candidate import Evaluation
from tests.conftest import wait_for

NODE = "the only node"


class Square:
    """Squares numbers; what else it does, `folder` and the number's argument tell it."""

    def __init__(self, folder: str, broken: str = "") -> None:
        self.folder, self.broken = Path(folder), broken

    def ready(self) -> None:
        if self.broken:
            raise UserError(self.broken)

    def evaluate(self, attempt: int, number: int, mood: str = "") -> Evaluation:
        tries = len(list(self.folder.glob(f"{number}-*")))
        (self.folder / f"{number}-{tries}-{time.monotonic_ns()}").touch()
        if mood == "dies" or (mood == "dies once" and tries == 0):
            self.die()
        if mood == "raises once" and tries == 0:
            raise ValueError("not today")
        if mood == "raises":
            raise ValueError("never")
        if mood == "raises at length":
            raise ValueError("shapes differ\n\n  see the manual\n" + 2000 * "#")
        if mood == "gives up":
            raise EvaluationError("no memory")
        if mood == "hangs once" and tries == 0:
            self.hang()
        if mood == "takes longer":
            time.sleep(0.5)
        if mood == "takes a little":
            time.sleep(0.03)
        return Evaluation(fitness=number**2, attempt=attempt)

    def node(self) -> str:
        return NODE


class Dead(BaseException):
    """Ends an evaluator that is a thread."""


class Away(BaseException):
    """Makes an evaluator that is a thread look like one that no call reaches."""


class ThreadSquare(Square):
    """An evaluator that is a thread per call; has the methods of a handle of Ray's.

    `bad` is what is wrong with its node.
    """

    def __init__(self, folder: str, broken: str = "", place: str = NODE, bad: str = "") -> None:
        super().__init__(folder, broken)
        self.place, self.bad = place, bad
        self.ended, self.free = threading.Event(), threading.Lock()

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return Call(self, found) if name in ("node", "ready", "evaluate") else found

    def node(self) -> str:
        if not self.place:
            self.hang()
        return self.place

    def ready(self) -> None:
        super().ready()
        if self.bad == "full":
            raise OSError(28, "No space left on device", "/cache")
        if self.bad == "loads for ever":
            self.hang()
        if self.bad == "no driver":
            raise RuntimeError("CUDA driver initialization failed")

    def evaluate(self, attempt: int, number: int, mood: str = "") -> Evaluation:
        if self.bad == "stale":
            raise OSError(116, "Stale file handle", "/data")
        if self.bad == "raises":
            raise RuntimeError("CUDA error: uncorrectable ECC error")
        if self.bad == "dies":
            self.die()
        if self.bad == "away":
            raise Away
        if self.bad == "hangs":
            self.hang()
        return super().evaluate(attempt, number, mood)

    def die(self) -> None:
        raise Dead

    def hang(self) -> None:
        self.ended.wait(60)
        raise Dead


class Call:
    """A method of an evaluator, whose remote() is a result of the future that has future()."""

    def __init__(self, evaluator: ThreadSquare, method: Callable[..., Any]) -> None:
        self.evaluator, self.method = evaluator, method
        self.found: Future = Future()

    def remote(self, *arguments: Any) -> "Call":
        begun = threading.Event()
        threading.Thread(target=self.run, args=(begun, *arguments), daemon=True).start()
        begun.wait(0.01)  # calls of one evaluator are run in their order
        return self

    def future(self) -> Future:
        return self.found

    def run(self, begun: threading.Event, *arguments: Any) -> None:
        with self.evaluator.free:
            begun.set()
            self.answer(*arguments)

    def answer(self, *arguments: Any) -> None:
        if self.evaluator.ended.is_set():
            self.found.set_exception(ActorDiedError())
            return
        try:
            self.found.set_result(self.method(*arguments))
        except Dead:
            self.evaluator.ended.set()
            self.found.set_exception(ActorDiedError())
        except Away:
            self.found.set_exception(ActorUnavailableError("no answer", None))
        except Exception as error:
            text = traceback.format_exc()
            raised = RayTaskError("evaluate", text, error, proctitle="", pid=1, ip="")
            self.found.set_exception(raised.as_instanceof_cause())


@ray.remote(num_cpus=0)
class RaySquare(Square):
    """The same as an actor, which is a process of its own."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()

    def die(self) -> None:
        os._exit(1)


@pytest.fixture
def make_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pool_module, "CHECK_EVERY_S", 0.02)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeID": NODE, "Alive": True}])

    def make(number: int = 2, max_failures: int = 2, limit_s: float = 60, **options: str) -> Pool:
        return Pool(
            lambda left_out: ThreadSquare(str(tmp_path), **options),
            number=number,
            max_failures=max_failures,
            limit_s=limit_s,
            end=lambda evaluator: evaluator.ended.set(),
        )

    return make


class TwoNodes:
    """A cluster with room for one evaluator on each of two nodes, `bad` and "good"."""

    def __init__(self, folder: Path, bad: str, **options: Any) -> None:
        self.folder, self.bad, self.started = str(folder), bad, []
        self.pool = Pool(
            self.start,
            number=2,
            max_failures=2,
            nodes=lambda: {"bad": "10.0.0.1", "good": "10.0.0.2"},
            end=lambda evaluator: evaluator.ended.set(),
            **options,
        )

    def start(self, left_out: Collection[str]) -> ThreadSquare:
        busy = [each.place for each in self.started if not each.ended.is_set()]
        place = next((each for each in ("bad", "good") if each not in (*busy, *left_out)), "")
        bad = self.bad if place == "bad" else ""
        self.started.append(ThreadSquare(self.folder, place=place, bad=bad))
        return self.started[-1]


def run(pool: Pool, moods: dict[int, str], numbers: range = range(12)) -> dict[int, Evaluation]:
    for number in numbers:
        pool.submit(number, number, moods.get(number, ""))
    return dict(pool.next() for _ in numbers)


def squares(found: dict[int, Evaluation]) -> dict[int, float]:
    return {number: evaluation.fitness for number, evaluation in found.items()}


def begun_in(folder: Path) -> list[int]:
    """The numbers whose evaluations began, in that order."""
    began = [list(map(int, path.name.split("-"))) for path in folder.iterdir()]
    return [number for number, _, _ in sorted(began, key=lambda each: each[2])]


def test_everything_submitted_comes_back_once(make_pool):
    with make_pool(3) as pool:
        assert squares(run(pool, {})) == {number: number**2 for number in range(12)}
        assert not pool.running and not pool.waiting


def test_no_more_evaluators_start_than_there_is_work_for(make_pool):
    with make_pool(50) as pool:
        run(pool, {}, range(2))
        assert len(pool.workers) <= 2


def test_a_lost_evaluator_costs_an_attempt_and_nothing_else(make_pool):
    with make_pool() as pool:
        found = run(pool, {3: "dies once", 7: "dies once"})
        assert pool.num_lost == 2
    assert squares(found) == {number: number**2 for number in range(12)}
    assert {number for number, each in found.items() if each.attempt == 2} == {3, 7}


def test_a_candidate_whose_evaluator_vanished_goes_first(make_pool, tmp_path):
    with make_pool(1) as pool:
        run(pool, {0: "dies once"}, range(4))
    assert begun_in(tmp_path) == [0, 0, 1, 2, 3]


def test_what_raises_is_tried_again_then_recorded_with_its_reason(make_pool, tmp_path):
    with make_pool() as pool:
        found = run(pool, {1: "raises once", 2: "raises", 5: "gives up"})
        assert pool.num_lost == 0
    assert found[1].fitness == 1 and found[1].attempt == 2
    assert found[2].failed and found[2].error == "ValueError: never"
    assert found[5].failed and found[5].error == "no memory"
    tries = {number: len(list(tmp_path.glob(f"{number}-*"))) for number in (1, 2, 5)}
    assert tries == {1: 2, 2: 3, 5: 1}
    assert all(not each.failed for number, each in found.items() if number not in (2, 5))


def test_a_message_of_several_lines_is_recorded_in_one_with_its_class(make_pool, caplog):
    with make_pool() as pool:
        found = run(pool, {3: "raises at length"})
    start = "ValueError: shapes differ see the manual ##"
    assert found[3].error.startswith(start) and len(found[3].error) == pool_module.LONGEST_REASON
    assert any(start in message for message in caplog.messages)
    assert not any("\n" in message for message in caplog.messages)


def test_a_candidate_that_kills_every_evaluator_is_given_up(make_pool, tmp_path):
    with make_pool() as pool:
        found = run(pool, {3: "dies"})
    assert found[3].failed and found[3].attempt == 3
    assert found[3].error.startswith("the evaluator crashed 3 times on this architecture: ")
    assert len(list(tmp_path.glob("3-*"))) == 3
    assert sum(each.failed for each in found.values()) == 1


def test_a_straggler_is_tried_by_another_and_replaced(make_pool, tmp_path):
    with make_pool() as pool:
        before = time.monotonic()
        found = run(pool, {4: "hangs once"})
        assert time.monotonic() - before < 10
        assert squares(found) == {number: number**2 for number in range(12)}
        assert len(list(tmp_path.glob("4-*"))) == 2
        assert len(pool.workers) == 1  # the one that hangs is ended
        assert squares(run(pool, {}, range(20, 24))) == {n: n**2 for n in range(20, 24)}


def test_a_straggler_is_tried_by_another_before_the_last_tasks_are_given_out(make_pool, tmp_path):
    """Those who wait for it, as a search with a lag does, need not be idle meanwhile."""
    with make_pool() as pool:
        found = run(pool, {4: "hangs once", 10: "takes longer"})
    assert squares(found) == {number: number**2 for number in range(12)}
    assert begun_in(tmp_path)[-3:] == [10, 4, 11]


def test_the_only_evaluator_is_replaced_if_it_hangs(make_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "HANGS_S", 0.3)
    with make_pool(1) as pool:
        found = run(pool, {7: "hangs once"})
        assert pool.num_lost == 1
    assert squares(found) == {number: number**2 for number in range(12)}
    assert found[7].attempt == 2


def test_idle_evaluators_end_and_start_again_for_new_work(make_pool, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_module, "IDLE_S", 0.1)
    with make_pool() as pool:
        run(pool, {})
        pool.submit(20, 20, "hangs once")
        waiter = threading.Thread(target=pool.next, daemon=True)
        waiter.start()
        wait_for(
            lambda: list(tmp_path.glob("20-*")) and len(pool.workers) == 1, "one is idle, ends"
        )
        next(iter(pool.workers)).actor.ended.set()  # it dies
        waiter.join(10)
        assert not waiter.is_alive()
        assert squares(run(pool, {})) == {number: number**2 for number in range(12)}


def test_a_mistake_that_keeps_evaluators_from_starting_is_told_at_once(make_pool):
    with make_pool(broken="supernet.pt is gone; restore it") as pool:
        with pytest.raises(UserError, match=r"^supernet\.pt is gone; restore it$"):
            run(pool, {})


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("full", "/cache: No space left on device; free some space, then"),
        ("stale", "/data: Stale file handle; mount it anew, then"),
        ("no driver", "evaluators cannot start: RuntimeError: CUDA driver initialization failed"),
        ("loads for ever", "loading an evaluator took more than 0 s; if that is no hang, raise"),
        ("raises", "3 failures in a row: RuntimeError: CUDA error: uncorrectable ECC error"),
        ("dies", "3 failures in a row: The actor died unexpectedly before finishing this task."),
        ("away", "3 failures in a row: The actor None is unavailable: no answer"),
        ("hangs", "3 failures in a row: no result within"),
    ],
)
def test_a_node_that_cannot_evaluate_is_left_out(
    tmp_path, make_pool, monkeypatch, caplog, bad, why
):
    alive = [{"NodeID": node, "Alive": True} for node in ("bad", "good")]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    monkeypatch.setattr(pool_module, "HANGS_S", 0.2)
    monkeypatch.setattr(pool_module, "HANGS", 1.0)
    monkeypatch.setattr(pool_module, "STRAGGLER", 1000.0)
    cluster = TwoNodes(tmp_path, bad, limit_s=0.4)
    with cluster.pool as pool:
        found = run(pool, dict.fromkeys(range(60), "takes a little"), range(60))
        assert list(pool.nodes.left_out) == ["bad"]
    assert squares(found) == {number: number**2 for number in found}
    [warning] = [each for each in caplog.messages if "it is left out" in each]
    assert warning.startswith(f"node 10.0.0.1: {why}")


def test_without_a_node_that_works_the_search_ends_with_the_reason_of_each(tmp_path, make_pool):
    cluster = TwoNodes(tmp_path, "full")
    good = ThreadSquare(str(tmp_path), place="good", bad="stale")
    cluster.pool.start = lambda left_out: good if "bad" in left_out else cluster.start(left_out)
    with cluster.pool as pool, pytest.raises(UserError) as caught:
        run(pool, {})
    kept = "then run the same command again (finished work is kept)"
    assert str(caught.value) == (
        "no node can evaluate: "
        f"node 10.0.0.1: /cache: No space left on device; free some space, {kept}; "
        f"node 10.0.0.2: /data: Stale file handle; mount it anew, {kept}"
    )


def test_the_very_first_evaluations_may_hang(make_pool, caplog, monkeypatch):
    monkeypatch.setattr(pool_module, "SAY_AFTER_S", 0.05)
    with make_pool(1, limit_s=0.3) as pool:
        found = run(pool, {0: "hangs once"}, range(3))
    assert squares(found) == {0: 0, 1: 1, 2: 4} and found[0].attempt == 2
    said = "an evaluation has no result yet after 0 s on node the only node; after 0 s it is taken"
    assert any(said in message for message in caplog.messages)
    assert any(
        "no result within 0 s; if that is no hang, raise compute.time_limit_s" in message
        for message in caplog.messages
    )


def test_a_pool_that_has_no_evaluator_yet_says_so(make_pool, monkeypatch, caplog):
    monkeypatch.setattr(pool_module, "WARN_AFTER_S", 0.1)
    begin = threading.Event()
    monkeypatch.setattr(ThreadSquare, "ready", lambda self: begin.wait(10))
    threading.Timer(0.4, begin.set).start()
    with make_pool() as pool:
        run(pool, {})
    warning = "no evaluator is running yet: waiting for resources, or still loading"
    assert caplog.messages.count(warning) == 1


@pytest.mark.ray
def test_an_actor_that_dies_or_raises_costs_an_attempt(ray_cluster, tmp_path):
    """What the other tests presume of Ray: how it tells that a call raised or its actor died."""

    def start(left_out: Collection[str]) -> Any:
        return RaySquare.remote(str(tmp_path))

    with Pool(start, number=2, max_failures=2) as pool:
        found = run(pool, {1: "raises once", 2: "raises", 3: "dies once", 5: "gives up", 7: "dies"})
        assert pool.num_lost == 4
    errors = {number: each.error for number, each in found.items() if each.failed}
    assert errors.pop(7).startswith("the evaluator crashed 3 times on this architecture: ")
    assert errors == {2: "ValueError: never", 5: "no memory"}
    assert (found[1].attempt, found[3].attempt) == (2, 2)
    right = {number: number**2 for number in range(12) if number not in (2, 5, 7)}
    assert {n: each.fitness for n, each in found.items() if not each.failed} == right


@pytest.mark.ray
def test_tasks_go_to_the_evaluators_that_found_a_place(ray_cluster, tmp_path):
    """One evaluator cannot be placed: the others do everything, and nothing waits for it."""
    started = []

    def start(left_out):
        options = {"resources": {"of no node": 1}} if not started else {}
        started.append(RaySquare.options(**options).remote(str(tmp_path)))
        return started[-1]

    with Pool(start, number=3, max_failures=2) as pool:
        found = run(pool, {})
    assert squares(found) == {number: number**2 for number in range(12)}
    assert len(started) == 3
