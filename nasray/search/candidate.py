"""A candidate: an architecture with what is known of it. Knows no network and no cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nasray.config import Limit
from nasray.spaces.space import Architecture


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One evaluated architecture. `fitness` is top-1 on the hold-out images, a fraction."""

    arch: Architecture
    fitness: float
    costs: dict[str, float] = field(compare=False)  # params, macs, micronet_score, ...
    generation: int = 0
    seconds: float = field(default=0.0, compare=False)  # of the evaluation


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort by fitness; equal fitness by architecture, so that no order of arrival matters."""
    return sorted(candidates, key=lambda candidate: (-candidate.fitness, candidate.arch))


def best_within(candidates: Sequence[Candidate], limits: Sequence[Limit]) -> Candidate | None:
    """The best candidate within all `limits`, if there is one."""
    within = [c for c in candidates if all(limit.holds(c.costs[limit.cost]) for limit in limits)]
    return best_first(within)[0] if within else None


def pareto_front(candidates: Sequence[Candidate], cost: str) -> list[Candidate]:
    """Candidates that no other beats in both fitness (more) and `cost` (less), cheapest first."""
    by_cost = sorted(candidates, key=lambda c: (c.costs[cost], -c.fitness, c.arch))
    front: list[Candidate] = []
    best = -np.inf
    for candidate in by_cost:
        if candidate.fitness > best:
            front.append(candidate)
            best = candidate.fitness
    return front
