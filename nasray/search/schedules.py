"""Gives an algorithm that breeds whole generations what it wants: all results at once."""

from typing import Protocol

from nasray.search.candidate import Candidate, Rivals
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
