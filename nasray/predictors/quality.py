"""How well a predictor orders architectures that it was not fitted to."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nasray.errors import UserError
from nasray.predictors.predictor import STEPS, AccuracyPredictor
from nasray.progress import Show
from nasray.spaces.space import Population, Space

HELD_OUT = 0.2  # of the evaluations, to judge the fit by


def quality_of_fit(
    space: Space,
    population: Population,
    top1: Sequence[float] | np.ndarray,
    *,
    seed: int,
    steps: int = STEPS,
    show: Show = lambda done, text: None,
) -> dict[str, Any]:
    """How well a predictor that is fitted to four fifths of the evaluations predicts the rest."""
    targets = np.asarray(top1, dtype=np.float32)
    if len(targets) != len(population) or len(targets) < 5:
        raise UserError(
            f"a predictor is judged by 5 architectures or more with one top-1 each, got "
            f"{len(population)} and {len(targets)}"
        )
    order = np.random.default_rng(seed).permutation(len(targets))
    held, used = np.split(order, [max(1, round(HELD_OUT * len(order)))])
    predictor = AccuracyPredictor.fit(
        space, population[used], targets[used], seed=seed, steps=steps, show=show
    )
    measured, predicted = targets[held], predictor(population[held])
    return {
        "num_fitted": len(used),
        "num_held_out": len(held),
        "rmse": float(np.sqrt(np.mean((predicted - measured) ** 2))),
        "kendall_tau": kendall_tau(measured, predicted),
        "measured": measured.tolist(),
        "predicted": predicted.tolist(),
    }


def kendall_tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's rank correlation (tau-b: ties are counted out); 0 where it is undefined."""
    above_first = np.sign(first[:, None] - first).astype(np.int8)
    above_second = np.sign(second[:, None] - second).astype(np.int8)
    agreement = float((above_first * above_second).sum(dtype=np.int64))
    untied = np.count_nonzero(above_first) * np.count_nonzero(above_second)
    return agreement / untied**0.5 if untied else 0.0
