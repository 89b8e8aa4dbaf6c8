"""Architectures to be evaluated in the first generation, whatever the algorithm asks for."""

from collections.abc import Sequence

import numpy as np

from nasray.search.candidate import Candidate
from nasray.search.driver import Algorithm
from nasray.search.limits import Limits
from nasray.spaces.population import as_population
from nasray.spaces.space import Architecture


class WithFirst:
    """Asks as `algorithm` does, and in the first generation for the architectures `first`, too.

    So it does for one within all `limits` at once if no other in that generation is: else a limit
    that is answered by itself could have no answer. At most `most` are asked for in all.

    For algorithms that ask for whole generations. A resumed search may tell recorded generations
    before it asks for any; then the first one is among them.
    """

    def __init__(
        self, algorithm: Algorithm, first: Sequence[Architecture], limits: Limits, most: int
    ) -> None:
        self.algorithm, self.first = algorithm, list(dict.fromkeys(first))
        self.limits, self.most = limits, most
        self.num_told = 0

    def ask(self) -> list[Architecture]:
        asked = list(self.algorithm.ask())
        if self.num_told:
            new = [arch for arch in asked if arch not in self.first]
            return new[: self.most - self.num_told]
        if not len(self.limits.feasible(as_population(self._with_first(asked)))):
            # Drawn as by the check before the search, which found one.
            self.first += self.limits.draw(1, np.random.default_rng(0), set())
        return self._with_first(asked)

    def tell(self, candidates: list[Candidate]) -> None:
        self.num_told += len(candidates)
        self.algorithm.tell(candidates)

    def _with_first(self, asked: list[Architecture]) -> list[Architecture]:
        """Add those of the first that are missing; the last of the others leave room for them."""
        others = [arch for arch in asked if arch not in self.first]
        left_out = others[max(0, self.most - len(self.first)) :]
        kept = [arch for arch in asked if arch not in left_out]
        return kept + [arch for arch in self.first if arch not in asked]
