"""New feasible architectures for algorithms that ask for one at a time."""

from collections import deque

import numpy as np

from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures
from nasray.spaces.space import Architecture, Population

LITTER = 64  # children bred at once, of which the first new and feasible one is taken
NEWCOMERS = 32  # drawn at once: thousands are priced to find one
MAX_LITTERS = 10  # then a random newcomer


class Offspring:
    """Finds new feasible architectures: a child if one is born, else a random one."""

    def __init__(self, limits: Limits, rng: np.random.Generator) -> None:
        self.limits, self.rng = limits, rng
        self.seen: set[Architecture] = set()
        self.newcomers: deque[Architecture] = deque()

    def first_new(self, litter: Population) -> Architecture | None:
        """The first row of `litter` that is within the limits and was never seen."""
        for arch in as_architectures(self.limits.feasible(litter)):
            if arch not in self.seen:
                self.seen.add(arch)
                return arch
        return None

    def newcomer(self) -> Architecture | None:
        """A random one, or none if the space is exhausted."""
        while True:
            if not self.newcomers:
                self.newcomers.extend(self.limits.draw(NEWCOMERS, self.rng, set(self.seen)))
            if not self.newcomers:
                return None
            # Seen from now on, not since it was drawn: until then it may be a child as well.
            if (arch := self.newcomers.popleft()) not in self.seen:
                self.seen.add(arch)
                return arch
