"""A pool of Ray actors that never waits for one and never loses a candidate.

Knows nothing of what its actors evaluate. The pool starts as many as there is work for, up
to its number; those that find no room yet are what the autoscaler sees as demand, and those
on nodes that leave are started anew elsewhere. An idle one is ended after a while, so that
its node may leave.
"""

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from nasray.cluster.worker import raise_user_error
from nasray.errors import EvaluationError
from nasray.search.candidate import FAILED, Evaluation

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0  # at stragglers and at what is idle
IDLE_S = 60.0  # then an evaluator without work is ended
# Past so many medians, and so many times what 19 of 20 take (races and studies mix short
# evaluations and long ones), a second evaluator tries, too, if it is free; the first answer
# counts.
STRAGGLER, BEYOND = 4.0, 1.5
FEWEST_FOR_MEDIAN = 5
# Past so many times the longest of late, and at least so long, an evaluation hangs: its
# evaluator is ended, whether or not another one is free to try.
HANGS, HANGS_S = 20.0, 600.0
MOST_STARTS = 20  # in a row that end before the evaluator is ready
SAY_AFTER_S = 20.0  # that no evaluator is ready


@dataclass(eq=False)
class Work:
    """One evaluation that was asked for."""

    key: int
    arguments: tuple[Any, ...]
    lost: int = 0  # evaluators that ended while they were at it
    raised: int = 0  # times that it raised
    seats: list["Seat"] = field(default_factory=list)  # that are at it now

    @property
    def attempt(self) -> int:
        return 1 + self.lost + self.raised


@dataclass(eq=False)
class Seat:
    """One evaluator, from its start to its end."""

    actor: Any
    node: str = ""  # its id, once it is ready
    work: Work | None = None
    since: float = 0.0  # when its work or its idleness began
    ended: bool = False


class Pool:
    """submit() evaluations, and next() returns each as it ends; any number at once.

    `start` starts an actor with the methods ready() -> id of its node, and
    evaluate(attempt, *arguments) -> Evaluation; `end` ends one. An evaluation that raises is
    tried again, `max_failures` times, then returned as failed; so is one during which more
    evaluators end than that. Nodes that leave do not count. Use as a context manager.
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
        self.waiting: deque[Work] = deque()
        self.running: set[Work] = set()
        self.seats: set[Seat] = set()
        self.idle: list[Seat] = []
        self.events: queue.SimpleQueue[tuple[Seat, Work | None, Any]] = queue.SimpleQueue()
        self.done: deque[tuple[int, Evaluation]] = deque()
        self.durations: deque[float] = deque(maxlen=200)  # s, of evaluations
        self.num_lost = self.failed_starts = 0
        self.any_ready = False
        self.look_at = 0.0
        self.say_at: float | None = None

    def __enter__(self) -> "Pool":
        self.say_at = time.monotonic() + SAY_AFTER_S
        return self

    def __exit__(self, *exc_info: object) -> None:
        for seat in list(self.seats):
            self._end(seat)

    def submit(self, key: int, *arguments: Any) -> None:
        """Ask for an evaluation; `key` comes back with it."""
        self.waiting.append(Work(key, arguments))

    def next(self) -> tuple[int, Evaluation]:
        """Wait until an evaluation ends, and return it with its key."""
        while True:
            # All that has happened, before the caller gets busy with one result.
            while not self.events.empty():
                self._handle(*self.events.get())
            self._assign()
            if self.done:
                return self.done.popleft()
            if time.monotonic() > self.look_at:
                self._look_round()
                self.look_at = time.monotonic() + LOOK_EVERY_S
            with suppress(queue.Empty):
                self._handle(*self.events.get(timeout=LOOK_EVERY_S))

    def _assign(self) -> None:
        """Give waiting work to idle evaluators, and start those that are missing."""
        while self.waiting and self.idle:
            self._give(self.waiting.popleft(), self.idle.pop())
        at_work = sum(len(work.seats) for work in self.running)
        wanted = min(self.number, len(self.waiting) + at_work)
        while len(self.seats) < wanted:
            seat = Seat(self.start())
            self.seats.add(seat)
            self._follow(seat, None, seat.actor.ready.remote())

    def _give(self, work: Work, seat: Seat) -> None:
        seat.work, seat.since = work, time.monotonic()
        work.seats.append(seat)
        self.running.add(work)
        self._follow(seat, work, seat.actor.evaluate.remote(work.attempt, *work.arguments))

    def _follow(self, seat: Seat, work: Work | None, result: ray.ObjectRef) -> None:
        """Have the end of a call of `seat` put among the events, by a thread of Ray's."""
        result.future().add_done_callback(lambda future: self.events.put((seat, work, future)))

    def _handle(self, seat: Seat, work: Work | None, future: Any) -> None:
        if seat.ended:  # by us: its work is done, or given back
            return
        error = future.exception()
        if work is None:
            self._handle_start(seat, future, error)
        elif error is None:
            self._finish(work, future.result(), seat)
        elif isinstance(error, RayTaskError):  # it raised
            raise_user_error(error)
            self._leave(work, seat)
            self._free(seat)
            work.raised += 1
            # Attempts would change nothing where the evaluator itself has given up.
            given_up = isinstance(error.cause, EvaluationError)
            if work.raised > self.max_failures or given_up:
                self._fail(work, str(error.cause) if given_up else _last_line(error))
            else:
                logger.warning("an evaluation failed (%s); trying again", _last_line(error))
                self._again(work)
        elif isinstance(error, RayError):  # the process or its node is gone
            # A node that left says nothing against what was evaluated there.
            self._lose(seat, work, _last_line(error), is_works=not _is_node_lost(seat.node, error))
        else:
            raise error

    def _handle_start(self, seat: Seat, future: Any, error: BaseException | None) -> None:
        if error is None:
            self.failed_starts, self.any_ready, self.say_at = 0, True, None
            seat.node = future.result()
            self._free(seat)
            return
        raise_user_error(error)
        self._end(seat)
        self.failed_starts += 1
        hopeless = isinstance(error, RayTaskError) and not self.any_ready
        if hopeless or self.failed_starts >= max(MOST_STARTS, 2 * self.number):
            raise EvaluationError(f"evaluators cannot start: {_last_line(error)}") from error

    def _finish(self, work: Work, evaluation: Evaluation, seat: Seat) -> None:
        self.durations.append(time.monotonic() - seat.since)
        self._leave(work, seat)
        self._free(seat)
        for slower in list(work.seats):  # something is wrong with it or its node
            self._leave(work, slower)
            self._end(slower)
        self.running.discard(work)
        self.done.append((work.key, evaluation))

    def _lose(self, seat: Seat, work: Work, reason: str, *, is_works: bool) -> None:
        """Give up an evaluator; `is_works`: what it was at may be to blame."""
        self._leave(work, seat)
        self._end(seat)
        self.num_lost += 1
        # Its other evaluators without work may be gone as well; nothing would tell us.
        for neighbour in [each for each in self.idle if each.node == seat.node]:
            self._end(neighbour)
        work.lost += is_works
        if work.lost > self.max_failures:
            self._fail(work, f"{work.lost} evaluators in a row died of it: {reason}")
            return
        logger.warning("an evaluator was lost; its candidate goes to the next free one")
        self._again(work)

    def _again(self, work: Work) -> None:
        if not work.seats:
            self.running.discard(work)
            self.waiting.appendleft(work)

    def _fail(self, work: Work, reason: str) -> None:
        if work.seats:  # another evaluator is still at it
            return
        self.running.discard(work)
        logger.warning("an architecture could not be evaluated: %s", reason)
        self.done.append(
            (work.key, Evaluation(fitness=FAILED, error=reason, attempt=work.attempt - 1))
        )

    def _leave(self, work: Work, seat: Seat) -> None:
        work.seats.remove(seat)
        seat.work = None

    def _free(self, seat: Seat) -> None:
        seat.since = time.monotonic()
        self.idle.append(seat)

    def _end(self, seat: Seat) -> None:
        seat.ended = True
        self.seats.discard(seat)
        if seat in self.idle:
            self.idle.remove(seat)
        self.end(seat.actor)

    def _look_round(self) -> None:
        """End what hangs and what has long been idle; have stragglers tried a second time."""
        now = time.monotonic()
        if self.say_at is not None and now > self.say_at:
            logger.warning("no evaluator is ready yet: none has a place, or they start slowly")
            self.say_at = now + 6 * SAY_AFTER_S
        if len(self.durations) >= FEWEST_FOR_MEDIAN:
            hangs = max(HANGS_S, HANGS * max(self.durations))
            for work in list(self.running):
                for seat in [seat for seat in work.seats if now - seat.since > hangs]:
                    self._lose(seat, work, f"no result within {hangs:.0f} s", is_works=True)
        if self.waiting:
            return
        if len(self.durations) >= FEWEST_FOR_MEDIAN:
            long = quantiles(self.durations, n=20, method="inclusive")[-1]
            usual = max(STRAGGLER * median(self.durations), BEYOND * long)
            for work in list(self.running):
                if self.idle and now - work.seats[-1].since > usual + LOOK_EVERY_S:
                    logger.warning("an evaluation is slow; another evaluator tries it, too")
                    if len(work.seats) > 1:  # that one has been slow for longer still
                        self._end(work.seats[0])
                        self._leave(work, work.seats[0])
                    self._give(work, self.idle.pop())
        for seat in [seat for seat in self.idle if now - seat.since > IDLE_S]:
            self._end(seat)


def _is_node_lost(node: str, error: BaseException) -> bool:
    """Whether an evaluator ended because its node did; the cluster may learn of that later."""
    if isinstance(error, ActorUnavailableError) or "node has died" in str(error):
        return True
    return not any(each["NodeID"] == node and each["Alive"] for each in ray.nodes())


def _last_line(error: BaseException) -> str:
    return str(error).strip().rsplit("\n", 1)[-1]
