"""The published searches under several limits: vanilla, top-down, bottom-up (spec 2.3 - 2.7).

All three run the genetic search of Once-for-All for one limit after another; they differ
in what the next limit starts from. Populations in, populations out: what evaluates them is
the caller's. Unlike the originals, an answer never changes after it was found, pruning
also lowers the resolution, no loop waits for luck, and the last brood is read like any other.
Where evaluations cost, on a pool, none is done again for another limit: a search then begins
without what an earlier one found, but for the record.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nasray.search.limits import Answer, Price, Within
from nasray.spaces.population import crossover, random_population
from nasray.spaces.space import Architecture, Gene, Population, Space

STRATEGIES = ("vanilla", "top-down", "bottom-up")
MUTATION_PROB = 0.1  # of each group of genes
PARENTS, MUTANTS = 0.25, 0.5  # of the population
MAX_TRIES = 20  # of a child that exceeds the limit, before it is given up
FIRST, LATER = 500, 100  # generations for the first limit, and for each later one
TOGETHER = ("kernel", "expand")  # kinds of one block's genes that mutate together


@dataclass(frozen=True)
class Evaluated:
    """Architectures with what is known of them, best first."""

    population: Population
    costs: np.ndarray
    fitness: np.ndarray

    def best(self, number: int) -> "Evaluated":
        return self[np.arange(min(number, len(self.fitness)))]

    def __getitem__(self, rows: np.ndarray) -> "Evaluated":
        return Evaluated(self.population[rows], self.costs[rows], self.fitness[rows])


class Staged:
    """breed() a generation, evaluate it, absorb() it; repeat until `finished`."""

    def __init__(
        self,
        space: Space,
        price: Price,
        limits: list[float],
        *,
        strategy: str,
        seed: int,
        size: int = 100,
        generations: tuple[int, int] | None = None,
        mutation_prob: float = MUTATION_PROB,
    ) -> None:
        assert strategy in STRATEGIES, strategy
        self.space, self.price, self.asked = space, price, tuple(limits)
        self.within = Within(space, price)
        self.within.check(limits)
        self.strategy, self.size, self.mutation_prob = strategy, size, mutation_prob
        self.rng = np.random.default_rng(seed)
        # Loosest first; bottom-up is top-down's order backwards.
        self.order = sorted(set(limits), reverse=strategy != "bottom-up")
        if generations is None:
            generations = (FIRST, FIRST if strategy == "vanilla" else LATER)
        self.generations = [generations[0]] + [generations[1]] * (len(self.order) - 1)
        self.groups = _groups(space.genes)
        self.stage = self.age = self.bred = 0
        self.known = _none(len(space.genes))  # population of this limit, best first
        self.start: Population | None = None  # what this limit begins with, unevaluated
        self.found: dict[float, Answer] = {}

    @property
    def finished(self) -> bool:
        return self.stage == len(self.order)

    @property
    def limit(self) -> float:
        """The limit that is searched now; the last one once all are finished."""
        return self.order[min(self.stage, len(self.order) - 1)]

    def advance(self, fitness: Callable[[Population], np.ndarray]) -> None:
        """Search one generation further with a `fitness` that is a function, as predictors are."""
        population = self.breed()
        self.absorb(population, self.price(population), fitness(population))

    def breed(self) -> Population:
        """The next generation: all within the limit, in canonical form, maybe known ones."""
        if self.start is not None or not len(self.known.fitness):
            return self._first_generation()
        parents = self.known.best(max(2, round(PARENTS * self.size))).population
        mutants = round(MUTANTS * self.size)
        mothers = parents[self.rng.integers(len(parents), size=self.size)]
        fathers = parents[self.rng.integers(len(parents), size=self.size - mutants)]
        mated, mutated = mothers[: len(fathers)], mothers[len(fathers) :]
        return np.concatenate((self._retry(mutated), self._retry(mated, fathers)))

    def absorb(self, population: Population, costs: np.ndarray, fitness: np.ndarray) -> None:
        """Learn a generation's numbers; go on to the next limit when this one's are over."""
        keep = costs <= self.limit
        born = Evaluated(population[keep], costs[keep], fitness[keep])
        self.known = _merge(self.known, born).best(self.size + round(PARENTS * self.size))
        self._record()
        self.start = None
        self.age += 1
        self.bred += 1
        if not self.finished and self.age >= self.generations[self.stage]:
            self._next_limit()

    def answers(self) -> list[Answer]:
        """The best for each limit in the order asked, of those that are known by now."""
        return [self.found[limit] for limit in self.asked if limit in self.found]

    def _first_generation(self) -> Population:
        if self.start is None:
            return self.within.draw(np.full(self.size, self.limit), self.rng)
        mutants = self._retry(np.repeat(self.start, self.size - len(self.start), axis=0))
        return np.concatenate((self.start, mutants))

    def _next_limit(self) -> None:
        self.stage, self.age = self.stage + 1, 0
        if self.finished:
            return
        if self.strategy == "bottom-up":
            self._record()  # all that is known is within the looser limit, too
            return
        record, known = self.found.get(self.order[self.stage - 1]), self.known
        self.known = _none(len(self.space.genes))
        if self.strategy == "top-down" and record is not None:
            if record.cost <= self.limit:  # a pool does not evaluate it again
                self.known = known.best(1)
                self._record()
            arch = prune(record.arch, self.limit, self.space, self.price, self.rng)
            fits = self.price(np.array([arch], dtype=np.int8))[0] <= self.limit
            self.start = np.array([arch if fits else self.within.smallest], dtype=np.int8)

    def _record(self) -> None:
        if len(self.known.fitness):
            arch = tuple(self.known.population[0].tolist())
            cost, fitness = float(self.known.costs[0]), float(self.known.fitness[0])
            self.found[self.limit] = Answer(self.limit, arch, cost, fitness)

    def _retry(self, mothers: Population, fathers: Population | None = None) -> Population:
        """Mutate or mate each row until it is within the limit; leave out what never is."""
        children = np.empty_like(mothers)
        missing = np.arange(len(mothers))
        for _ in range(MAX_TRIES):
            if fathers is None:
                fresh = self._mutate(mothers[missing])
            else:
                fresh = crossover(mothers[missing], fathers[missing], self.rng)[0]
            fresh = self.space.canonical(fresh)
            fits = self.price(fresh) <= self.limit
            children[missing[fits]] = fresh[fits]
            missing = missing[~fits]
        return np.delete(children, missing, axis=0)

    def _mutate(self, population: Population) -> Population:
        """Redraw each group of genes with the published probability."""
        fresh = random_population(self.space.genes, len(population), self.rng)
        drawn = self.rng.random((len(population), self.groups.max() + 1)) < self.mutation_prob
        return np.where(drawn[:, self.groups], fresh, population)


def prune(
    arch: Architecture, limit: float, space: Space, price: Price, rng: np.random.Generator
) -> Architecture:
    """Lower gene after gene of `arch` until it is within `limit`, or nothing is left to lower.

    Each time a random kind of genes (resolution is one) is lowered at its first gene of the
    highest choice index. Choices are listed cheapest first. `arch` itself does not change.
    """
    pruned = space.canonical(np.array([arch], dtype=np.int8))
    first = np.array([gene.first for gene in space.genes], dtype=np.int8)
    kinds = np.array([gene.kind for gene in space.genes])
    for _ in range(sum(len(gene.choices) for gene in space.genes)):
        if price(pruned)[0] <= limit:
            break
        above = (pruned[0] - first).clip(0)
        open_kinds = np.unique(kinds[above > 0])
        if not len(open_kinds):
            break
        column = np.where(kinds == rng.choice(open_kinds), above, 0).argmax()
        pruned[0, column] -= 1
        pruned = space.canonical(pruned)
    return tuple(pruned[0].tolist())


def _groups(genes: tuple[Gene, ...]) -> np.ndarray:
    """Number the genes' groups: the kernel and expand genes of one block share a group."""
    keys = [
        gene.name.rpartition(".")[0] if gene.kind in TOGETHER else (column,)
        for column, gene in enumerate(genes)
    ]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return np.array([numbers[key] for key in keys])


def _none(num_genes: int) -> Evaluated:
    return Evaluated(np.empty((0, num_genes), dtype=np.int8), np.empty(0), np.empty(0))


def _merge(known: Evaluated, born: Evaluated) -> Evaluated:
    """All of both, each architecture once, best first; among equals the later comes first."""
    population = np.concatenate((born.population, known.population))
    costs = np.concatenate((born.costs, known.costs))
    fitness = np.concatenate((born.fitness, known.fitness))
    _, unique = np.unique(population, axis=0, return_index=True)
    unique.sort()
    order = unique[np.argsort(-fitness[unique], kind="stable")]
    return Evaluated(population, costs, fitness)[order]
