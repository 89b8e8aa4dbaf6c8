"""New feasible architectures for algorithms that ask for one at a time."""

from collections import deque
from collections.abc import Callable

import numpy as np

from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures
from nasray.spaces.space import Architecture, Population

BATCH = 64  # children made at once, of which the first new and feasible one is taken
MAX_BATCHES = 10  # then a random architecture is taken
NUM_DRAWN = 32  # random architectures drawn at once: thousands of costs are computed to find one


class Offspring:
    """Finds new feasible architectures: a child if there is one, else a random one."""

    def __init__(self, limits: Limits, rng: np.random.Generator) -> None:
        self.limits, self.rng = limits, rng
        self.seen: set[Architecture] = set()
        self.drawn: deque[Architecture] = deque()  # random ones, not yet returned

    def child(self, make_children: Callable[[], Population]) -> Architecture | None:
        """The first new one in several batches of children, else a random one."""
        for _ in range(MAX_BATCHES):
            if (found := self.first_new(make_children())) is not None:
                return found
        return self.random()

    def first_new(self, children: Population) -> Architecture | None:
        """The first row of `children` that is within the limits and was never returned."""
        for arch in as_architectures(self.limits.feasible(children)):
            if arch not in self.seen:
                self.seen.add(arch)
                return arch
        return None

    def random(self) -> Architecture | None:
        """A random one, or none if the space is exhausted."""
        while True:
            if not self.drawn:
                self.drawn.extend(self.limits.draw(NUM_DRAWN, self.rng, set(self.seen)))
            if not self.drawn:
                return None
            # Seen from now on, not since it was drawn: until then it may be a child as well.
            if (arch := self.drawn.popleft()) not in self.seen:
                self.seen.add(arch)
                return arch
