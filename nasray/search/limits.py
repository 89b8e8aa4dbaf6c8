"""Limits on the costs of architectures, and random architectures within them.

Knows no network.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from nasray.config import Limit
from nasray.costs.latency import LatencyTable
from nasray.costs.table import CostTable, check_cost
from nasray.errors import InfeasibleError
from nasray.spaces.population import as_architectures, crossover, mutate, random_population
from nasray.spaces.space import Architecture, Population, Space

LATENCY = "latency_ms"  # the cost that a latency table adds
ROUNDING = 1e-12  # relative difference of sums of the same numbers in another order

# Of FeasibleSampler.draw_unseen().
BATCH = 4096  # architectures drawn at once
MAX_BATCHES = 25  # uniform draws before the evolution towards the limit starts
MAX_GENERATIONS = 200  # of that evolution
# Of FeasibleSampler.draw() and .smallest.
MAX_DRAWS = 20  # of an architecture that exceeds its limit, each closer to the smallest one
NUM_STARTS = 16  # of the coordinate descent to the smallest cost
MAX_SWEEPS = 50  # of that descent over all genes

CostOf = Callable[[Population], np.ndarray]  # population int8 (n, genes) -> float64 (n,)


class Limits:
    """The limits of a search over one space, on the costs of its cost table.

    With the `latency` table of a device, "latency_ms" is a cost like any other.

    Raises:
        InfeasibleError: a limit lies outside what the space offers.
        UserError: a limit is on an unknown cost.
    """

    def __init__(
        self, space: Space, limits: Sequence[Limit], latency: LatencyTable | None = None
    ) -> None:
        self.space, self.limits = space, tuple(limits)
        self.table, self.latency = CostTable(space), latency
        for limit in self.limits:
            self._check_reachable(limit)

    def costs_of(self, population: Population) -> dict[str, np.ndarray]:
        """All costs of `population` (n, genes): {cost: float64 (n,)}."""
        costs = self.table(population)
        return costs if self.latency is None else costs | {LATENCY: self.latency(population)}

    def cost_of(self, cost: str, population: Population) -> np.ndarray:
        """One cost of `population` (n, genes): float64 (n,)."""
        if cost == LATENCY and self.latency is not None:
            return self.latency(population)
        return self.table.one(cost, population)

    def bounds(self, cost: str) -> tuple[float, float]:
        """The smallest and largest value of `cost` in the space.

        Raises:
            UserError: `cost` is unknown.
        """
        if cost == LATENCY and self.latency is not None:
            return self.latency.bounds()
        return self.table.bounds(check_cost(cost))

    def costs(self, archs: Sequence[Architecture]) -> list[dict[str, float]]:
        """All costs of each architecture: one {cost: value} per architecture."""
        if not archs:
            return []
        columns = self.costs_of(np.array(archs, dtype=np.int8))
        return [
            {cost: float(values[index]) for cost, values in columns.items()}
            for index in range(len(archs))
        ]

    def violation(self, population: Population) -> np.ndarray:
        """The sum of the relative excesses over all limits: float64 (n,); 0 is feasible."""
        costs = {
            cost: self.cost_of(cost, population)
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

        Returns fewer if the space has no more to give; FeasibleSampler.draw_unseen says how
        they are distributed.

        Raises:
            InfeasibleError: none was found, and none had been seen before.
        """
        sampler = FeasibleSampler(self.space, self.violation)
        found = sampler.draw_unseen(number, 0.0, rng, seen)
        if number and not found and not seen:
            raise InfeasibleError(
                f"{BATCH * MAX_BATCHES} draws from {self.space.name} and a descent towards the "
                f"limits found no architecture within search.limits = {self._shown()}; loosen one"
            )
        return found

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
        """The bounds on each cost, of several limits on it the tightest."""
        shown: dict[str, Limit] = {}
        for limit in self.limits:
            known = shown.get(limit.cost, limit)
            bounds = {
                "max": min((x.max for x in (known, limit) if x.max is not None), default=None),
                "min": max((x.min for x in (known, limit) if x.min is not None), default=None),
            }
            shown[limit.cost] = limit.model_copy(update=bounds)
        return ", ".join(limit.text for limit in shown.values())


def _rounded(value: float, *, up: bool) -> str:
    """Write `value` with at least ten digits, rounded so that it still is within the bound."""
    shown = f"{value:.10g}"
    short = float(shown) < value if up else float(shown) > value
    return repr(value) if short else shown


@dataclass(frozen=True)
class Answer:
    """The best architecture found for one limit, with its own cost and fitness."""

    limit: float
    arch: Architecture
    cost: float
    fitness: float


class FeasibleSampler:
    """Draws random architectures of one space whose cost is at most a limit.

    The cost is any function of a population: one cost of a search, a latency table, or
    Limits.violation, which is at most 0 where all limits of a search hold.
    """

    def __init__(self, space: Space, cost_of: CostOf) -> None:
        self.space, self.cost_of = space, cost_of

    def draw_unseen(
        self, number: int, limit: float, rng: np.random.Generator, seen: set[Architecture]
    ) -> list[Architecture]:
        """Draw `number` different architectures within `limit`, not in `seen`, and add them.

        They are uniform over the space while uniform draws meet the limit. Where that is too
        rare, they come from an evolution towards the limit. Returns fewer if both are
        exhausted. All are in canonical form.
        """
        found: list[Architecture] = []
        genes = self.space.genes
        uniform = (random_population(genes, BATCH, rng) for _ in range(MAX_BATCHES))
        for population in chain(uniform, self._evolve(rng)):
            population = self.space.canonical(population)
            for arch in as_architectures(population[self.cost_of(population) <= limit]):
                if len(found) < number and arch not in seen:
                    seen.add(arch)
                    found.append(arch)
            if len(found) >= number:
                break
        return found

    def draw(self, limits: np.ndarray, rng: np.random.Generator) -> Population:
        """Draw one architecture within each of `limits` (n,), in canonical form: int8 (n, genes).

        Their costs differ widely below the limits: each takes a random share of its genes from
        a random architecture and the others from the smallest one. The share shrinks until
        the limit holds; what never meets it is the smallest architecture.
        """
        found = np.tile(np.array(self.smallest, dtype=np.int8), (len(limits), 1))
        missing = np.arange(len(limits))
        share = 1.0
        for _ in range(MAX_DRAWS):
            fresh = random_population(self.space.genes, len(missing), rng)
            rate = share * rng.random((len(missing), 1))
            fresh = np.where(rng.random(fresh.shape) < rate, fresh, found[missing])
            fresh = self.space.canonical(fresh)
            fits = self.cost_of(fresh) <= limits[missing]
            found[missing[fits]] = fresh[fits]
            missing = missing[~fits]
            if not len(missing):
                break
            share *= 0.8
        return found

    def check(self, limits: Sequence[float]) -> None:
        """Check that an architecture is within each limit.

        Raises:
            InfeasibleError: there is no limit, or one is below the smallest cost.
        """
        if not len(limits):
            raise InfeasibleError("a search needs one limit or more, got none")
        tightest = min(limits)
        if not tightest >= self.smallest_cost:  # so that NaN is refused, too
            raise InfeasibleError(
                f"a limit of {tightest:.10g} is below the smallest subnet of {self.space.name}, "
                f"{self.smallest_cost!r}; raise it to at least that"
            )

    @property
    def smallest(self) -> Architecture:
        """The architecture of the smallest cost that a coordinate descent finds, canonical."""
        return self._smallest[0]

    @property
    def smallest_cost(self) -> float:
        """The cost of `smallest`."""
        return self._smallest[1]

    @cached_property
    def _smallest(self) -> tuple[Architecture, float]:
        """Change one gene after another to its cheapest choice, from several starts at once."""
        genes = self.space.genes
        first = np.array([[gene.first for gene in genes]], dtype=np.int8)
        starts = random_population(genes, NUM_STARTS - 1, np.random.default_rng(0))
        population = np.concatenate((first, starts))
        costs = self.cost_of(population)
        for _ in range(MAX_SWEEPS):
            before = costs
            for column, gene in enumerate(genes):
                for choice in range(gene.first, len(gene.choices)):
                    trial = population.copy()
                    trial[:, column] = choice
                    trial_costs = self.cost_of(trial)
                    better = trial_costs < costs
                    population = np.where(better[:, None], trial, population)
                    costs = np.where(better, trial_costs, costs)
            if (costs == before).all():
                break
        cheapest = self.space.canonical(population[costs.argmin()][None])
        return tuple(cheapest[0].tolist()), float(self.cost_of(cheapest)[0])

    def _evolve(self, rng: np.random.Generator) -> Iterator[Population]:
        """Yield the generations of an evolution that keeps the quarter of the smallest costs."""
        genes = self.space.genes
        population = random_population(genes, BATCH // 4, rng)
        for _ in range(MAX_GENERATIONS):
            order = np.argsort(self.cost_of(population), kind="stable")
            parents = population[order[: len(population) // 4]]
            pairs = rng.integers(len(parents), size=(2, len(population) // 2))
            children = np.concatenate(crossover(parents[pairs[0]], parents[pairs[1]], rng))
            mutants = mutate(children, genes, 1 / len(genes), rng)
            population = np.concatenate((parents, mutants))[: len(population)]
            yield population
