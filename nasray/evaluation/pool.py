"""A pool of Ray actors: never waits for one of them, never loses an evaluation.

Independent of what its actors evaluate. The pool starts as many as there are tasks for, up to its
number. Those that no node has resources for yet are what the autoscaler sees as demand, and those
whose node is lost are replaced on others. An idle one is ended after a while, so that the
autoscaler may remove its node.
"""

import logging
import queue
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from nasray.cluster.worker import raise_user_error
from nasray.errors import EvaluationError
from nasray.search.candidate import FAILED, Evaluation

logger = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0  # for stragglers, evaluations that hang, and idle evaluators
IDLE_S = 60.0  # after which an evaluator without a task is ended
# An evaluation that takes longer than both STRAGGLER medians and BEYOND times the 95th percentile
# is given to a second evaluator, if one is free; the first result counts. (Early stopping and
# calibration studies mix short evaluations and long ones, so the median alone says too little.)
# The oldest one, on whose result a search may depend to ask for more, need not wait for a free
# evaluator: it comes next once fewer than AHEAD tasks wait for each that runs.
STRAGGLER, BEYOND, AHEAD = 4.0, 1.5, 3
MIN_DURATIONS = 5  # evaluations before these times are estimated
# An evaluation that takes longer than HANGS times the longest recent one, and than HANGS_S, is
# taken to hang: its evaluator is ended, whether or not another one is free.
HANGS, HANGS_S = 20.0, 600.0
MAX_FAILED_STARTS = 20  # of evaluators, in a row
LONGEST_REASON = 1000  # characters of what an evaluator raised that are recorded
WARN_AFTER_S = 20.0  # without an evaluator that is ready


@dataclass(eq=False)
class Task:
    """One evaluation that was submitted."""

    key: int
    arguments: tuple[Any, ...]
    num_lost: int = 0  # evaluators that ended during it
    num_raised: int = 0  # attempts that raised
    workers: list["Worker"] = field(default_factory=list)  # that run it now, oldest first

    @property
    def attempt(self) -> int:
        """The number of the attempt under way, from 1."""
        return 1 + self.num_lost + self.num_raised


@dataclass(eq=False)
class Worker:
    """One evaluator, from its start to its end."""

    actor: Any
    node: str = ""  # its id, once the evaluator is ready
    since: float = 0.0  # when its task or its idleness began
    ended: bool = False


class Pool:
    """Runs any number of evaluations at once: submit() them, and next() returns each as it ends.

    An evaluation that raises, or whose evaluator ends, is tried again up to `max_failures` times
    and then returned as failed. Lost nodes do not count. Use as a context manager.

    Args:
        start: starts an actor with the methods ready() -> id of its node, and
            evaluate(attempt, *arguments) -> Evaluation.
        number: the most actors at once.
        max_failures: attempts of an evaluation that may fail.
        end: ends an actor.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        *,
        number: int,
        max_failures: int,
        end: Callable[[Any], None] = ray.kill,
    ) -> None:
        self.start, self.end = start, end
        self.number, self.max_failures = number, max_failures
        self.waiting: deque[Task] = deque()
        self.running: set[Task] = set()
        self.overdue: list[tuple[Task, Worker]] = []  # to be tried by a second evaluator
        self.workers: set[Worker] = set()
        self.idle: list[Worker] = []
        self.events: queue.SimpleQueue[tuple[Worker, Task | None, Any]] = queue.SimpleQueue()
        self.done: deque[tuple[int, Evaluation]] = deque()
        self.durations: deque[float] = deque(maxlen=200)  # in seconds, of the latest evaluations
        self.num_lost = self.failed_starts = 0
        self.any_ready = False
        self.check_at = 0.0
        self.warn_at: float | None = None

    def __enter__(self) -> Self:
        self.warn_at = time.monotonic() + WARN_AFTER_S
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in list(self.workers):
            self._end(worker)

    def submit(self, key: int, *arguments: Any) -> None:
        """Ask for an evaluation; next() returns it with `key`."""
        self.waiting.append(Task(key, arguments))

    def next(self) -> tuple[int, Evaluation]:
        """Wait until an evaluation ends, and return its key and its result.

        Raises:
            UserError: evaluators cannot start, or fail, for a mistake of the user's.
            EvaluationError: evaluators cannot start for another reason.
        """
        while True:
            # All events so far, before the caller spends time on one result.
            while not self.events.empty():
                self._handle(*self.events.get())
            if time.monotonic() > self.check_at:
                self._check_times()
                self.check_at = time.monotonic() + CHECK_EVERY_S
            self._assign()
            if self.done:
                return self.done.popleft()
            with suppress(queue.Empty):
                self._handle(*self.events.get(timeout=CHECK_EVERY_S))

    def _assign(self) -> None:
        """Give stragglers and waiting tasks to idle evaluators; start evaluators for the others."""
        while self.overdue and self.idle:
            self._overtake(*self.overdue.pop(0))
        while self.waiting and self.idle:
            self._give(self.waiting.popleft(), self.idle.pop())
        busy = sum(len(task.workers) for task in self.running)
        wanted = min(self.number, len(self.waiting) + busy)
        while len(self.workers) < wanted:
            worker = Worker(self.start())
            self.workers.add(worker)
            self._watch(worker, None, worker.actor.ready.remote())

    def _give(self, task: Task, worker: Worker) -> None:
        worker.since = time.monotonic()
        task.workers.append(worker)
        self.running.add(task)
        self._watch(worker, task, worker.actor.evaluate.remote(task.attempt, *task.arguments))

    def _overtake(self, task: Task, slow: Worker) -> None:
        """Give a task to a second evaluator, unless `slow` has ended it meanwhile."""
        if task.workers[-1:] != [slow]:
            return
        logger.warning("an evaluation is slow; a second evaluator tries it, too")
        if len(task.workers) > 1:  # the first has been slow for even longer
            self._end(task.workers[0])
            task.workers.remove(task.workers[0])
        self._give(task, self.idle.pop())

    def _watch(self, worker: Worker, task: Task | None, result: ray.ObjectRef) -> None:
        """Put the end of a call of `worker` into the queue of events, in a thread of Ray's."""
        result.future().add_done_callback(lambda future: self.events.put((worker, task, future)))

    def _handle(self, worker: Worker, task: Task | None, future: Any) -> None:
        if worker.ended:  # by this pool, which has dealt with its task
            return
        error = future.exception()
        if task is None:
            self._handle_start(worker, future, error)
        elif error is None:
            self._finish(task, future.result(), worker)
        elif isinstance(error, RayTaskError):  # it raised
            raise_user_error(error)
            task.workers.remove(worker)
            self._free(worker)
            task.num_raised += 1
            # The evaluator itself says that another attempt would fail, too.
            given_up = isinstance(error.cause, EvaluationError)
            if task.num_raised > self.max_failures or given_up:
                self._fail(task, str(error.cause) if given_up else _in_one_line(error))
            else:
                logger.warning("an evaluation failed (%s); trying again", _in_one_line(error))
                self._retry(task)
        elif isinstance(error, RayError):  # its process or its node is gone
            # A lost node says nothing against the architecture that was evaluated there.
            counts = not _is_node_lost(worker.node, error)
            self._lose(worker, task, _in_one_line(error), counts=counts)
        else:
            raise error

    def _handle_start(self, worker: Worker, future: Any, error: BaseException | None) -> None:
        if error is None:
            self.failed_starts, self.any_ready, self.warn_at = 0, True, None
            worker.node = future.result()
            self._free(worker)
            return
        raise_user_error(error)
        self._end(worker)
        self.failed_starts += 1
        hopeless = isinstance(error, RayTaskError) and not self.any_ready
        if hopeless or self.failed_starts >= max(MAX_FAILED_STARTS, 2 * self.number):
            raise EvaluationError(f"evaluators cannot start: {_in_one_line(error)}") from error

    def _finish(self, task: Task, evaluation: Evaluation, worker: Worker) -> None:
        self.durations.append(time.monotonic() - worker.since)
        task.workers.remove(worker)
        self._free(worker)
        for slower in list(task.workers):  # something is wrong with them or their nodes
            task.workers.remove(slower)
            self._end(slower)
        self.running.discard(task)
        self.done.append((task.key, evaluation))

    def _lose(self, worker: Worker, task: Task, reason: str, *, counts: bool) -> None:
        """Give up an evaluator; if it `counts`, its task may be the cause."""
        task.workers.remove(worker)
        self._end(worker)
        self.num_lost += 1
        # Idle evaluators on the same node may be gone as well, and no call of theirs would fail.
        for neighbour in [each for each in self.idle if each.node == worker.node]:
            self._end(neighbour)
        task.num_lost += counts
        if task.num_lost > self.max_failures:
            self._fail(
                task, f"the evaluator crashed {task.num_lost} times on this architecture: {reason}"
            )
            return
        logger.warning("an evaluator was lost; its architecture goes to the next free one")
        self._retry(task)

    def _retry(self, task: Task) -> None:
        if not task.workers:
            self.running.discard(task)
            self.waiting.appendleft(task)

    def _fail(self, task: Task, reason: str) -> None:
        if task.workers:  # another evaluator still runs it
            return
        self.running.discard(task)
        logger.warning("an architecture could not be evaluated: %s", reason)
        self.done.append(
            (task.key, Evaluation(fitness=FAILED, error=reason, attempt=task.attempt - 1))
        )

    def _free(self, worker: Worker) -> None:
        worker.since = time.monotonic()
        self.idle.append(worker)

    def _end(self, worker: Worker) -> None:
        worker.ended = True
        self.workers.discard(worker)
        if worker in self.idle:
            self.idle.remove(worker)
        self.end(worker.actor)

    def _check_times(self) -> None:
        """End evaluators that hang or have long been idle; note which tasks are stragglers."""
        now = time.monotonic()
        if self.warn_at is not None and now > self.warn_at:
            logger.warning("no evaluator is running yet: waiting for resources, or still loading")
            self.warn_at = now + 6 * WARN_AFTER_S
        if len(self.durations) >= MIN_DURATIONS:
            hangs = max(HANGS_S, HANGS * max(self.durations))
            for task in list(self.running):
                for worker in [worker for worker in task.workers if now - worker.since > hangs]:
                    self._lose(worker, task, f"no result within {hangs:.0f} s", counts=True)
        self.overdue = self._stragglers(now)
        if self.waiting:
            return
        for worker in [worker for worker in self.idle if now - worker.since > IDLE_S]:
            self._end(worker)

    def _stragglers(self, now: float) -> list[tuple[Task, Worker]]:
        """The tasks that should be tried by a second evaluator, with their latest ones."""
        tasks = sorted(self.running, key=lambda task: task.key)
        if self.waiting:
            tasks = tasks[:1] if len(self.waiting) < AHEAD * len(tasks) else []
        if not tasks or len(self.durations) < MIN_DURATIONS:
            return []
        percentile_95 = quantiles(self.durations, n=20, method="inclusive")[-1]
        most = max(STRAGGLER * median(self.durations), BEYOND * percentile_95) + CHECK_EVERY_S
        latest = [(task, task.workers[-1]) for task in tasks]
        return [(task, worker) for task, worker in latest if now - worker.since > most]


def _is_node_lost(node: str, error: BaseException) -> bool:
    """Whether an evaluator ended because its node did, which the cluster may learn later."""
    if isinstance(error, ActorUnavailableError) or "node has died" in str(error):
        return True
    return not any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())


def _in_one_line(error: BaseException) -> str:
    """What an actor raised, as "ValueError: message"; of an error of Ray's, its last line."""
    cause = error.cause if isinstance(error, RayTaskError) else None
    if not isinstance(cause, BaseException) or isinstance(cause, RayError):
        return str(error).strip().rsplit("\n", 1)[-1]
    # All lines: the last one of a message of torch's is often advice, and the same for any error.
    lines = traceback.format_exception_only(cause)[0].splitlines()
    return " ".join(line.strip() for line in lines if line.strip())[:LONGEST_REASON]
