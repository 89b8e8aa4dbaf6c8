"""The search algorithms: one file each, one line each in this table.

An algorithm is a class with ask() -> new architectures and tell(candidates), built from
(space, config, limits, seed). It draws from its own seeded generator only.
"""

from nasray.search.genetic import GeneticSearch
from nasray.search.random import RandomSearch

ALGORITHMS: dict[str, type] = {"genetic": GeneticSearch, "random": RandomSearch}
