"""Architectures to be evaluated in the first generation, whatever the algorithm asks for."""

from collections.abc import Sequence

from nasray.search.candidate import Candidate
from nasray.search.driver import Algorithm
from nasray.spaces.space import Architecture


class WithFirst:
    """Asks as `algorithm` does, and in the first generation for the architectures `first`, too.

    For algorithms that ask for whole generations. A resumed search may tell recorded generations
    before it asks for any; then the first one is among them.
    """

    def __init__(self, algorithm: Algorithm, first: Sequence[Architecture]) -> None:
        self.algorithm, self.first = algorithm, list(dict.fromkeys(first))
        self.begun = False

    def ask(self) -> list[Architecture]:
        asked = list(self.algorithm.ask())
        if self.begun:
            return [arch for arch in asked if arch not in self.first]
        self.begun = True
        return asked + [arch for arch in self.first if arch not in asked]

    def tell(self, candidates: list[Candidate]) -> None:
        self.begun = True
        self.algorithm.tell(candidates)
