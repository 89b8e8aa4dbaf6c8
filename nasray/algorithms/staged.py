"""The published searches under several limits: vanilla, top-down, bottom-up.

All three (docs/spec.md, OFA 2.3 to OFA 2.7) run the genetic search of Once-for-All for one limit
after another; they differ in what the next limit starts from. Unlike the originals, an answer
never changes after it was found, pruning also lowers the resolution, every loop is bounded, and
the last generation counts like any other. On a pool no architecture is evaluated again for
another limit: that search then starts without what an earlier one found, except for its answer.
"""

import numpy as np

from nasray.search.evaluated import Evaluated
from nasray.search.limits import Answer, CostOf, FeasibleSampler
from nasray.spaces.population import crossover, random_population
from nasray.spaces.space import Architecture, Gene, Population, Space

STRATEGIES = ("vanilla", "top-down", "bottom-up")
MUTATION_PROB = 0.1  # of each group of genes
PARENTS, MUTANTS = 0.25, 0.5  # of the population
MAX_TRIES = 20  # of a child that exceeds the limit, before it is given up
FIRST, LATER = 500, 100  # generations for the first limit, and for each later one
TOGETHER = ("kernel", "expand")  # kinds of one block's genes that mutate together


class Staged:
    """Searches for `limits` on the cost that `cost_of` returns, until `finished`.

    `generations` are those for the first limit and for each later one.

    Raises:
        InfeasibleError: no limit is given, or no architecture is within the tightest one.
    """

    def __init__(
        self,
        space: Space,
        cost_of: CostOf,
        limits: list[float],
        *,
        strategy: str,
        seed: int,
        size: int = 100,
        generations: tuple[int, int] | None = None,
        mutation_prob: float = MUTATION_PROB,
    ) -> None:
        assert strategy in STRATEGIES, strategy
        self.space, self.cost_of, self.given = space, cost_of, tuple(limits)
        self.sampler = FeasibleSampler(space, cost_of)
        self.sampler.check(limits)
        self.strategy, self.size, self.mutation_prob = strategy, size, mutation_prob
        self.rng = np.random.default_rng(seed)
        # Loosest first; bottom-up is top-down's order backwards.
        self.order = sorted(set(limits), reverse=strategy != "bottom-up")
        if generations is None:
            generations = (FIRST, FIRST if strategy == "vanilla" else LATER)
        self.generations = [generations[0]] + [generations[1]] * (len(self.order) - 1)
        self.groups = _groups(space.genes)
        self.stage = self.age = self.num_told = 0  # generations of this limit, and of all
        self.known = Evaluated.empty(len(space.genes))  # population of this limit, best first
        self.start: Population | None = None  # what this limit begins with, unevaluated
        self.found: dict[float, Answer] = {}

    @property
    def finished(self) -> bool:
        """Whether all generations of all limits were told."""
        return self.stage == len(self.order)

    @property
    def limit(self) -> float:
        """The limit that is searched now; the last one once all are finished."""
        return self.order[min(self.stage, len(self.order) - 1)]

    def ask(self) -> Population:
        """The next generation within the limit, in canonical form: int8 (n, genes)."""
        if self.start is not None or not len(self.known):
            return self._first_generation()
        parents = self.known.population[: max(2, round(PARENTS * self.size))]
        num_mutants = round(MUTANTS * self.size)
        mothers = parents[self.rng.integers(len(parents), size=self.size)]
        fathers = parents[self.rng.integers(len(parents), size=self.size - num_mutants)]
        crossed, mutated = mothers[: len(fathers)], mothers[len(fathers) :]
        return np.concatenate((self._retry(mutated), self._retry(crossed, fathers)))

    def tell(self, evaluated: Evaluated) -> None:
        """Take a generation's numbers; go on to the next limit after this one's generations."""
        new = evaluated[evaluated.costs <= self.limit]
        # Among equals the later comes first.
        ranked = (new + self.known).distinct().best_first()
        self.known = ranked[: self.size + round(PARENTS * self.size)]
        self._update_answer()
        self.start = None
        self.age += 1
        self.num_told += 1
        if not self.finished and self.age >= self.generations[self.stage]:
            self._next_limit()

    def answers(self) -> list[Answer]:
        """The best for each limit in the order asked, of those that are known by now."""
        return [self.found[limit] for limit in self.given if limit in self.found]

    def _first_generation(self) -> Population:
        if self.start is None:
            return self.sampler.draw(np.full(self.size, self.limit), self.rng)
        mutants = self._retry(np.repeat(self.start, self.size - len(self.start), axis=0))
        return np.concatenate((self.start, mutants))

    def _next_limit(self) -> None:
        self.stage, self.age = self.stage + 1, 0
        if self.finished:
            return
        if self.strategy == "bottom-up":
            self._update_answer()  # all that is known is within the looser limit, too
            return
        answer, known = self.found.get(self.order[self.stage - 1]), self.known
        self.known = Evaluated.empty(len(self.space.genes))
        if self.strategy == "top-down" and answer is not None:
            if answer.cost <= self.limit:  # a pool does not evaluate it again
                self.known = known[:1]
                self._update_answer()
            arch = prune(answer.arch, self.limit, self.space, self.cost_of, self.rng)
            fits = self.cost_of(np.array([arch], dtype=np.int8))[0] <= self.limit
            self.start = np.array([arch if fits else self.sampler.smallest], dtype=np.int8)

    def _update_answer(self) -> None:
        if len(self.known):
            self.found[self.limit] = self.known.answer(self.limit, 0)

    def _retry(self, mothers: Population, fathers: Population | None = None) -> Population:
        """Mutate or cross each row until it is within the limit; leave out what never is."""
        children = np.empty_like(mothers)
        missing = np.arange(len(mothers))
        for _ in range(MAX_TRIES):
            if fathers is None:
                fresh = self._mutate(mothers[missing])
            else:
                fresh = crossover(mothers[missing], fathers[missing], self.rng)[0]
            fresh = self.space.canonical(fresh)
            fits = self.cost_of(fresh) <= self.limit
            children[missing[fits]] = fresh[fits]
            missing = missing[~fits]
        return np.delete(children, missing, axis=0)

    def _mutate(self, population: Population) -> Population:
        """Redraw each group of genes with the published probability."""
        fresh = random_population(self.space.genes, len(population), self.rng)
        drawn = self.rng.random((len(population), self.groups.max() + 1)) < self.mutation_prob
        return np.where(drawn[:, self.groups], fresh, population)


def prune(
    arch: Architecture, limit: float, space: Space, cost_of: CostOf, rng: np.random.Generator
) -> Architecture:
    """Lower gene after gene of `arch` until it is within `limit` or at the smallest choices.

    Each time a random kind of genes (resolution is one) is lowered at its first gene of the
    highest choice index. Choices are listed cheapest first. `arch` itself does not change.
    """
    pruned = space.canonical(np.array([arch], dtype=np.int8))
    first = np.array([gene.first for gene in space.genes], dtype=np.int8)
    kinds = np.array([gene.kind for gene in space.genes])
    for _ in range(sum(len(gene.choices) for gene in space.genes)):
        if cost_of(pruned)[0] <= limit:
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
