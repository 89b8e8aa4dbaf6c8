"""The default search under several limits: one population serves all limits on one cost.

Every limit has slots, and every slot is a chain of simulated annealing (Kirkpatrick et al.
1983): its child replaces it if better, or a little worse with a probability that falls as the
search goes on. A child above its slot's limit is made anew, since its cost takes a twentieth of
the time of a prediction; if that fails it competes for a slot of the next looser limit. Some
children also take genes from a mate of the same or the next limit, so that good architectures
travel between limits.

The last of the budget goes to neighbours, by one or two genes, of the best for each limit: at a
limit, making one block cheaper pays for another.

Populations that accept only improvements end in local optima that differ from run to run; the
chains leave them. The temperature is relative to the changes that mutations cause, so any
measure of fitness suits.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nasray.search.evaluated import Evaluated
from nasray.search.limits import Answer, CostOf, FeasibleSampler
from nasray.spaces.active import Activity
from nasray.spaces.space import Population, Space

SIZES = (300, 2000)  # of a generation; the larger ones cost less for each candidate
GENERATIONS = 140  # at least, where the budget is not enough for large ones
CHILDREN_PER_SLOT = 16  # in a generation
MIN_SLOTS = 4  # of a limit
HOT, COLD = 0.3, 0.06  # first and last temperature, in median changes by a mutation
CROSSOVER = 0.3  # of the children have a mate; all are mutated
MAX_SHARE = 0.2  # of a child's genes that come from the mate
MAX_MUTATIONS = 6  # genes of a child; their number is geometric
MAX_TRIES = 3  # to make a child within its limit
NEIGHBOUR_SHARE = 0.1  # of the budget goes to neighbours of the best
UNASSIGNED, NEIGHBOUR = -1, -2  # instead of a slot
MEMORY = 0.9  # of the median change, from one generation to the next
# Of default_budget(): candidates for one limit, for each further one, at most.
ONE_LIMIT, FURTHER_LIMIT, MOST = 50_000, 220_000, 2_000_000


def default_budget(num_limits: int) -> int:
    """How many candidates `nasray front` predicts for so many different limits unless told.

    Few limits get an answer in about a second, a little below what MOST would find; many get
    MOST. benchmarks/ofa_search.py --defaults measures both.
    """
    return min(ONE_LIMIT + FURTHER_LIMIT * (num_limits - 1), MOST)


class Annealing:
    """Searches `space` under `limits` on the cost that `cost_of` returns, all at once.

    `budget` is the number of candidates after which the search has cooled down; it may go on
    after that. `size` is that of a generation, by default chosen for the budget.

    Raises:
        InfeasibleError: no limit is given, or no architecture is within the tightest one.
    """

    def __init__(
        self,
        space: Space,
        cost_of: CostOf,
        limits: Sequence[float],
        seed: int,
        *,
        budget: int,
        size: int | None = None,
    ) -> None:
        self.space, self.cost_of, self.given = space, cost_of, tuple(map(float, limits))
        self.sampler = FeasibleSampler(space, cost_of)
        self.sampler.check(limits)
        if size is None:
            size = min(max(SIZES[0], budget // GENERATIONS), SIZES[1])
        self.limits = np.unique(np.array(limits, dtype=np.float64))  # ascending
        self.slots_per_limit = max(MIN_SLOTS, size // CHILDREN_PER_SLOT // len(self.limits))
        self.slot_limits = np.repeat(self.limits, self.slots_per_limit)
        self.size, self.budget = size, budget
        self.rng = np.random.default_rng(seed)
        self.activity = Activity(space)
        self.num_choices = np.array([len(gene.choices) for gene in space.genes], dtype=np.int8)
        self.first = np.array([gene.first for gene in space.genes], dtype=np.int8)
        self.best: list[Answer | None] = [None] * len(self.limits)
        number = len(self.slot_limits)
        self.slots = Evaluated(  # a fitness of -inf: the slot is empty
            np.zeros((number, len(space.genes)), dtype=np.int8),
            np.full(number, np.inf),
            np.full(number, -np.inf),
        )
        self.mutable = self._mutable()
        self.pending: list[tuple[Population, np.ndarray]] = []  # asked for, with their slots
        # Of each limit: the best, and its neighbours that were not yet asked for.
        self.neighbours: list[tuple[Answer | None, Population]] = [
            (None, self.slots.population[:0])
        ] * len(self.limits)
        self.next_slot = self.told = 0
        self.change = 0.0  # median change of fitness from a parent to its child, smoothed

    @property
    def temperature(self) -> float:
        """The current one of all chains, in units of fitness."""
        done = min(1.0, self.told / self.budget)
        return self.change * HOT * (COLD / HOT) ** done

    def ask(self) -> Population:
        """The next generation in canonical form, maybe with known ones: int8 (n, genes)."""
        if self.told >= (1 - NEIGHBOUR_SHARE) * self.budget:
            population = self._next_neighbours()
            if len(population):
                self.pending.append((population, np.full(len(population), NEIGHBOUR)))
                return population
        slots = (self.next_slot + np.arange(self.size)) % len(self.slot_limits)
        self.next_slot = (self.next_slot + self.size) % len(self.slot_limits)
        empty = ~np.isfinite(self.slots.fitness[slots])
        drawn = self.sampler.draw(self.slot_limits[slots[empty]], self.rng)
        population = np.concatenate((drawn, self._children(slots[~empty])))
        self.pending.append((population, np.concatenate((slots[empty], slots[~empty]))))
        return population

    def tell(self, evaluated: Evaluated) -> None:
        """Take the numbers of a generation, or of any other architectures.

        A fitness of -inf marks an infeasible architecture.
        """
        own = self._slots_of(evaluated.population)
        self.told += len(evaluated)
        feasible = (evaluated.costs <= self.limits[-1]) & np.isfinite(evaluated.fitness)
        evaluated, own = evaluated[feasible], own[feasible]
        # Of the neighbours only new bests join: else all chains would become the same one.
        best = np.array([-np.inf if answer is None else answer.fitness for answer in self.best])
        improves = evaluated.fitness > best[np.searchsorted(self.limits, evaluated.costs)]
        joins = (own != NEIGHBOUR) | improves
        self._update_best(evaluated)
        evaluated, own = evaluated[joins], own[joins]
        slots = self._affordable(own, evaluated.costs)
        accepted = self._accepted(evaluated.fitness, slots, own)
        # Of several for one slot the best is written last.
        order = accepted[np.argsort(evaluated.fitness[accepted], kind="stable")]
        self.slots = self.slots.replaced(slots[order], evaluated[order])
        self.mutable = self._mutable()

    def answers(self) -> list[Answer]:
        """The best for each limit, in the given order; those without any are left out."""
        best = dict(zip(self.limits.tolist(), self.best, strict=True))
        found = [(limit, best[limit]) for limit in self.given]
        return [replace(answer, limit=limit) for limit, answer in found if answer is not None]

    def members(self, limit: float) -> Population:
        """The different architectures that the chains of `limit` are at, best first."""
        first_slot = int(np.searchsorted(self.limits, limit)) * self.slots_per_limit
        own = self.slots[np.arange(first_slot, first_slot + self.slots_per_limit)]
        return own[np.isfinite(own.fitness)].best_first().distinct().population

    def _children(self, slots: np.ndarray) -> Population:
        """A child of each member of `slots`, within its limit if a few tries suffice."""
        children = self._offspring(slots)
        missing = np.arange(len(slots))
        for _ in range(MAX_TRIES - 1):
            missing = missing[self.cost_of(children[missing]) > self.slot_limits[slots[missing]]]
            children[missing] = self._offspring(slots[missing])
        return children

    def _offspring(self, slots: np.ndarray) -> Population:
        """Cross and mutate the members of `slots`."""
        if not len(slots):
            return np.empty((0, len(self.num_choices)), dtype=np.int8)
        rng, members = self.rng, self.slots.population
        children = members[slots]
        mated = np.flatnonzero(rng.random(len(slots)) < CROSSOVER)
        share = rng.integers(0, round(MAX_SHARE * 256), (len(mated), 1), dtype=np.uint8)
        taken = rng.integers(0, 256, (len(mated), children.shape[1]), dtype=np.uint8) < share
        children[mated] = np.where(taken, members[self._mates(slots[mated])], children[mated])
        self._mutate(children, slots)
        return self.space.canonical(children)

    def _mates(self, slots: np.ndarray) -> np.ndarray:
        """For each of `slots` one at most half a limit's slots away; itself if that is empty."""
        reach = max(1, self.slots_per_limit // 2)
        mates = slots + self.rng.integers(-reach, reach + 1, size=len(slots))
        mates = mates.clip(0, len(self.slot_limits) - 1)
        return np.where(np.isfinite(self.slots.fitness[mates]), mates, slots)

    def _mutate(self, children: Population, slots: np.ndarray) -> None:
        """Change, in place, one or more genes of each child that have an effect in its parent."""
        numbers, columns = self.mutable
        changes = np.minimum(self.rng.geometric(0.5, size=len(slots)), MAX_MUTATIONS)
        rows = np.repeat(np.arange(len(slots)), changes)
        rows = rows[numbers[slots[rows]] > 0]
        parents = slots[rows]
        picked = (self.rng.random(len(rows)) * numbers[parents]).astype(np.intp)
        genes = columns[parents, picked]
        first, drawn = self.first[genes], self.num_choices[genes] - self.first[genes]
        shift = 1 + (self.rng.random(len(rows)) * (drawn - 1)).astype(np.int8)
        children[rows, genes] = first + (children[rows, genes] - first + shift) % drawn

    def _mutable(self) -> tuple[np.ndarray, np.ndarray]:
        """How many genes of each slot's member a mutation can change: (slots,); and all genes,
        those first: (slots, genes).
        """
        active = self.activity(self.slots.population) & (self.num_choices - self.first > 1)
        return active.sum(axis=1), np.argsort(~active, axis=1, kind="stable")

    def _next_neighbours(self) -> Population:
        """Neighbours of the best for each limit that were not asked for, in random order."""
        found = []
        share = -(-self.size // len(self.limits))
        for index, answer in enumerate(self.best):
            center, left = self.neighbours[index]
            if answer is not None and (center is None or answer.arch != center.arch):
                left = self._neighbourhood(answer)
            found.append(left[:share])
            self.neighbours[index] = answer, left[share:]
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
        near = near[self.cost_of(near) <= answer.limit]
        return near[self.rng.permutation(len(near))]

    def _slots_of(self, population: Population) -> np.ndarray:
        """The slot that each row was made for, or UNASSIGNED or NEIGHBOUR."""
        if self.pending and population is self.pending[0][0]:  # in order: no look-up
            return self.pending.pop(0)[1]
        known = {
            row.tobytes(): slot
            for rows, slots in self.pending
            for row, slot in zip(rows, slots.tolist(), strict=True)
        }
        self.pending = []
        rows = population.astype(np.int8)
        return np.array([known.get(row.tobytes(), UNASSIGNED) for row in rows], dtype=np.intp)

    def _affordable(self, slots: np.ndarray, costs: np.ndarray) -> np.ndarray:
        """Rows above their slot's limit, or without one, get a random slot of the tightest limit
        that they are within.
        """
        over = (slots < 0) | (costs > self.slot_limits[slots])
        moved = np.searchsorted(self.limits, costs[over]) * self.slots_per_limit
        slots = slots.copy()
        slots[over] = moved + self.rng.integers(self.slots_per_limit, size=len(moved))
        return slots

    def _accepted(self, fitness: np.ndarray, slots: np.ndarray, own: np.ndarray) -> np.ndarray:
        """Rows that replace a slot's member: by Metropolis' rule in their own slot, only if better
        in another one.
        """
        parents = self.slots.fitness[slots]
        at_home = (slots == own) & np.isfinite(parents)
        if at_home.any():
            change = float(np.median(np.abs(fitness[at_home] - parents[at_home])))
            self.change = MEMORY * self.change + (1 - MEMORY) * change if self.change else change
        slack = self.temperature * self.rng.standard_exponential(len(slots))
        return np.flatnonzero(fitness > np.where(at_home, parents - slack, parents))

    def _update_best(self, evaluated: Evaluated) -> None:
        for index, limit in enumerate(self.limits.tolist()):
            fitness = np.where(evaluated.costs <= limit, evaluated.fitness, -np.inf)
            row, old = int(fitness.argmax()) if len(fitness) else -1, self.best[index]
            if row >= 0 and fitness[row] > (-np.inf if old is None else old.fitness):
                self.best[index] = evaluated.answer(limit, row)
