"""The search algorithms: one line each in this table.

Each is built from (space, config, limits, seed), draws from its own seeded generators only,
and breeds either whole generations or one candidate at a time (search/schedules.py).
"""

from collections.abc import Callable
from typing import Any

from nasray.algorithms import many_limits
from nasray.algorithms.bayesian import BayesianSearch
from nasray.algorithms.evolution import RegularizedEvolution
from nasray.algorithms.genetic import GeneticSearch
from nasray.algorithms.random import RandomSearch
from nasray.algorithms.steady import SteadyGenetic
from nasray.config import SearchConfig
from nasray.search.driver import Algorithm
from nasray.search.limits import Limits
from nasray.search.schedules import Generations, Lagged
from nasray.spaces.space import Space

GENERATIONAL: dict[str, Callable[..., Any]] = {
    "genetic": GeneticSearch,
    "random": RandomSearch,
    "front": many_limits.front_search,
    "nsga2": many_limits.nsga2_search,
    "vanilla": many_limits.vanilla_search,
    "top-down": many_limits.topdown_search,
    "bottom-up": many_limits.bottomup_search,
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
