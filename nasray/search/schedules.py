"""When a search asks its algorithm: the schedule belongs to the search, not to the algorithm."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """At most `lag` calls of ask() are under way; the results of one call are told together.

    Lag 1 is a generational search: each call returns a generation, and the next one waits for
    all of its results. An algorithm that returns one architecture a call runs with a larger lag,
    without generations: call n knows the results of calls 0 ... n - lag, in the order of asking.
    No evaluator waits for a slower one, and the history is the same on any number of evaluators;
    more than `lag` of them would have nothing to do.
    """

    asks: int  # calls of ask() in all
    lag: int = 1
    asks_per_generation: int = 1  # a generation is what is recorded and shown together
    # Whether resuming asks for recorded generations again. Not needed, and False, where ask()
    # depends on nothing but what the algorithm was told.
    repeat_asks: bool = True
