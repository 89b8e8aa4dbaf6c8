"""How well a predictor orders architectures that it was not fitted to."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from nasray.errors import UserError
from nasray.predictors.predictor import STEPS, AccuracyPredictor
from nasray.progress import Show
from nasray.spaces.space import Population, Space

HELD_OUT = 0.2  # share of the evaluations that the fit is evaluated on


def quality_of_fit(
    space: Space,
    population: Population,
    top1: Sequence[float] | np.ndarray,
    *,
    seed: int,
    steps: int = STEPS,
    show: Show = lambda done, text: None,
) -> dict[str, Any]:
    """Fit a predictor to four fifths of the evaluations and compare it with the rest.

    `population` (n, genes) and its `top1` (n,), a fraction each. Returns num_fitted,
    num_held_out, rmse (a fraction), kendall_tau, and the lists measured and predicted.

    Raises:
        UserError: there are fewer than 5 evaluations, or not one top-1 each.
    """
    targets = np.asarray(top1, dtype=np.float32)
    if len(targets) != len(population) or len(targets) < 5:
        raise UserError(
            f"evaluating a predictor takes 5 architectures or more with one top-1 each, got "
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
    """Kendall's tau-b between two arrays (n,); 0 where it is undefined, as all values tie."""
    above_first = np.sign(first[:, None] - first).astype(np.int8)
    above_second = np.sign(second[:, None] - second).astype(np.int8)
    agreement = float((above_first * above_second).sum(dtype=np.int64))
    untied = np.count_nonzero(above_first) * np.count_nonzero(above_second)
    return agreement / untied**0.5 if untied else 0.0
