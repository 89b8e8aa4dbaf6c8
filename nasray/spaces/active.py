"""Which genes of an architecture have an effect, found from a space's canonical form alone.

A gene that another one switches off (a block beyond its stage's depth) is zero in canonical
form whatever it was before.
"""

from collections.abc import Sequence

import numpy as np

from nasray.spaces.population import random_population
from nasray.spaces.space import Gene, Population, Space

PROBES = 512  # random architectures; a dependency that none of them shows is not found


class Activity:
    """Which genes of a population have an effect: bool (n, genes)."""

    def __init__(self, space: Space) -> None:
        self.canonical = space.canonical
        drawn = random_population(_all_choices(space.genes), PROBES, np.random.default_rng(0))
        last = np.array([len(gene.choices) - 1 for gene in space.genes], dtype=np.int8)
        # Genes that others can switch off.
        self.switched = np.flatnonzero(self._switched_in(drawn, last))
        self.switches = self._switches(drawn, space.genes)

    def __call__(self, population: Population) -> np.ndarray:
        """Return whether each gene of `population` (n, genes) has an effect: bool (n, genes)."""
        active = np.ones(population.shape, dtype=bool)
        if len(self.switched):
            filled = population.copy()
            filled[:, self.switched] = np.maximum(filled[:, self.switched], 1)
            active[:, self.switched] = self.canonical(filled)[:, self.switched] != 0
        return active

    def _switched_in(self, drawn: Population, last: np.ndarray) -> np.ndarray:
        """Return whether each gene can be switched off: canonical form zeroes its last choice."""
        found = np.zeros(drawn.shape[1], dtype=bool)
        for column in np.flatnonzero(last > 0):
            probe = drawn.copy()
            probe[:, column] = last[column]
            found[column] = (self.canonical(probe)[:, column] == 0).any()
        return found

    def _switches(self, drawn: Population, genes: Sequence[Gene]) -> dict[int, tuple[int, ...]]:
        """Return, for each gene that can be switched off, the genes (columns) that decide it."""
        before = self(drawn)
        deciding: dict[int, list[int]] = {int(column): [] for column in self.switched}
        for column, gene in enumerate(genes):
            turned = drawn.copy()
            turned[:, column] = (turned[:, column] + 1) % len(gene.choices)
            changed = (self(turned) != before).any(axis=0)
            for switched in np.flatnonzero(changed):
                if switched != column:
                    deciding[int(switched)].append(column)
        return {switched: tuple(columns) for switched, columns in deciding.items()}


def _all_choices(genes: Sequence[Gene]) -> list[Gene]:
    """Return the genes with all choices that can be built, also those that search leaves out."""
    return [Gene(gene.name, gene.kind, gene.choices) for gene in genes]
