"""The search loop: ask, evaluate, record, tell. The same for an actor pool or a test's lambda.

Evaluations finish in any order; an algorithm is told of them in the order in which it asked,
so neither the number of evaluators nor their luck reaches it. Knows no network and no
cluster.
"""

from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from nasray.errors import EvaluationError, UserError
from nasray.search.candidate import Candidate, Evaluation
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.search.racing import Rivals
from nasray.spaces.space import Architecture

# So many evaluations in a row that fail end a search: something else than they is wrong.
HOPELESS_AT_FIRST, HOPELESS = 5, 20


class Algorithm(Protocol):
    """What decides which architectures are evaluated next."""

    @property
    def generation(self) -> int:
        """The generation that belongs to what ask() returned last, from 0."""

    @property
    def rivals(self) -> Rivals | None:
        """What ask()'s latest must beat to be of use, if anything."""

    def ask(self) -> list[Architecture]:
        """All that can be bred from what it has been told, of one generation; maybe nothing."""

    def tell(self, candidate: Candidate) -> None:
        """Learn one result; they come in the order in which they were asked for."""

    def retell(self, generation: list[Candidate]) -> bool:
        """Learn a recorded generation without being asked for it; False: ask() must breed it."""


class Pool(Protocol):
    """What evaluates: takes as much as is submitted, and returns it in any order."""

    def submit(self, position: int, arch: Architecture, rivals: Rivals | None) -> None: ...

    def next(self) -> tuple[int, Evaluation]:
        """Wait for the next evaluation to end, and return it with its position."""


class Direct:
    """A pool that is a function, evaluated in this process when its result is waited for."""

    def __init__(self, evaluate: Callable[[Architecture], Evaluation]) -> None:
        self.evaluate = evaluate
        self.waiting: deque[tuple[int, Architecture]] = deque()

    def submit(self, position: int, arch: Architecture, rivals: Rivals | None = None) -> None:
        self.waiting.append((position, arch))

    def next(self) -> tuple[int, Evaluation]:
        position, arch = self.waiting.popleft()
        return position, self.evaluate(arch)


def run_search(
    algorithm: Algorithm,
    limits: Limits,
    pool: Pool,
    history: History,
    *,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> list[Candidate]:
    """Search until `algorithm` asks for nothing more; return all candidates of `history`.

    What `history` holds is not evaluated again. A candidate that cannot be evaluated is
    recorded as failed, and the search goes on.
    """
    return _Search(algorithm, limits, pool, history, show).run()


class _Search:
    """One run of the loop; positions number the candidates in the order asked for."""

    def __init__(
        self,
        algorithm: Algorithm,
        limits: Limits,
        pool: Pool,
        history: History,
        show: Callable[[int, str], None],
    ) -> None:
        self.algorithm, self.limits, self.pool, self.history = algorithm, limits, pool, history
        self.show = show
        self.recorded = history.candidates
        self.asked: list[Architecture] = []
        self.generation_of: list[int] = []
        self.sizes: Counter[int] = Counter()  # of the generations
        self.found: dict[int, Evaluation] = {}  # known, but not yet told
        self.open: list[Candidate] = []  # told, of generations not yet on record
        self.told = self.running = self.num_failed = 0
        self.any_succeeded = False
        self.failing: list[int] = []  # positions of the latest told, which all failed
        self.best = 0.0

    def run(self) -> list[Candidate]:
        for generation in self.history.generations:
            if not self.algorithm.retell(generation):
                break
            self._note(generation)
        while True:
            self._ask()
            if self._tell():
                continue
            if not self.running:
                break
            position, evaluation = self.pool.next()
            self.running -= 1
            self.history.record(position, self.asked[position], evaluation)
            self.found[position] = evaluation
        self._record_complete(until=len(self.generation_of))
        return self.history.candidates

    def _ask(self) -> None:
        """Submit what the algorithm asks for, unless it is known."""
        while archs := self.algorithm.ask():
            self._record_complete(until=self.algorithm.generation)
            for arch in archs:
                position = len(self.asked)
                self.asked.append(arch)
                self.generation_of.append(self.algorithm.generation)
                self.sizes[self.algorithm.generation] += 1
                known = self._known(position, arch)
                if known is not None:
                    self.found[position] = known
                else:
                    self.pool.submit(position, arch, self.algorithm.rivals)
                    self.running += 1

    def _known(self, position: int, arch: Architecture) -> Evaluation | None:
        """What the history says of a candidate."""
        if position >= len(self.recorded):
            return self.history.find(position, arch)
        if self.recorded[position].arch != arch:
            raise UserError(
                f"{self.history.folder} was recorded with another job or another version of "
                "nasray; use a new run directory"
            )
        return self.recorded[position]

    def _tell(self) -> bool:
        """Tell one result, if the next in order is known."""
        if self.told not in self.found:
            return False
        evaluation, arch = self.found.pop(self.told), self.asked[self.told]
        [costs] = self.limits.costs([arch])
        number = self.generation_of[self.told]
        candidate = Candidate.of(evaluation, arch=arch, costs=costs, generation=number)
        self._count(candidate)
        self._check_hope(candidate)
        self.open.append(candidate)
        self.algorithm.tell(candidate)
        return True

    def _record_complete(self, until: int) -> None:
        """Put generations below `until` on record if all of them is told, oldest first."""
        while self.open and (number := self.open[0].generation) < until:
            size = self.sizes[number]
            born, rest = self.open[:size], self.open[size:]
            if len(born) < size:
                return
            if number >= len(self.history):
                self.history.append(born, self.limits.space.to_json)
            self.open = rest

    def _note(self, generation: list[Candidate]) -> None:
        """Take a recorded generation for asked and told."""
        for candidate in generation:
            self.asked.append(candidate.arch)
            self.generation_of.append(candidate.generation)
            self.sizes[candidate.generation] += 1
            self._count(candidate)

    def _count(self, candidate: Candidate) -> None:
        self.failing = [*self.failing, self.told] if candidate.failed else []
        self.any_succeeded |= not candidate.failed
        self.told += 1
        self.num_failed += candidate.failed
        self.best = max(self.best, candidate.fitness)
        failed = f", {self.num_failed} failed" if self.num_failed else ""
        number = candidate.generation
        self.show(
            number + (self.told == len(self.asked)),
            f"generation {number + 1}, {self.told} evaluated{failed}, best {self.best:.1%}",
        )

    def _check_hope(self, latest: Candidate) -> None:
        """End a search in which everything fails, before hours are lost; forget the failures."""
        if len(self.failing) == (HOPELESS if self.any_succeeded else HOPELESS_AT_FIRST):
            self.history.forget(self.failing)
            which = "latest" if self.any_succeeded else "first"
            raise EvaluationError(
                f"none of the {which} {len(self.failing)} architectures could be evaluated; the "
                f"last: {latest.error}"
            )
