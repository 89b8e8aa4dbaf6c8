"""The verb `front`: the best architectures for many limits, found by a predictor alone."""

import json
import math
import signal
from collections.abc import Callable, Iterator
from typing import Any

import click

from nasray.cli.options import make_space, space_argument, space_options
from nasray.errors import UserError


@click.command()
@space_argument
@click.option("--predictor", required=True, help="A fitted one, or one that OFA published.")
@click.option("--latency-table", help="Of a device; makes latency_ms the cost.")
@click.option(
    "--cost", help="What the limits are on: latency_ms with a table, else macs, or e.g. params."
)
@click.option(
    "--limit", "limits", type=float, multiple=True, required=True, help="Give as many as you like."
)
@click.option(
    "--strategy",
    type=click.Choice(["front", "vanilla", "top-down", "bottom-up"]),
    default="front",
    show_default=True,
    help="One search for all limits, or one of the published ones.",
)
@click.option(
    "--budget",
    type=click.IntRange(1000),
    help="Candidates that `front` predicts; unless told 50,000 for one limit, 220,000 more for "
    "each further one, at most 2,000,000.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@space_options
def front(
    space_name: str,
    predictor: str,
    latency_table: str | None,
    cost: str | None,
    limits: tuple[float, ...],
    strategy: str,
    budget: int | None,
    seed: int,
    **space_settings: Any,
) -> None:
    """Print the best architecture of SPACE within each --limit, as JSON lines.

    Accuracies are the predictor's; `nasray search --verify` has a supernet check them.
    Ctrl-C ends the search early and prints what is found by then.
    """
    # SIGTERM, too, ends the search early and prints what is found.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for limit in limits:
        if not math.isfinite(limit):
            raise UserError(f"--limit {limit} must be a finite number")
    from nasray.algorithms.annealing import Annealing, default_budget
    from nasray.algorithms.many_limits import SplitLimits
    from nasray.algorithms.staged import Staged
    from nasray.config import Limit
    from nasray.costs.latency import LatencyTable
    from nasray.predictors.predictor import AccuracyPredictor
    from nasray.search.limits import LATENCY, Limits
    from nasray.search.predicted import search_predicted

    if cost is None:
        cost = "macs" if latency_table is None else LATENCY
    if cost == LATENCY and latency_table is None:
        raise UserError(f"--cost {LATENCY} needs --latency-table PATH")
    space = make_space(space_name, **space_settings).space
    accuracy = AccuracyPredictor.load(predictor, space)
    table = None if latency_table is None else LatencyTable.load(latency_table, space)
    try:
        cost_of = SplitLimits(
            Limits(space, [Limit(cost=cost, max=limit) for limit in limits], table)
        ).cost_of
    except UserError as error:
        hint = "; for limits in ms give --latency-table" if cost == "macs" else ""
        raise UserError(str(error).replace("search.limits: ", "--limit: ") + hint) from None
    searched: Annealing | Staged
    if budget and strategy != "front":
        raise UserError(f"--budget: {strategy} has a fixed number of generations; leave it out")
    if strategy == "front":
        budget = budget or default_budget(len(set(limits)))
        searched = annealing = Annealing(space, cost_of, limits, seed, budget=budget)
        steps = search_predicted(annealing, cost_of, accuracy.begin, lag=2)
        _run(steps, lambda: annealing.told, budget)
    else:
        searched = staged = Staged(space, cost_of, list(limits), strategy=strategy, seed=seed)
        steps = search_predicted(staged, cost_of, accuracy.begin)
        _run(steps, lambda: staged.num_told, sum(staged.generations))
    answers = searched.answers()
    for missing in sorted(set(limits) - {answer.limit for answer in answers}):
        click.echo(f"nothing was found yet for --limit {missing:g}", err=True)
    for answer in answers:
        line = {"limit": answer.limit, "predicted_accuracy": answer.fitness, cost: answer.cost}
        click.echo(json.dumps({**line, "arch": space.to_json(answer.arch)}))


def _run(steps: Iterator[None], done: Callable[[], int], total: int) -> None:
    """Search to the end or to Ctrl-C, showing how far it is."""
    from nasray.progress import progress

    with progress("front", 100) as show:
        try:
            while done() < total:
                next(steps)
                show(min(100, 100 * done() // total), "")
        except KeyboardInterrupt:
            click.echo("stopped early; these are the best so far", err=True)
