"""A candidate: an architecture and what is known about it. Knows no network and no cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from nasray.spaces.space import Architecture

FAILED = -np.inf  # fitness of what could not be evaluated


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of evaluating an architecture on the hold-out images."""

    fitness: float  # top-1, a fraction, or what else search.fitness says; FAILED with an error
    seconds: float = field(default=0.0, compare=False)
    images: int = 0  # evaluated: all, or fewer if it was stopped early
    slices: tuple[float, ...] = ()  # top-1 on each slice of them, in the order of evaluation
    # On which of the hold-out images it is correct, one bit each; if it was stopped early, only
    # where `judged` says that it was evaluated (else that is empty).
    correct: bytes = field(default=b"", repr=False)
    judged: bytes = field(default=b"", repr=False)
    # Where the fitness is made of them: float16, the log-probability of each image's class.
    log_likelihoods: bytes = field(default=b"", repr=False)
    batch_size: int = 0  # of recalibration; statistics depend on it a little
    error: str = ""  # why there is no fitness
    evaluator: str = field(default="", compare=False)
    node: str = field(default="", compare=False)
    attempt: int = field(default=1, compare=False)  # above 1: evaluators or attempts were lost

    @property
    def failed(self) -> bool:
        """Whether it could not be evaluated; `error` says why."""
        return self.fitness == FAILED

    @property
    def top1(self) -> float:
        """The fraction of the images that is right, whatever the fitness is."""
        if not self.correct or self.judged:
            return self.fitness  # by early stopping, which goes by top-1 alone
        return float(unpack(self.correct, self.images).mean())


@dataclass(frozen=True, kw_only=True)
class Candidate(Evaluation):
    """One evaluated architecture."""

    arch: Architecture
    costs: dict[str, float] = field(compare=False)  # params, macs, micronet_score, ...
    generation: int = 0

    @classmethod
    def of(cls, evaluation: Evaluation, **known: Any) -> "Candidate":
        """What `evaluation` found of the architecture that `known` names with its costs."""
        found = {each.name: getattr(evaluation, each.name) for each in fields(Evaluation)}
        return cls(**found, **known)


def fully_evaluated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those evaluated on all images, whose fitness is no estimate."""
    most = max((candidate.images for candidate in candidates), default=0)
    return [c for c in candidates if not c.failed and c.images == most]


def best_first(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Sort by fitness; equal fitness by architecture, so that no order of arrival matters."""
    return sorted(candidates, key=lambda candidate: (-candidate.fitness, candidate.arch))


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


def pack(correct: np.ndarray) -> bytes:
    """`correct`, bool (images,), in one bit each."""
    return np.packbits(correct).tobytes()


def as_record(correct: bytes, judged: bytes, number: int) -> np.ndarray:
    """1 or 0 for each of `number` images; NaN where `judged`, unless empty, has no bit."""
    record = unpack(correct, number).astype(np.float32)
    if judged:
        record[~unpack(judged, number)] = np.nan
    return record


def unpack(packed: bytes, number: int) -> np.ndarray:
    """The `number` bools that pack() was given."""
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=number).astype(bool)
