"""The search loop: ask, evaluate, record, tell. The same for an actor pool or a test's lambda.

Knows no network and no cluster.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from nasray.config import SearchConfig
from nasray.errors import UserError
from nasray.search import ALGORITHMS
from nasray.search.candidate import Candidate
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.space import Architecture, Space


class Algorithm(Protocol):
    """What decides which architectures are evaluated next.

    `carries_state`: whether ask() depends on earlier asks, and so has to be called again for
    what is recorded; otherwise telling suffices.
    """

    carries_state: bool

    def ask(self) -> list[Architecture]: ...

    def tell(self, generation: list[Candidate]) -> None: ...


class Evaluated(Protocol):
    """What an evaluation returns."""

    fitness: float
    seconds: float


Finished = Callable[[int, Evaluated], None]
Evaluate = Callable[[Sequence[Architecture], Finished], Sequence[Evaluated]]


def run_search(
    space: Space,
    config: SearchConfig,
    limits: Limits,
    evaluate: Evaluate,
    history: History,
    *,
    seed: int,
    show: Callable[[int, str], None] = lambda done, text: None,
    algorithm: Algorithm | None = None,
) -> list[Candidate]:
    """Search until `config.num_generations` are in `history`; return all its candidates.

    `evaluate(archs, finished)` returns one result per architecture, in the order given, and
    calls finished(index, result) as each is known: that is when it is recorded. The
    algorithm is the one that `config` names unless another is given.
    """
    algorithm = algorithm or ALGORITHMS[config.algorithm](space, config, limits, seed)
    for recorded in history:
        archs = [candidate.arch for candidate in recorded]
        if algorithm.carries_state and algorithm.ask() != archs:
            raise UserError(
                f"{history.folder} was recorded with another job or another version of nasray; "
                "use a new run directory"
            )
        algorithm.tell(recorded)
        _show(history, show)
    while len(history) < config.num_generations:
        archs = algorithm.ask()
        if not archs:  # every feasible architecture has been evaluated
            break
        generation = _evaluate_generation(archs, limits, evaluate, history)
        history.append(generation)
        algorithm.tell(generation)
        _show(history, show)
    return history.candidates


def _evaluate_generation(
    archs: list[Architecture], limits: Limits, evaluate: Evaluate, history: History
) -> list[Candidate]:
    known = history.pending()  # of a driver that was killed in this generation
    open_positions = [index for index, arch in enumerate(archs) if arch not in known]

    def finished(index: int, result: Evaluated) -> None:
        position = open_positions[index]
        history.record(position, archs[position], result.fitness, result.seconds)

    results = evaluate([archs[position] for position in open_positions], finished)
    for position, result in zip(open_positions, results, strict=True):
        known[archs[position]] = (result.fitness, result.seconds)
    return [
        Candidate(
            arch=arch,
            fitness=known[arch][0],
            costs=costs,
            generation=len(history),
            seconds=known[arch][1],
        )
        for arch, costs in zip(archs, limits.costs(archs), strict=True)
    ]


def _show(history: History, show: Callable[[int, str], None]) -> None:
    fitnesses = sorted(candidate.fitness for candidate in history.generations[-1])
    best = max(candidate.fitness for candidate in history.candidates)
    show(len(history), f"best {best:.1%}, median {fitnesses[len(fitnesses) // 2]:.1%}")
