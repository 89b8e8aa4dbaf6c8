"""What a search under limits on one cost gives, and how it draws: feasible by construction.

Knows no network.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nasray.errors import InfeasibleError
from nasray.spaces.space import Architecture, Population, Space, random_population

Price = Callable[[Population], np.ndarray]  # population (n, genes) -> costs float64 (n,)

MAX_SWEEPS = 50  # over all genes, in the descent to the smallest cost
NUM_STARTS = 16  # of that descent
MAX_DRAWS = 20  # of an architecture that exceeds its limit, each nearer to the smallest


@dataclass(frozen=True)
class Answer:
    """The best architecture found for one limit, with its own numbers."""

    limit: float
    arch: Architecture
    cost: float
    fitness: float


class Within:
    """Draws architectures of one space under limits on one cost."""

    def __init__(self, space: Space, price: Price) -> None:
        self.space, self.price = space, price
        self.smallest, self.smallest_cost = _descend(space, price)

    def check(self, limits: Sequence[float]) -> None:
        """Refuse limits that no architecture is within; say what the smallest one costs."""
        if not len(limits):
            raise InfeasibleError("a search needs one limit or more, got none")
        tightest = min(limits)
        if not tightest >= self.smallest_cost:  # so that NaN is refused, too
            raise InfeasibleError(
                f"a limit of {tightest:.10g} is below the smallest subnet of {self.space.name}, "
                f"{float(self.smallest_cost)!r}; raise it to at least that"
            )

    def draw(self, ceilings: np.ndarray, rng: np.random.Generator) -> Population:
        """Draw one architecture under each of `ceilings`, in canonical form.

        Random ones of all sizes: each takes its own share of its genes from a random
        architecture and the rest from the smallest one, until it is under its ceiling.
        """
        found = np.tile(np.array(self.smallest, dtype=np.int8), (len(ceilings), 1))
        missing = np.arange(len(ceilings))
        share = 1.0
        for _ in range(MAX_DRAWS):
            fresh = random_population(self.space.genes, len(missing), rng)
            rate = share * rng.random((len(missing), 1))
            fresh = np.where(rng.random(fresh.shape) < rate, fresh, found[missing])
            fresh = self.space.canonical(fresh)
            fits = self.price(fresh) <= ceilings[missing]
            found[missing[fits]] = fresh[fits]
            missing = missing[~fits]
            if not len(missing):
                break
            share *= 0.8
        return found  # where nothing random fitted: the smallest


def _descend(space: Space, price: Price) -> tuple[Architecture, float]:
    """The cheapest architecture that lowering one gene after another leads to."""
    genes = space.genes
    first = np.array([[gene.first for gene in genes]], dtype=np.int8)
    random = random_population(genes, NUM_STARTS - 1, np.random.default_rng(0))
    population = np.concatenate((first, random))
    costs = price(population)
    for _ in range(MAX_SWEEPS):
        before = costs
        for column, gene in enumerate(genes):
            for choice in range(gene.first, len(gene.choices)):
                trial = population.copy()
                trial[:, column] = choice
                trial_costs = price(trial)
                better = trial_costs < costs
                population = np.where(better[:, None], trial, population)
                costs = np.where(better, trial_costs, costs)
        if (costs == before).all():
            break
    cheapest = space.canonical(population[costs.argmin()][None])
    return tuple(cheapest[0].tolist()), float(price(cheapest)[0])
