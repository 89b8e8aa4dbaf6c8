"""Which architectures a search may consider: limits on costs, and how to find some within.

Knows no network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nasray.config import Limit
from nasray.costs.latency import LatencyTable
from nasray.costs.table import CostTable, check_cost
from nasray.errors import InfeasibleError
from nasray.spaces.population import as_architectures, crossover, mutate, random_population
from nasray.spaces.space import Architecture, Population, Space

LATENCY = "latency_ms"  # the cost that a latency table adds
BATCH = 4096  # architectures drawn and priced at once
MAX_BATCHES = 25  # then random draws give up
MAX_DESCENT = 200  # rounds of the descent towards the limits
ROUNDING = 1e-12  # of sums of the same numbers in another order, relatively

# Of Within, which draws under limits on one cost.
Price = Callable[[Population], np.ndarray]  # population (n, genes) -> costs float64 (n,)
MAX_SWEEPS = 50  # over all genes, in the descent to the smallest cost
NUM_STARTS = 16  # of that descent
MAX_DRAWS = 20  # of an architecture that exceeds its limit, each nearer to the smallest


class Limits:
    """The limits of a search over one space, priced by its cost table.

    With the `latency` table of a device, "latency_ms" is a cost like any other.
    """

    def __init__(
        self, space: Space, limits: Sequence[Limit], latency: LatencyTable | None = None
    ) -> None:
        self.space, self.limits = space, tuple(limits)
        self.table, self.latency = CostTable(space), latency
        for limit in self.limits:
            self._check_reachable(limit)

    def price(self, population: Population) -> dict[str, np.ndarray]:
        """All costs of `population` (n, genes): {cost: float64 (n,)}."""
        costs = self.table(population)
        return costs if self.latency is None else costs | {LATENCY: self.latency(population)}

    def price_one(self, cost: str, population: Population) -> np.ndarray:
        """One cost of `population` (n, genes): float64 (n,)."""
        if cost == LATENCY and self.latency is not None:
            return self.latency(population)
        return self.table.one(cost, population)

    def bounds(self, cost: str) -> tuple[float, float]:
        """The smallest and largest value of `cost` in the space."""
        if cost == LATENCY and self.latency is not None:
            return self.latency.bounds()
        return self.table.bounds(check_cost(cost))

    def costs(self, archs: Sequence[Architecture]) -> list[dict[str, float]]:
        """All costs of each architecture."""
        if not archs:
            return []
        columns = self.price(np.array(archs, dtype=np.int8))
        return [
            {cost: float(values[index]) for cost, values in columns.items()}
            for index in range(len(archs))
        ]

    def violation(self, population: Population) -> np.ndarray:
        """By how much each row exceeds its limits, relatively and in sum; 0 is feasible."""
        costs = {
            cost: self.price_one(cost, population)
            for cost in dict.fromkeys(limit.cost for limit in self.limits)
        }
        excess = np.zeros(len(population))
        for limit in self.limits:
            values = costs[limit.cost]
            if limit.max is not None:
                excess += np.maximum(values - limit.max, 0) / max(abs(limit.max), 1e-12)
            if limit.min is not None:
                excess += np.maximum(limit.min - values, 0) / max(abs(limit.min), 1e-12)
        return excess

    def feasible(self, population: Population) -> Population:
        """The rows of `population` within all limits, in their order."""
        return population[self.violation(population) == 0]

    def draw(
        self, number: int, rng: np.random.Generator, seen: set[Architecture]
    ) -> list[Architecture]:
        """Draw `number` random feasible architectures that are not in `seen`, and add them.

        Fewer if the space has no more to give. Uniform while random draws hit the limits;
        where they are too tight for that, by descent towards them.
        """
        found: list[Architecture] = []
        for _ in range(MAX_BATCHES):
            self._take(random_population(self.space.genes, BATCH, rng), number, found, seen)
            if len(found) >= number:
                return found
        for population in self._descent(rng):
            self._take(population, number, found, seen)
            if len(found) >= number:
                return found
        if not found and not seen:
            raise InfeasibleError(
                f"{BATCH * MAX_BATCHES} draws from {self.space.name} and a descent towards the "
                f"limits found no architecture within search.limits = {self._shown()}; loosen one"
            )
        return found

    def _take(
        self,
        population: Population,
        number: int,
        found: list[Architecture],
        seen: set[Architecture],
    ) -> None:
        """Move unseen feasible rows of `population` to `found`, up to `number` in all."""
        for arch in as_architectures(self.feasible(self.space.canonical(population))):
            if len(found) >= number:
                return
            if arch not in seen:
                seen.add(arch)
                found.append(arch)

    def _descent(self, rng: np.random.Generator) -> Iterator[Population]:
        """Breed random populations towards the limits, and on along them once there."""
        genes = self.space.genes
        population = random_population(genes, BATCH // 4, rng)
        for _ in range(MAX_DESCENT):
            order = np.argsort(self.violation(population), kind="stable")
            parents = population[order[: len(population) // 4]]
            pairs = rng.integers(len(parents), size=(2, len(population) // 2))
            children = np.concatenate(crossover(parents[pairs[0]], parents[pairs[1]], rng))
            mutants = mutate(children, genes, 1 / len(genes), rng)
            population = np.concatenate((parents, mutants))[: len(population)]
            yield population

    def _check_reachable(self, limit: Limit) -> None:
        low, high = self.bounds(limit.cost)
        slack = ROUNDING * max(abs(low), abs(high))
        if limit.max is not None and limit.max < low - slack:
            raise InfeasibleError(
                f"search.limits: {limit.cost} max = {limit.max:.10g} is below the smallest subnet "
                f"of {self.space.name}, {_rounded(low, up=True)}; raise it to at least that"
            )
        if limit.min is not None and limit.min > high + slack:
            raise InfeasibleError(
                f"search.limits: {limit.cost} min = {limit.min:.10g} is above the largest subnet "
                f"of {self.space.name}, {_rounded(high, up=False)}; lower it to at most that"
            )

    def _shown(self) -> str:
        return ", ".join(
            " ".join(
                part
                for part in (
                    f"{limit.min:.10g} <=" if limit.min is not None else "",
                    limit.cost,
                    f"<= {limit.max:.10g}" if limit.max is not None else "",
                )
                if part
            )
            for limit in self.limits
        )


def _rounded(value: float, *, up: bool) -> str:
    """Write `value` with at least ten digits, rounded so that it still is within the bound."""
    shown = f"{value:.10g}"
    short = float(shown) < value if up else float(shown) > value
    return repr(value) if short else shown


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
