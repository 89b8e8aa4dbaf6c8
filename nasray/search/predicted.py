"""Searches on arrays, and how they run on predictions instead of evaluations.

The same ask() and tell() as a search on a pool, on hundreds of thousands of candidates a second.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from nasray.search.evaluated import Evaluated
from nasray.search.limits import CostOf
from nasray.spaces.space import Population

# Begins to predict the fitness of a population; calling the result waits for it: (n,).
Begin = Callable[[Population], Callable[[], np.ndarray]]


class PopulationSearch(Protocol):
    """Like search.driver.Algorithm on arrays, but may ask for an architecture twice."""

    def ask(self) -> Population:
        """The next generation in canonical form: int8 (n, genes)."""

    def tell(self, evaluated: Evaluated) -> None:
        """Take the numbers of any architectures; a fitness of -inf marks infeasible ones."""


def search_predicted(
    search: PopulationSearch, cost_of: CostOf, begin: Begin, *, lag: int = 1
) -> Iterator[None]:
    """Search by predictions without end; yields after each generation.

    With a lag of 2 the next generation is made while one is predicted.
    """
    under_way: deque[tuple[Population, Callable[[], np.ndarray]]] = deque()
    while True:
        while len(under_way) < lag:
            population = search.ask()
            under_way.append((population, begin(population)))
        population, wait = under_way.popleft()
        search.tell(Evaluated(population, cost_of(population), wait()))
        yield
