"""The default search: one population that serves all limits on one cost together.

Every limit is a rung with slots, and every slot is a chain of simulated annealing
(Kirkpatrick et al. 1983): its child replaces it if better, or a little worse with a
probability that falls as the search goes on. A child that costs more than its slot's limit
is bred anew, since a price takes a twentieth of the time of a prediction; if that fails it
competes for a slot of the next looser rung. Some children also take genes from a mate of
the same or the next rung, so good architectures travel between limits.

The last of the budget goes to neighbours, by one gene or two, of the best for each limit: at
a limit, what makes one block cheaper pays for another.

Populations that accept only what is better fall into local optima that differ from run to
run; the chains leave them. The temperature is relative to what mutations change, so any
measure of fitness suits.

Knows no network: breed() a population, evaluate it, absorb() it; repeat.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from nasray.search.limits import Answer, Price, Within
from nasray.spaces.active import Activity
from nasray.spaces.space import Population, Space

SIZES = (300, 2000)  # of a generation; the larger ones cost less for each candidate
GENERATIONS = 140  # at least, where the budget is not enough for large ones
CHILDREN_PER_SLOT = 16  # in a generation
FEWEST_SLOTS = 4  # of a rung
HEAT, COLD = 0.3, 0.06  # temperature at first and at last, in median changes by a mutation
CROSSOVER = 0.3  # of the children have a mate; all are mutated
LARGEST_SHARE = 0.2  # of a child's genes that come from the mate
MOST_MUTATIONS = 6  # genes of a child; their number is geometric
MAX_TRIES = 3  # to breed a child within its limit
AHEAD = 2  # generations under way in advance(): as one is predicted, the next is bred
POLISH = 0.1  # of the budget goes to neighbours of the best
STRANGER, NEIGHBOUR = -1, -2  # instead of a slot
MEMORY = 0.9  # of the median change, from one generation to the next

Awaited = Callable[[], np.ndarray]  # waits for the fitness of a generation


@dataclass(frozen=True)
class Slots:
    """The chains: slot s belongs to rung s // (slots of a rung)."""

    population: Population
    costs: np.ndarray
    fitness: np.ndarray  # -inf: nothing evaluated yet

    def updated(
        self, slots: np.ndarray, population: Population, costs: np.ndarray, fitness: np.ndarray
    ) -> "Slots":
        """A copy with these members in `slots`; of several for one, the last."""
        new = Slots(self.population.copy(), self.costs.copy(), self.fitness.copy())
        new.population[slots], new.costs[slots], new.fitness[slots] = population, costs, fitness
        return new


class Front:
    """Searches `space` under `limits` on the cost that `price` returns, all at once.

    `budget` is the number of candidates after which the search shall have cooled down. It
    may go on after that. `size` is that of a generation, chosen by the budget if not given.
    """

    def __init__(
        self,
        space: Space,
        price: Price,
        limits: Sequence[float],
        seed: int,
        *,
        budget: int,
        size: int | None = None,
    ) -> None:
        self.space, self.price, self.asked = space, price, tuple(limits)
        self.within = Within(space, price)
        self.within.check(limits)
        if size is None:
            size = min(max(SIZES[0], budget // GENERATIONS), SIZES[1])
        self.rungs = np.unique(np.array(limits, dtype=np.float64))  # ascending
        self.slots_per_rung = max(FEWEST_SLOTS, size // CHILDREN_PER_SLOT // len(self.rungs))
        self.ceilings = np.repeat(self.rungs, self.slots_per_rung)
        self.size, self.budget = size, budget
        self.rng = np.random.default_rng(seed)
        self.activity = Activity(space)
        self.num_choices = np.array([len(gene.choices) for gene in space.genes], dtype=np.int8)
        self.first = np.array([gene.first for gene in space.genes], dtype=np.int8)
        self.best: list[Answer | None] = [None] * len(self.rungs)
        number = len(self.ceilings)
        self.slots = Slots(
            np.zeros((number, len(space.genes)), dtype=np.int8),
            np.full(number, np.inf),
            np.full(number, -np.inf),
        )
        self.open = self._open()
        self.broods: list[tuple[Population, np.ndarray]] = []  # bred, with each child's slot
        self.neighbours: list[tuple[Answer | None, Population]] = [
            (None, self.slots.population[:0])
        ] * len(self.rungs)  # of the best then, those not yet bred
        self.turn = self.told = 0
        self.under_way: deque[tuple[Population, Awaited]] = deque()  # by advance(), in order
        self.change = 0.0  # median change of fitness from a parent to its child, smoothed

    @property
    def temperature(self) -> float:
        """Of the chains now, in units of fitness."""
        done = min(1.0, self.told / self.budget)
        return self.change * HEAT * (COLD / HEAT) ** done

    def advance(self, begin: Callable[[Population], Awaited]) -> None:
        """Search one generation further by predictions that `begin` has others compute.

        What it returns waits for them, as that of AccuracyPredictor.begin does. They may
        change nothing, and depend on the architectures alone.
        """
        while len(self.under_way) < AHEAD:
            population = self.breed()
            self.under_way.append((population, begin(population)))
        population, awaited = self.under_way.popleft()
        self.absorb(population, self.price(population), awaited())

    def breed(self) -> Population:
        """The next generation, in canonical form: `size` or a few less, maybe known ones."""
        if self.told >= (1 - POLISH) * self.budget:
            population = self._next_neighbours()
            if len(population):
                self.broods.append((population, np.full(len(population), NEIGHBOUR)))
                return population
        slots = (self.turn + np.arange(self.size)) % len(self.ceilings)
        self.turn = (self.turn + self.size) % len(self.ceilings)
        empty = ~np.isfinite(self.slots.fitness[slots])
        newcomers = self.within.draw(self.ceilings[slots[empty]], self.rng)
        children = self._children(slots[~empty])
        population = np.concatenate((newcomers, children))
        slots = np.concatenate((slots[empty], slots[~empty]))
        self.broods.append((population, slots))
        return population

    def absorb(self, population: Population, costs: np.ndarray, fitness: np.ndarray) -> None:
        """Learn the numbers of a generation, or of any other architectures.

        A fitness of -inf says that an architecture is out of the question.
        """
        own = self._slots_of(population)
        self.told += len(population)
        fits = (costs <= self.rungs[-1]) & np.isfinite(fitness)
        population, costs, fitness = population[fits], costs[fits], fitness[fits]
        own = own[fits]
        # Of the neighbours only new bests join: chains full of them would all be one chain.
        best = np.array([-np.inf if answer is None else answer.fitness for answer in self.best])
        joins = (own != NEIGHBOUR) | (fitness > best[np.searchsorted(self.rungs, costs)])
        self._record(population, costs, fitness)
        population, costs, fitness, own = (
            values[joins] for values in (population, costs, fitness, own)
        )
        slots = self._affordable(own, costs)
        accepted = self._accepted(fitness, slots, own)
        order = accepted[np.argsort(fitness[accepted], kind="stable")]  # the best is written last
        self.slots = self.slots.updated(
            slots[order], population[order], costs[order], fitness[order]
        )
        self.open = self._open()

    def answers(self) -> list[Answer]:
        """The best for each limit, in the order asked; those without any are left out."""
        best = dict(zip(map(float, self.rungs), self.best, strict=True))
        found = [(limit, best[limit]) for limit in map(float, self.asked)]
        return [
            Answer(limit, answer.arch, answer.cost, answer.fitness)
            for limit, answer in found
            if answer is not None
        ]

    def members(self, limit: float) -> Population:
        """All different architectures that the chains of `limit` now are at, best first."""
        rung = int(np.searchsorted(self.rungs, limit))
        own = np.arange(rung * self.slots_per_rung, (rung + 1) * self.slots_per_rung)
        own = own[np.isfinite(self.slots.fitness[own])]
        order = own[np.argsort(-self.slots.fitness[own], kind="stable")]
        _, first = np.unique(self.slots.population[order], axis=0, return_index=True)
        return self.slots.population[order[np.sort(first)]]

    def _children(self, slots: np.ndarray) -> Population:
        """A child of each member of `slots`, within its limit if a few tries reach it."""
        children = self._offspring(slots)
        missing = np.arange(len(slots))
        for _ in range(MAX_TRIES - 1):
            missing = missing[self.price(children[missing]) > self.ceilings[slots[missing]]]
            children[missing] = self._offspring(slots[missing])
        return children

    def _offspring(self, slots: np.ndarray) -> Population:
        """Mate and mutate the members of `slots`."""
        if not len(slots):
            return np.empty((0, len(self.num_choices)), dtype=np.int8)
        rng, members = self.rng, self.slots.population
        children = members[slots]
        mated = np.flatnonzero(rng.random(len(slots)) < CROSSOVER)
        share = rng.integers(0, round(LARGEST_SHARE * 256), (len(mated), 1), dtype=np.uint8)
        taken = rng.integers(0, 256, (len(mated), children.shape[1]), dtype=np.uint8) < share
        children[mated] = np.where(taken, members[self._mates(slots[mated])], children[mated])
        self._mutate(children, slots)
        return self.space.canonical(children)

    def _mates(self, slots: np.ndarray) -> np.ndarray:
        """A slot at most half a rung from each of `slots`; of those still empty: the same."""
        reach = max(1, self.slots_per_rung // 2)
        mates = slots + self.rng.integers(-reach, reach + 1, size=len(slots))
        mates = mates.clip(0, len(self.ceilings) - 1)
        return np.where(np.isfinite(self.slots.fitness[mates]), mates, slots)

    def _mutate(self, children: Population, slots: np.ndarray) -> None:
        """Change one or more genes of each child that have an effect in its parent, in place."""
        numbers, columns = self.open
        changes = np.minimum(self.rng.geometric(0.5, size=len(slots)), MOST_MUTATIONS)
        rows = np.repeat(np.arange(len(slots)), changes)
        rows = rows[numbers[slots[rows]] > 0]
        parents = slots[rows]
        picked = (self.rng.random(len(rows)) * numbers[parents]).astype(np.intp)
        genes = columns[parents, picked]
        first, drawn = self.first[genes], self.num_choices[genes] - self.first[genes]
        shift = 1 + (self.rng.random(len(rows)) * (drawn - 1)).astype(np.int8)
        children[rows, genes] = first + (children[rows, genes] - first + shift) % drawn

    def _open(self) -> tuple[np.ndarray, np.ndarray]:
        """How many genes of each slot's member a mutation can change, and all, those first."""
        active = self.activity(self.slots.population) & (self.num_choices - self.first > 1)
        return active.sum(axis=1), np.argsort(~active, axis=1, kind="stable")

    def _next_neighbours(self) -> Population:
        """Neighbours of the best for each limit that were not bred yet, in random order."""
        found = []
        share = -(-self.size // len(self.rungs))
        for rung, answer in enumerate(self.best):
            known, left = self.neighbours[rung]
            if answer is not None and (known is None or answer.arch != known.arch):
                left = self._neighbourhood(answer)
            found.append(left[:share])
            self.neighbours[rung] = answer, left[share:]
        return np.concatenate(found)

    def _neighbourhood(self, answer: Answer) -> Population:
        """All architectures within the answer's limit with one or two active genes changed."""
        center = np.array(answer.arch, dtype=np.int8)
        active = self.activity(center[None])[0]
        changes = [
            (column, choice)
            for column in np.flatnonzero(active)
            for choice in range(self.first[column], self.num_choices[column])
            if choice != center[column]
        ]
        columns, choices = np.array(changes).T
        one, other = np.triu_indices(len(changes))  # the diagonal: one gene alone
        differ = (columns[one] != columns[other]) | (one == other)
        one, other = one[differ], other[differ]
        rows = np.arange(len(one))
        near = np.repeat(center[None], len(one), axis=0)
        near[rows, columns[one]] = choices[one]
        near[rows, columns[other]] = choices[other]
        near = self.space.canonical(near)
        near = near[self.price(near) <= answer.limit]
        return near[self.rng.permutation(len(near))]

    def _slots_of(self, population: Population) -> np.ndarray:
        """The slot of each child of the oldest brood, or of all, or what it is instead."""
        if self.broods and population is self.broods[0][0]:
            return self.broods.pop(0)[1]
        known = {
            row.tobytes(): slot
            for rows, slots in self.broods
            for row, slot in zip(rows, slots.tolist(), strict=True)
        }
        self.broods = []
        rows = population.astype(np.int8)
        return np.array([known.get(row.tobytes(), STRANGER) for row in rows], dtype=np.intp)

    def _affordable(self, slots: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """Move what exceeds its slot's limit, or has none, to any slot of the tightest it fits."""
        over = (slots < 0) | (costs > self.ceilings[slots])
        moved = np.searchsorted(self.rungs, costs[over]) * self.slots_per_rung
        slots = slots.copy()
        slots[over] = moved + self.rng.integers(self.slots_per_rung, size=len(moved))
        return slots

    def _accepted(self, fitness: np.ndarray, slots: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Rows that take their slot: by Metropolis' rule in their own, if better in another."""
        parents = self.slots.fitness[slots]
        at_home = (slots == own) & np.isfinite(parents)
        if at_home.any():
            change = float(np.median(np.abs(fitness[at_home] - parents[at_home])))
            self.change = MEMORY * self.change + (1 - MEMORY) * change if self.change else change
        slack = self.temperature * self.rng.standard_exponential(len(slots))
        return np.flatnonzero(fitness > np.where(at_home, parents - slack, parents))

    def _record(self, population: Population, costs: np.ndarray, fitness: np.ndarray) -> None:
        for index, limit in enumerate(self.rungs.tolist()):
            within = np.where(costs <= limit, fitness, -np.inf)
            row = int(within.argmax()) if len(within) else -1
            old = self.best[index]
            if row >= 0 and within[row] > (-np.inf if old is None else old.fitness):
                arch = tuple(population[row].tolist())
                self.best[index] = Answer(limit, arch, float(costs[row]), float(fitness[row]))
