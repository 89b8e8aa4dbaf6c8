"""The search algorithms: one line each in this table.

Each is built from (space, config, limits, seed), draws from its own seeded generators only, and
has the two methods of search.driver.Algorithm, ask() and tell().
"""

from collections.abc import Callable
from functools import partial

from nasray.algorithms import many_limits
from nasray.algorithms.bayesian import BayesianSearch
from nasray.algorithms.evolution import RegularizedEvolution
from nasray.algorithms.genetic import GeneticSearch
from nasray.algorithms.random import RandomSearch
from nasray.algorithms.steady import SteadyGenetic
from nasray.config import SearchConfig
from nasray.search.driver import Algorithm
from nasray.search.limits import Limits
from nasray.search.schedules import Schedule
from nasray.spaces.space import Space

ALGORITHMS: dict[str, Callable[[Space, SearchConfig, Limits, int], Algorithm]] = {
    "genetic": GeneticSearch,
    "random": RandomSearch,
    "front": many_limits.annealing_search,
    "nsga2": many_limits.nsga2_search,
    "vanilla": partial(many_limits.staged_search, strategy="vanilla"),
    "top-down": partial(many_limits.staged_search, strategy="top-down"),
    "bottom-up": partial(many_limits.staged_search, strategy="bottom-up"),
    "steady": SteadyGenetic,
    "evolution": RegularizedEvolution,
    "bayesian": BayesianSearch,
}
# Their ask() returns one architecture, not a generation, so that no evaluator waits.
ONE_AT_A_TIME = ("steady", "evolution", "bayesian")


def make_algorithm(space: Space, config: SearchConfig, limits: Limits, seed: int) -> Algorithm:
    """The algorithm that `config` names."""
    return ALGORITHMS[config.algorithm](space, config, limits, seed)


def make_schedule(config: SearchConfig) -> Schedule:
    """The schedule of that algorithm, for as many candidates as `config` says."""
    if config.verify:
        return Schedule(asks=config.num_generations, repeat_asks=False)
    if config.algorithm not in ONE_AT_A_TIME:
        return Schedule(asks=config.num_generations)
    return Schedule(
        asks=config.population_size * config.num_generations,
        lag=config.lag,
        asks_per_generation=config.population_size,
    )
