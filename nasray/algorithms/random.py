"""Random search: feasible architectures, uniformly. The baseline of all other results."""

import numpy as np

from nasray.config import SearchConfig
from nasray.search.candidate import Candidate
from nasray.search.limits import Limits
from nasray.spaces.space import Architecture, Space


class RandomSearch:
    """Returns generations of new random architectures; results change nothing."""

    def __init__(self, space: Space, config: SearchConfig, limits: Limits, seed: int) -> None:
        self.population_size, self.limits = config.population_size, limits
        self.rng = np.random.default_rng(seed)
        self.seen: set[Architecture] = set()

    def ask(self) -> list[Architecture]:
        return self.limits.draw(self.population_size, self.rng, self.seen)

    def tell(self, candidates: list[Candidate]) -> None:
        pass
