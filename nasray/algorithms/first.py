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
        self.algorithm, self.first = algorithm, list(first)

    def ask(self) -> list[Architecture]:
        first, self.first = self.first, []
        asked = list(self.algorithm.ask())
        return asked + [arch for arch in dict.fromkeys(first) if arch not in asked]

    def tell(self, candidates: list[Candidate]) -> None:
        self.first = []
        self.algorithm.tell(candidates)
