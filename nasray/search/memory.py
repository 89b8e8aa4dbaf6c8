"""What a search by a predictor has been told before: a table of fixed size."""

import numpy as np

from nasray.spaces.space import Population

BITS = 22  # of a place in the table: 64 MB, taken from the system as they are filled


class Memory:
    """The fitness of architectures; of two that want the same place, the later stays.

    The key is a sum of choices times random numbers: two architectures share one with a
    probability of 1 in 2^60.
    """

    def __init__(self, num_genes: int) -> None:
        rng = np.random.default_rng(0)
        self.multipliers = rng.integers(2**64, size=num_genes, dtype=np.uint64)
        self.keys = np.zeros(1 << BITS, dtype=np.uint64)
        self.fitness = np.zeros(1 << BITS)

    def recall(self, population: Population) -> tuple[np.ndarray, np.ndarray]:
        """The key of each row, uint64, and its fitness, float64, NaN if that is not known."""
        keys = (population.astype(np.uint64) @ self.multipliers) | np.uint64(1)  # no key is 0
        places = self._places(keys)
        return keys, np.where(self.keys[places] == keys, self.fitness[places], np.nan)

    def keep(self, keys: np.ndarray, fitness: np.ndarray) -> None:
        places = self._places(keys)
        self.keys[places], self.fitness[places] = keys, fitness

    def _places(self, keys: np.ndarray) -> np.ndarray:
        return (keys >> np.uint64(64 - BITS)).astype(np.intp)
