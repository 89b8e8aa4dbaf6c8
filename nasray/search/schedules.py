"""Two schedules of a search: whole generations, or a fixed lag.

Generations gives an algorithm that breeds whole generations what it wants: all results at once.

Lagged searches without generations: nobody waits, and no evaluator's speed decides anything.
Candidate n is bred from the results of candidates 0 ... n - lag alone, in the order in which
they were asked for; so `lag` evaluations are under way at any time, and the history is the
same on one evaluator as on `lag`. More evaluators than that would have nothing to do.
"""

from collections import deque
from typing import Protocol

from nasray.search.candidate import Candidate
from nasray.search.racing import Rivals
from nasray.spaces.space import Architecture


class Breeder(Protocol):
    """Breeds a generation from all before it."""

    carries_state: bool  # whether ask() depends on earlier calls of ask(), beside what was told

    def ask(self) -> list[Architecture]: ...

    def tell(self, generation: list[Candidate]) -> None:
        """What became of them all, also of those that could not be evaluated."""


class Generations:
    """`number` generations of a breeder, as an algorithm of the driver (driver.py)."""

    def __init__(self, breeder: Breeder, number: int) -> None:
        self.breeder, self.left, self.generation = breeder, number, -1
        self.awaited = 0
        self.born: list[Candidate] = []

    @property
    def rivals(self) -> Rivals | None:
        return getattr(self.breeder, "rivals", None)

    def ask(self) -> list[Architecture]:
        if self.awaited or not self.left:
            return []
        archs = self.breeder.ask()
        # Without any, every feasible architecture has been evaluated.
        self.left = self.left - 1 if archs else 0
        self.generation += 1
        self.awaited = len(archs)
        return archs

    def tell(self, candidate: Candidate) -> None:
        self.born.append(candidate)
        self.awaited -= 1
        if not self.awaited:
            self.breeder.tell(self.born)
            self.born = []

    def retell(self, generation: list[Candidate]) -> bool:
        if self.breeder.carries_state:
            return False
        self.left -= 1
        self.generation += 1
        self.breeder.tell(generation)
        return True


class OneByOneBreeder(Protocol):
    """Breeds one candidate at a time."""

    @property
    def rivals(self) -> Rivals | None: ...

    def breed(self) -> Architecture | None:
        """A new architecture; None once the space is exhausted."""

    def learn(self, candidate: Candidate) -> None:
        """What became of one of them, also if it could not be evaluated."""


class Lagged:
    """`number` candidates of a breeder, as an algorithm of the driver (driver.py).

    A generation is `size` candidates, for what is recorded and shown; nothing waits for it.
    """

    def __init__(self, breeder: OneByOneBreeder, *, number: int, size: int, lag: int) -> None:
        self.breeder, self.number, self.size, self.lag = breeder, number, size, lag
        self.bred = 0
        self.ready: deque[tuple[int, Architecture, Rivals | None]] = deque()
        self.generation = 0
        self.rivals: Rivals | None = None
        for _ in range(lag):
            self._breed()

    def ask(self) -> list[Architecture]:
        """The next one, with its generation and its rivals as they were when it was bred."""
        if not self.ready:
            return []
        position, arch, self.rivals = self.ready.popleft()
        self.generation = position // self.size
        return [arch]

    def tell(self, candidate: Candidate) -> None:
        self.breeder.learn(candidate)
        self._breed()

    def retell(self, generation: list[Candidate]) -> bool:
        return False

    def _breed(self) -> None:
        if self.bred == self.number:
            return
        arch = self.breeder.breed()
        if arch is None:
            self.number = self.bred
            return
        self.ready.append((self.bred, arch, self.breeder.rivals))
        self.bred += 1
