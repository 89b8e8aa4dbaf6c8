"""A pool of Ray actors: never waits for one of them, never loses an evaluation.

Independent of what its actors evaluate. The pool starts as many as there are tasks for, up to its
number. Those that no node has resources for yet are what the autoscaler sees as demand, and those
whose node is lost are replaced on others. An idle one is ended after a while, so that the
autoscaler may remove its node. What failed on a node is tried on another one; a node on which
nothing succeeds is left out (nodes.py).
"""

import logging
import queue
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, Self

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from nasray.cluster.metrics import PoolMetrics
from nasray.cluster.placement import node_of_dead, nodes_with_room
from nasray.cluster.worker import user_mistake
from nasray.errors import EvaluationError, UserError
from nasray.evaluation.nodes import Nodes
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
# taken to hang: its evaluator is ended, whether or not another one is free. Before there are
# MIN_DURATIONS, and while an evaluator loads, the limit is the pool's.
HANGS, HANGS_S = 20.0, 600.0
SAY_AFTER_S = 60.0  # of an evaluation or of loading, what is said on screen; then twice as late
MAX_FAILED_STARTS = 20  # of evaluators, in a row
LONGEST_REASON = 1000  # characters of what an evaluator raised that are recorded
WARN_AFTER_S = 20.0  # without an evaluator that is ready
MAX_WAIT_S = 300.0  # for another node, if none works of those that there are
LIMIT_ADVICE = "if that is no hang, raise compute.time_limit_s"


@dataclass(eq=False)
class Task:
    """One evaluation that was submitted."""

    key: int
    arguments: tuple[Any, ...]
    num_lost: int = 0  # evaluators that ended during it
    num_raised: int = 0  # attempts that raised
    workers: list["Worker"] = field(default_factory=list)  # that run it now, oldest first
    failed_on: dict[str, str] = field(default_factory=dict)  # nodes, and how it failed there

    @property
    def attempt(self) -> int:
        """The number of the attempt under way, from 1."""
        return 1 + self.num_lost + self.num_raised


@dataclass(eq=False)
class Worker:
    """One evaluator, from its start to its end."""

    actor: Any
    node: str = ""  # its id, once the evaluator has a place
    since: float = 0.0  # when its loading, its task or its idleness began
    say_at: float = SAY_AFTER_S  # after `since`
    is_ready: bool = False
    num_raised: int = 0  # evaluations in a row
    ended: bool = False


class Pool:
    """Runs any number of evaluations at once: submit() them, and next() returns each as it ends.

    An evaluation that raises, hangs, or whose evaluator ends, is tried again up to `max_failures`
    times and then returned as failed. Lost nodes, and those that are left out, do not count. Use
    as a context manager.

    Args:
        start: starts an actor on none of the nodes that it is given, ids. The actor has the methods
            node() -> id of its node, ready(), which loads what it needs, and
            evaluate(attempt, *arguments) -> Evaluation.
        number: the most actors at once.
        max_failures: attempts of an evaluation that may fail.
        limit_s: seconds after which loading, and the first evaluations, are taken to hang.
        nodes: the addresses, by id, of the nodes on which an actor may be placed.
        end: ends an actor.
        run: whose metrics these are, a name.
    """

    def __init__(
        self,
        start: Callable[[Collection[str]], Any],
        *,
        number: int,
        max_failures: int,
        limit_s: float = 1800.0,
        nodes: Callable[[], dict[str, str]] = nodes_with_room,
        end: Callable[[Any], None] = ray.kill,
        run: str = "",
    ) -> None:
        self.start, self.end = start, end
        self.number, self.max_failures, self.limit_s = number, max_failures, limit_s
        self.nodes = Nodes(nodes)
        self.waiting: deque[Task] = deque()
        self.running: set[Task] = set()
        self.overdue: list[tuple[Task, Worker]] = []  # to be tried by a second evaluator
        self.workers: set[Worker] = set()
        self.idle: list[Worker] = []
        self.events: queue.SimpleQueue[tuple[Worker, Task | str, Any]] = queue.SimpleQueue()
        self.done: deque[tuple[int, Evaluation]] = deque()
        self.durations: deque[float] = deque(maxlen=200)  # in seconds, of the latest evaluations
        self.num_lost = self.failed_starts = 0
        self.metrics = PoolMetrics(run)
        self.check_at = 0.0
        self.none_since, self.warn_at = 0.0, WARN_AFTER_S  # without an evaluator that is ready

    def __enter__(self) -> Self:
        self.none_since = time.monotonic()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for worker in list(self.workers):
            self._end(worker)
        self.metrics.have(starting=0, idle=0, busy=0)

    def submit(self, key: int, *arguments: Any) -> None:
        """Ask for an evaluation; next() returns it with `key`."""
        self.waiting.append(Task(key, arguments))

    def next(self) -> tuple[int, Evaluation]:
        """Wait until an evaluation ends, and return its key and its result.

        Raises:
            UserError: evaluators cannot start, or fail, on any node for a mistake of the user's.
            EvaluationError: evaluators cannot start on any node for another reason.
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
        while self.idle and (pair := self._next_pair()):
            self.waiting.remove(pair[0])
            self.idle.remove(pair[1])
            self._give(*pair)
        busy = sum(len(task.workers) for task in self.running)
        wanted = min(self.number, len(self.waiting) + busy)
        while len(self.workers) < wanted:
            worker = Worker(self.start(self.nodes.left_out.keys()))
            self.workers.add(worker)
            self._watch(worker, "node", worker.actor.node.remote())
            self._watch(worker, "ready", worker.actor.ready.remote())

    def _next_pair(self) -> tuple[Task, Worker] | None:
        """The first task that waits, with an idle evaluator on a node where it has not failed.

        One that has failed wherever there is an evaluator is tried there again.
        """
        for task in self.waiting:
            if worker := self._free_worker(task.failed_on):
                return task, worker
            if all(worker.node in ("", *task.failed_on) for worker in self.workers):
                return task, self.idle[-1]
        return None

    def _free_worker(self, nodes: Collection[str]) -> Worker | None:
        """The idle evaluator that was used last, on none of these nodes."""
        return next((each for each in reversed(self.idle) if each.node not in nodes), None)

    def _give(self, task: Task, worker: Worker) -> None:
        worker.since, worker.say_at = time.monotonic(), SAY_AFTER_S
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
        worker = self._free_worker([slow.node]) or self.idle[-1]
        self.idle.remove(worker)
        self._give(task, worker)

    def _watch(self, worker: Worker, call: Task | str, result: ray.ObjectRef) -> None:
        """Put the end of a call of `worker` into the queue of events, in a thread of Ray's."""
        result.future().add_done_callback(lambda future: self.events.put((worker, call, future)))

    def _handle(self, worker: Worker, call: Task | str, future: Any) -> None:
        if worker.ended:  # by this pool, which has dealt with its task
            return
        error = future.exception()
        if error is not None and not isinstance(error, RayError):
            raise error
        if isinstance(call, str):
            self._handle_start(worker, call, future, error)
        elif error is None:
            self._finish(call, future.result(), worker)
        elif (mistake := user_mistake(error)) is not None:  # of this node, as far as is known
            self._leave_out(worker.node, str(mistake), mistake=True)
        elif isinstance(error, RayTaskError):  # it raised
            self._handle_raised(worker, call, error)
        else:  # its process or its node is gone
            # A lost node says nothing against the architecture that was evaluated there.
            lost = _is_node_lost(worker.node, error)
            away = isinstance(error, ActorUnavailableError)  # that is, one cannot reach its node
            self._lose(worker, call, _in_one_line(error), counts=not (lost or away))
            if away and not lost and self.nodes.fails_on(worker.node, _in_one_line(error)):
                self._end_all_on(worker.node)

    def _handle_raised(self, worker: Worker, task: Task, error: RayTaskError) -> None:
        reason = _in_one_line(error)
        task.workers.remove(worker)
        task.num_raised += 1
        worker.num_raised += 1
        task.failed_on[worker.node] = reason
        if worker.num_raised > 1:  # as after an error of CUDA's, which stays with the process
            self._end(worker)
        else:
            self._free(worker)
        # The evaluator itself says that another attempt would fail, too.
        given_up = isinstance(error.cause, EvaluationError)
        if task.num_raised > self.max_failures or given_up:
            self._fail(task, str(error.cause) if given_up else reason)
        else:
            logger.warning("an evaluation failed (%s); trying again", reason)
            self._retry(task)

    def _handle_start(
        self, worker: Worker, call: str, future: Any, error: BaseException | None
    ) -> None:
        if call == "node" and error is None:
            worker.node, worker.since = future.result(), time.monotonic()
            if worker.node in self.nodes.left_out:  # since it was started
                self._end(worker)
        elif error is None:
            try:
                self.admit(worker.actor, future.result())
            except UserError as refused:
                self._leave_out(worker.node, str(refused), mistake=True)
                return
            self.failed_starts, worker.is_ready, self.warn_at = 0, True, WARN_AFTER_S
            self.nodes.works_on(worker.node, evaluated=False)
            self._free(worker)
        elif isinstance(error, RayTaskError):  # it raised
            mistake = user_mistake(error)
            reason = str(mistake or f"evaluators cannot start: {_in_one_line(error)}")
            self._leave_out(worker.node, reason, mistake=mistake is not None)
        else:
            self._end(worker)
            self.failed_starts += 1
            node, reason = worker.node or node_of_dead(worker.actor), _in_one_line(error)
            if self.failed_starts >= max(MAX_FAILED_STARTS, 2 * self.number):
                raise EvaluationError(f"evaluators cannot start: {reason}") from error
            if not _is_node_lost(node, error) and self.nodes.fails_on(node, reason):
                self._end_all_on(node)

    def admit(self, actor: Any, found: Any) -> None:
        """Take in an actor whose ready() returned `found`; by default, any.

        Raises:
            UserError: its node does not fit the others, and is left out.
        """

    def _leave_out(self, node: str, reason: str, *, mistake: bool = False) -> None:
        """Start nothing on a node any more, and end what is there."""
        if node not in self.nodes.left_out:
            self.nodes.leave_out(node, reason, mistake=mistake)
        self._end_all_on(node)

    def _end_all_on(self, node: str) -> None:
        for worker in [worker for worker in self.workers if worker.node == node]:
            self._end(worker)
            for task in [task for task in self.running if worker in task.workers]:
                task.workers.remove(worker)
                self._retry(task)
        self._check_nodes()

    def _check_nodes(self) -> None:
        """Raise if no node is left that evaluates."""
        if all(worker.node == "" for worker in self.workers):
            waited = time.monotonic() - self.none_since > MAX_WAIT_S
            self.nodes.check(waited=waited)

    def _finish(self, task: Task, evaluation: Evaluation, worker: Worker) -> None:
        self.durations.append(time.monotonic() - worker.since)
        task.workers.remove(worker)
        worker.num_raised = 0
        self._free(worker)
        for slower in list(task.workers):  # something is wrong with them or their nodes
            task.workers.remove(slower)
            self._end(slower)
        self.running.discard(task)
        self.done.append((task.key, evaluation))
        self.metrics.ended("succeeded")
        self.nodes.works_on(worker.node, evaluated=True)
        for node, reason in task.failed_on.items():  # so the architecture is not to blame
            if node != worker.node and self.nodes.fails_on(node, reason):
                self._end_all_on(node)

    def _lose(self, worker: Worker, task: Task, reason: str, *, counts: bool) -> None:
        """Give up an evaluator; if it `counts`, its task may be the cause."""
        task.workers.remove(worker)
        self._end(worker)
        self.num_lost += 1
        self.metrics.lost.inc()
        # Idle evaluators on the same node may be gone as well, and no call of theirs would fail.
        for neighbour in [each for each in self.idle if each.node == worker.node]:
            self._end(neighbour)
        task.num_lost += counts
        if counts:
            task.failed_on[worker.node] = reason
        if task.num_lost > self.max_failures:
            self._fail(
                task, f"the evaluator crashed {task.num_lost} times on this architecture: {reason}"
            )
            return
        logger.warning(
            "an evaluator was lost (%s); its architecture goes to the next free one", reason
        )
        self._retry(task)

    def _retry(self, task: Task) -> None:
        if not task.workers:
            self.running.discard(task)
            self.waiting.appendleft(task)
            self.metrics.repeated.inc()

    def _fail(self, task: Task, reason: str) -> None:
        if task.workers:  # another evaluator still runs it
            return
        self.running.discard(task)
        self.metrics.ended("failed")
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
        self._check_waiting(now)
        starting = sum(not each.is_ready for each in self.workers)
        idle = len(self.idle)
        busy = len(self.workers) - starting - idle
        self.metrics.have(starting=starting, idle=idle, busy=busy)
        loading = [each for each in self.workers if each.node and not each.is_ready]
        for worker in loading:
            if now - worker.since > self.limit_s and not worker.ended:
                reason = f"loading an evaluator took more than {self.limit_s:.0f} s"
                self._leave_out(worker.node, f"{reason}; {LIMIT_ADVICE}", mistake=True)
            else:
                self._say_if_slow(worker, now, "an evaluator is still loading", self.limit_s)
        limit = self.limit_s
        if is_known := len(self.durations) >= MIN_DURATIONS:
            limit = max(min(HANGS_S, limit), HANGS * max(self.durations))
        for task in list(self.running):
            for worker in list(task.workers):
                if now - worker.since > limit:
                    advice = "" if is_known else f"; {LIMIT_ADVICE}"
                    self._lose(worker, task, f"no result within {limit:.0f} s{advice}", counts=True)
                else:
                    self._say_if_slow(worker, now, "an evaluation has no result yet", limit)
        self.overdue = self._stragglers(now)
        if self.waiting:
            return
        for worker in [worker for worker in self.idle if now - worker.since > IDLE_S]:
            self._end(worker)

    def _check_waiting(self, now: float) -> None:
        """Say that no evaluator is ready though something waits for one."""
        if not self.waiting or any(worker.is_ready for worker in self.workers):
            self.none_since = now
            return
        if now - self.none_since > self.warn_at:
            logger.warning("no evaluator is running yet: waiting for resources, or still loading")
            self.warn_at += 6 * WARN_AFTER_S
        self._check_nodes()

    def _say_if_slow(self, worker: Worker, now: float, what: str, limit: float) -> None:
        seconds = now - worker.since
        slow = STRAGGLER * max(self.durations, default=0.0) if worker.is_ready else 0.0
        if seconds > max(worker.say_at, slow):
            worker.say_at = 2 * seconds
            logger.warning(
                "%s after %.0f s on node %s; after %.0f s it is taken to hang",
                what,
                seconds,
                self.nodes.usable().get(worker.node, worker.node[:12]),
                limit,
            )

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
    if "node has died" in str(error):
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
