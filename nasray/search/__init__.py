"""The search algorithms: one line each in this table.

An algorithm has ask() -> new architectures and tell(candidates), and is built from
(space, config, limits, seed). It draws from its own seeded generators only.
"""

from collections.abc import Callable
from typing import Any

from nasray.search import ladder
from nasray.search.genetic import GeneticSearch
from nasray.search.random import RandomSearch

ALGORITHMS: dict[str, Callable[..., Any]] = {
    "genetic": GeneticSearch,
    "random": RandomSearch,
    "front": ladder.front_search,
    "nsga2": ladder.nsga2_search,
    "vanilla": ladder.vanilla_search,
    "top-down": ladder.topdown_search,
    "bottom-up": ladder.bottomup_search,
}
