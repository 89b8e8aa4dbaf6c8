"""The search algorithms: one line each in this table.

Each is built from (space, config, limits, seed), draws from its own seeded generators only,
and breeds either whole generations (generations.py) or one candidate at a time (lagged.py).
"""

from collections.abc import Callable
from typing import Any

from nasray.config import SearchConfig
from nasray.search import ladder
from nasray.search.bayesian import BayesianSearch
from nasray.search.driver import Algorithm
from nasray.search.evolution import RegularizedEvolution
from nasray.search.generations import Generations
from nasray.search.genetic import GeneticSearch
from nasray.search.lagged import Lagged
from nasray.search.limits import Limits
from nasray.search.random import RandomSearch
from nasray.search.steady import SteadyGenetic
from nasray.spaces.space import Space

GENERATIONAL: dict[str, Callable[..., Any]] = {
    "genetic": GeneticSearch,
    "random": RandomSearch,
    "front": ladder.front_search,
    "nsga2": ladder.nsga2_search,
    "vanilla": ladder.vanilla_search,
    "top-down": ladder.topdown_search,
    "bottom-up": ladder.bottomup_search,
}
ONE_BY_ONE: dict[str, Callable[..., Any]] = {
    "steady": SteadyGenetic,
    "evolution": RegularizedEvolution,
    "bayesian": BayesianSearch,
}
ALGORITHMS = (*GENERATIONAL, *ONE_BY_ONE)


def make_algorithm(space: Space, config: SearchConfig, limits: Limits, seed: int) -> Algorithm:
    """The algorithm that `config` names, for as many candidates as it says."""
    if config.algorithm in GENERATIONAL:
        breeder = GENERATIONAL[config.algorithm](space, config, limits, seed)
        return Generations(breeder, config.num_generations)
    return Lagged(
        ONE_BY_ONE[config.algorithm](space, config, limits, seed),
        number=config.population_size * config.num_generations,
        size=config.population_size,
        lag=config.lag,
    )
