"""The search loop: ask, evaluate, record, tell. The same for an actor pool or a test's lambda.

Evaluations finish in any order; an algorithm is told of them in the order in which it asked, so
its history depends neither on the number of evaluators nor on their speed. Knows no network and
no cluster.
"""

import json
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from nasray.errors import EvaluationError, UserError
from nasray.search.candidate import FAILED, Candidate, Evaluation
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.search.racing import EarlyStopping, StoppingRule
from nasray.search.schedules import Schedule
from nasray.search.scores import FITNESS, Fitness
from nasray.spaces.space import Architecture

# As many failed evaluations in a row end a search: the cause is not the architectures.
MAX_FAILED_AT_FIRST, MAX_FAILED = 5, 20


class Algorithm(Protocol):
    """Decides which architectures are evaluated next, from its seed and what it was told alone."""

    def ask(self) -> list[Architecture]:
        """New architectures: a generation, or one; none once the space is exhausted."""

    def tell(self, candidates: list[Candidate]) -> None:
        """Take the results of the oldest open ask(), in its order, failed ones among them."""


class Pool(Protocol):
    """Evaluates any number of architectures at once."""

    def submit(self, position: int, arch: Architecture, rule: StoppingRule | None) -> None:
        """Begin to evaluate `arch`; stop early where `rule` says so."""

    def next(self) -> tuple[int, Evaluation]:
        """Wait for any evaluation to end; return its position and its result."""


class Direct:
    """A pool that is a function, evaluated in this process when its result is waited for."""

    def __init__(self, evaluate: Callable[[Architecture], Evaluation]) -> None:
        self.evaluate = evaluate
        self.waiting: deque[tuple[int, Architecture]] = deque()

    def submit(self, position: int, arch: Architecture, rule: StoppingRule | None = None) -> None:
        self.waiting.append((position, arch))

    def next(self) -> tuple[int, Evaluation]:
        position, arch = self.waiting.popleft()
        return position, self.evaluate(arch)


def run_search(
    algorithm: Algorithm,
    schedule: Schedule,
    limits: Limits,
    pool: Pool,
    history: History,
    *,
    early_stopping: EarlyStopping | None = None,
    show: Callable[[int, str], None] = lambda done, text: None,
    tell_best: Callable[[float], None] = lambda best: None,
    fitness: Fitness = FITNESS["top1"],
) -> list[Candidate]:
    """Search by `schedule`; return all candidates of `history`, failed ones among them.

    What `history` holds is not evaluated again. A candidate that cannot be evaluated is recorded
    as failed, and the search goes on. `show` is called with generations done and a line of text,
    which tells values of `fitness`, and `tell_best` with the highest fitness so far.

    Raises:
        EvaluationError: the first 5 evaluations failed, or 20 later ones in a row.
        UserError: `history` holds other architectures than `algorithm` asks for.
    """
    told = show, tell_best, fitness
    return _Search(algorithm, schedule, limits, pool, history, early_stopping, *told).run()


class _Search:
    """One run of the loop; positions number the candidates in the order of asking."""

    def __init__(
        self,
        algorithm: Algorithm,
        schedule: Schedule,
        limits: Limits,
        pool: Pool,
        history: History,
        early_stopping: EarlyStopping | None,
        show: Callable[[int, str], None],
        tell_best: Callable[[float], None],
        fitness: Fitness,
    ) -> None:
        self.algorithm, self.schedule = algorithm, schedule
        self.limits, self.pool, self.history = limits, pool, history
        self.early_stopping, self.show, self.tell_best = early_stopping, show, tell_best
        self.recorded = history.candidates
        self.asked: list[tuple[Architecture, int]] = []  # with their generations
        self.costs: dict[int, dict[str, float]] = {}  # of those whose turn has not come
        self.sizes: Counter[int] = Counter()  # of the generations
        self.num_asks = 0
        self.exhausted = False  # ask() returned nothing
        self.open_asks: deque[int] = deque()  # how many architectures each still waits for
        self.untold: list[Candidate] = []  # the results of the oldest open ask
        self.found: dict[int, Evaluation] = {}  # results whose turn has not come
        self.unrecorded: list[Candidate] = []  # of generations that are not complete
        self.done = self.running = self.num_failed = 0
        self.any_succeeded = False
        self.failing: list[int] = []  # positions of the latest results, all of them failures
        self.best, self.fitness = FAILED, fitness

    def run(self) -> list[Candidate]:
        if not self.schedule.repeat_asks:
            self._replay()
        while True:
            self._ask()
            if self._take_next():
                continue
            if not self.running:
                break
            position, evaluation = self.pool.next()
            self.running -= 1
            self.history.record(position, self.asked[position][0], evaluation)
            self.found[position] = evaluation
        self._record_complete(until=self.num_asks)
        return self.history.candidates

    def _replay(self) -> None:
        """Tell the recorded generations without asking for them."""
        for generation in self.history.generations:
            self.algorithm.tell(generation)
            self.num_asks += 1
            for candidate in generation:
                self._note_asked(candidate.arch, candidate.generation)
                self._count(candidate)

    def _ask(self) -> None:
        """Ask as the schedule allows; submit what the history does not hold."""
        schedule = self.schedule
        while len(self.open_asks) < schedule.lag and self.num_asks < schedule.asks:
            archs = [] if self.exhausted else self.algorithm.ask()
            if not archs:
                self.exhausted = True
                return
            generation = self.num_asks // schedule.asks_per_generation
            self._record_complete(until=generation)
            self.num_asks += 1
            self.open_asks.append(len(archs))
            # Before the first result: no evaluator should wait while costs are compiled.
            for arch, costs in zip(archs, self.limits.costs(archs), strict=True):
                position = self._note_asked(arch, generation)
                self.costs[position] = costs
                known = self._known(position, arch)
                if known is not None:
                    self.found[position] = known
                else:
                    stopping = self.early_stopping
                    self.pool.submit(position, arch, stopping.rule(arch) if stopping else None)
                    self.running += 1

    def _note_asked(self, arch: Architecture, generation: int) -> int:
        self.asked.append((arch, generation))
        self.sizes[generation] += 1
        return len(self.asked) - 1

    def _known(self, position: int, arch: Architecture) -> Evaluation | None:
        """The recorded evaluation of a candidate, if there is one."""
        if position >= len(self.recorded):
            return self.history.find(position, arch)
        if self.recorded[position].arch != arch:
            raise UserError(
                f"{self.history.folder} was recorded with another job or another version of "
                "nasray; use a new run directory"
            )
        return self.recorded[position]

    def _take_next(self) -> bool:
        """Take the next result in the order of asking, if known; tell it with those of its ask."""
        if self.done not in self.found:
            return False
        evaluation, (arch, generation) = self.found.pop(self.done), self.asked[self.done]
        costs = self.costs.pop(self.done)
        candidate = Candidate.of(evaluation, arch=arch, costs=costs, generation=generation)
        self._count(candidate)
        self._check_failures(candidate)
        self.unrecorded.append(candidate)
        self.untold.append(candidate)
        if len(self.untold) == self.open_asks[0]:
            self.open_asks.popleft()
            told, self.untold = self.untold, []
            self.algorithm.tell(told)
            if self.early_stopping:
                self.early_stopping.tell(told)
        return True

    def _record_complete(self, until: int) -> None:
        """Record the generations below `until` of which all results are known, oldest first."""
        while self.unrecorded and (number := self.unrecorded[0].generation) < until:
            size = self.sizes[number]
            generation, rest = self.unrecorded[:size], self.unrecorded[size:]
            if len(generation) < size:
                return
            if number >= len(self.history):
                self.history.append(generation, self.limits.space.to_json)
            self.unrecorded = rest

    def _count(self, candidate: Candidate) -> None:
        self.failing = [*self.failing, self.done] if candidate.failed else []
        self.any_succeeded |= not candidate.failed
        self.done += 1
        self.num_failed += candidate.failed
        self.best = max(self.best, candidate.fitness)
        if self.best > FAILED:
            self.tell_best(self.best)
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        number, best = candidate.generation, self.fitness.text(self.best)
        self.show(
            number + (self.done == len(self.asked)),
            f"generation {number + 1}, {self.done} evaluated{failed}, best {best}",
        )

    def _check_failures(self, latest: Candidate) -> None:
        """End a search in which everything fails; forget the failures, so that it can resume."""
        if len(self.failing) == (MAX_FAILED if self.any_succeeded else MAX_FAILED_AT_FIRST):
            self.history.forget(self.failing)
            which = "latest" if self.any_succeeded else "first"
            raise EvaluationError(
                f"none of the {which} {len(self.failing)} architectures could be evaluated; the "
                f"last, {json.dumps(self.limits.space.to_json(latest.arch))}: {latest.error}"
            )
