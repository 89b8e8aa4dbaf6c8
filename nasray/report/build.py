"""The report of a run: one HTML file that needs nothing beside it, not even a network.

Shows whatever the run directory holds so far; every part is optional. Here each part's values
are computed, in the order of the page; templates/report.html.j2 is the page, which escapes them.
"""

import base64
import json
import logging
import math
from statistics import mean
from typing import Any

import numpy as np

from nasray.errors import UserError
from nasray.report import figures
from nasray.report.contents import RunContents, read_contents
from nasray.report.drawing import architecture_svg
from nasray.report.page import (
    Table,
    amount,
    duration,
    embed,
    percent,
    percent_of,
    plotly_script,
    render,
)
from nasray.report.scatter import search_figure
from nasray.report.tables import (
    WAYS,
    candidates_table,
    classes_table,
    costs_of,
    exports_table,
    profile_tables,
    rank_table,
    recipes_table,
    reliability_curves,
    reliability_table,
    shipped_table,
    with_interval,
)
from nasray.search.scores import Predictions, by_class
from nasray.storage import files as storage
from nasray.storage import layout

MOST_CLASSES = 40  # in a figure of confusions

logger = logging.getLogger(__name__)

Part = dict[str, Any] | None  # None: the run has nothing of the kind


def build_report(run_dir: str) -> str:
    """Write RUN_DIR/report.html and return its path.

    Raises:
        UserError: the run directory holds nothing to report, or a file that is not readable.
    """
    run = read_contents(run_dir)
    figured = {
        "search": _search(run),
        "reliability": _reliability(run),
        "baseline": _baseline(run),
        "predictor": _predictor(run),
        "rank": _rank(run),
        "study": _study(run),
        "training": embed(figures.training_figure(run.curve), "training-plot") if run.curve else "",
        "retraining": _retraining(run),
        "validation": _validation(run),
    }
    plain = {
        "tiles": _tiles(run),
        "winner": _winner(run),
        "candidates": _candidates(run),
        "profiles": profile_tables(run.networks),
        "exports": _exports(run),
        "data": run.data,
    }
    if not any(figured.values()) and not any(plain.values()):
        raise UserError(f"{run_dir}: nothing to report yet; start with `nasray run JOB {run_dir}`")
    page = render(
        title=run.name,
        facts=_facts(run),
        job=json.dumps(run.job["job"], indent=2) if run.job else "",
        plotly=plotly_script() if any(figured.values()) else "",
        **figured,
        **plain,
    )
    path = storage.join(run_dir, layout.REPORT)
    storage.write(path, page.encode())
    logger.info("wrote %s", path)
    return path


def _facts(run: RunContents) -> list[str]:
    if run.job is None:
        return []
    job, versions = run.job["job"], run.job["versions"]
    init = job.get("supernet", {}).get("init")
    return [
        f"space {job['space']['name']}",
        f"data {job['data']['source']}",
        f"seed {job['seed']}",
        *([f"begun with {init}"] if init else []),
        f"started {run.job['started']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]


def _tiles(run: RunContents) -> list[tuple[str, str, str]]:
    """The numbers at the top: (value, label, note)."""
    tiles = []
    retrained, winner, candidates = run.retrained_winner, run.winner, run.candidates
    if retrained:
        images = retrained.get("num_val_images")
        way = WAYS.get(retrained.get("shipped", "scratch"), "")
        note = f"winner, {way}" + (f"; {images:,} validation images" if images else "")
        tiles.append((percent(retrained["val_top1"]), "top-1", note))
        balanced: float = retrained.get("val_balanced_top1") or retrained["val_top1"]
        if not math.isclose(balanced, retrained["val_top1"]):
            tiles.append((percent(balanced), "balanced top-1", "the mean over the classes"))
    elif winner or candidates:
        best = winner["fitness"] if winner else max(c.fitness for c in candidates)
        tiles.append(
            (
                run.fitness.text(best),
                run.fitness.title,
                "best subnet, supernet weights, hold-out images",
            )
        )
    costs = costs_of(retrained or winner or {})
    for cost, (label, _) in figures.COSTS.items():
        if costs.get(cost) is not None:
            tiles.append((amount(cost, costs[cost]), label, "of the winner"))
    if run.search or candidates:
        count = run.search["num_evaluations"] if run.search else len(candidates)
        tiles.append((f"{count:,}", "evaluations", f"{len(run.generations)} generations"))
    spent = {
        "training": sum(row["seconds"] for row in run.curve),
        "search": run.search["seconds"] if run.search else sum(c.seconds for c in candidates),
        "retraining": sum(result.get("seconds", 0) for result in run.results),
    }
    if sum(spent.values()):
        note = ", ".join(f"{part} {duration(s)}" for part, s in spent.items() if s)
        tiles.append((duration(sum(spent.values())), "time", note))
    return tiles


def _search(run: RunContents) -> Part:
    if not run.generations:
        return None
    known, first = run.generations[0][0].costs, (run.search or {}).get("front_cost")
    costs = [name for name in figures.COSTS if name in known] or list(known)[:3]
    costs.sort(key=lambda name: name != first)  # the others keep their order
    scatter = search_figure(
        run.generations,
        costs,
        paired=run.paired,
        limits=run.search["limits"] if run.search else [],
        winners=[entry["genes"] for entry in run.answers or filter(None, [run.winner])],
        measure=run.fitness,
    )
    failed = f" {run.num_failed} could not be evaluated." if run.num_failed else ""
    return {
        "note": "Every point is an architecture evaluated with the supernet's weights."
        f"{failed}{_stopped_early(run)}",
        "scatter": embed(scatter, "search-plot"),
        "by_generation": embed(
            figures.generations_figure(run.generations, run.fitness), "generations-plot"
        ),
    }


def _stopped_early(run: RunContents) -> str:
    """How many images early stopping saved, if it saved any."""
    most, used = max(run.num_images), sum(run.num_images)
    if used == most * len(run.num_images):
        return ""
    stopped = sum(number < most for number in run.num_images)
    return (
        f" Early stopping ended {stopped} of {len(run.num_images)} evaluations, which are not "
        f"shown: {used:,} images were evaluated instead of {most * len(run.num_images):,}."
    )


def _winner(run: RunContents) -> Part:
    if run.winner is None:
        return None
    return {"drawing": architecture_svg(run.winner), "encoding": json.dumps(run.winner["arch"])}


def _reliability(run: RunContents) -> Part:
    """How far the ranking of the search can be trusted."""
    rankings = [each for each in (run.search or {}).get("reliability") or [] if each]
    if not rankings:
        return None
    lost = max(each["num_left_out"] for each in rankings)
    note = (
        "Reliability is the correlation of the fitness with itself on other hold-out images: 0 is "
        "noise. Of the best candidate, the probability that it is really better than others, the "
        "choice of the best taken into account; candidates below the line are not clearly worse."
        + (f" {lost} candidates whose evaluation was stopped early are left out." if lost else "")
    )
    table, curves = reliability_table(rankings, run.fitness), reliability_curves(rankings)
    plot = embed(figures.reliability_figure(curves), "reliability-plot")
    return {"note": note, "plot": plot, "table": table}


def _baseline(run: RunContents) -> Part:
    """The winner beside random architectures."""
    baseline = run.search.get("baseline") if run.search else None
    if not baseline or not baseline["random_top1"]:
        return None
    winner, others = baseline["winner_top1"], baseline["random_top1"]
    average = mean(others)
    note = (
        f"On {baseline['num_images']:,} validation images, with the supernet's weights, the winner "
        f"has {percent(winner)} {run.accuracy.title}. {len(others)} random architectures within "
        f"the same limits have {percent(average)} on average ({percent(min(others))} to "
        f"{percent(max(others))}): the search gains {100 * (winner - average):+.2f} points and "
        f"beats {sum(winner > top1 for top1 in others)} of {len(others)}."
    )
    resolution, scaled_from = (baseline.get(key, 0) for key in ("resolution", "scaled_from"))
    if resolution != scaled_from:
        note += (
            f" A search scales crops of {scaled_from} pixels to the {resolution} of the network; a "
            "network to be shipped is measured on crops of its own size, so that its top-1 with "
            "the same weights is another."
        )
    plot = embed(figures.baseline_figure(others, winner, run.accuracy), "baseline-plot")
    return {"note": note, "plot": plot}


def _candidates(run: RunContents) -> list[tuple[str, Table, str]]:
    """The tables of architectures: (title, table, note)."""
    cost = (run.search or {}).get("front_cost", "cost")
    label = figures.COSTS.get(cost, (cost,))[0]
    note = f"No evaluated architecture beats one of these in both {run.fitness.title} and {label}."
    listed = [
        ("The best for each limit", run.answers, ""),
        ("Pareto front", run.front, note),
        ("Best architectures", run.top, ""),
    ]
    return [
        (title, candidates_table(entries, run.paired, run.fitness), note)
        for title, entries, note in listed
        if entries
    ]


def _predictor(run: RunContents) -> Part:
    """How well the accuracy predictor predicts architectures that it was not fitted to."""
    fit = run.predictor
    if fit is None:
        return None
    note = (
        f"Fitted to {fit['num_fitted']} evaluations and tested on {fit['num_held_out']} others: "
        f"root mean square error {100 * fit['rmse']:.2f} points, Kendall's tau "
        f"{fit['kendall_tau']:.2f}. The predictor that is kept is fitted to all of them."
    )
    plot = embed(figures.calibration_figure(fit["measured"], fit["predicted"]), "predictor-plot")
    return {"note": note, "plot": plot}


def _rank(run: RunContents) -> Part:
    """How well the supernet orders architectures whose truth is known."""
    found = run.rank
    if found is None:
        return None
    note = (
        f"{found['num_archs']} architectures with known true values ({found['truth']}), in the "
        "order of the supernet and of their costs; with the ends of a 95 % interval."
    )
    if difference := found.get("beyond_macs"):
        said = with_interval(*difference)
        note += f" Kendall's tau-b of the supernet minus that of MACs: {said}."
    if number := found.get("num_failed"):
        note += f" {number} more could not be evaluated and are left out."
    if pick := found.get("pick"):
        note += f" The search's answer is {pick['regret']:.3g} below the best known"
        known = pick.get("num_known")
        note += f" of {known} within its limits." if known else "."
    plot = embed(figures.rank_figure(found["supernet"], found["true"], run.fitness), "rank-plot")
    return {"note": note, "plot": plot, "table": rank_table(found["rankers"])}


def _study(run: RunContents) -> Part:
    """What BN recalibration on fewer images costs in order, and saves in time."""
    study = run.study
    if study is None:
        return None
    note = (
        f"{study['num_archs']} random subnets on {study['num_images']} hold-out images; Kendall's "
        "tau compares their order with that of the last row."
    )
    rows = [
        (
            str(row["calibration"]),
            percent(row["mean_top1"]),
            f"{row['kendall_tau']:.3f}",
            f"{row['seconds']:.2f}",
        )
        for row in study["rows"]
    ]
    header = ("calibration", "mean top-1", "Kendall's tau", "seconds")
    plot = embed(figures.study_figure(study["rows"]), "study-plot")
    return {"note": note, "plot": plot, "table": Table(header=header, rows=rows)}


def _validation(run: RunContents) -> list[Part]:
    """What each network says of the validation images: by class, and where it is most wrong."""
    return [
        _said(each.name, each.predictions, f"confusion-plot-{position}")
        for position, each in enumerate(run.retrained)
        if each.predictions
    ]


def _said(name: str, said: Predictions, plot: str) -> Part:
    top1, images = by_class(said.correct, said.labels, len(said.classes))
    top1, sizes = top1[images > 0], images[images > 0]
    # The classes are independent samples, so the variances of their top-1 add up.
    error = math.sqrt((top1 * (1 - top1) / sizes).sum()) / len(top1)
    note = (
        f"Top-1 {percent_of(said.top1, len(said.labels))}; balanced, which is the mean over the "
        f"classes, {percent(said.balanced_top1)} ± {100 * error:.2f}. Classes have "
        f"{sizes.min():,} to {sizes.max():,} images."
    )
    shown = np.arange(len(said.classes))
    if len(shown) > MOST_CLASSES:
        pairs = said.confused_pairs()
        wrong = np.zeros(len(shown), int)
        for column in (0, 1):
            np.add.at(wrong, pairs[:, column], pairs[:, 2])
        shown = np.sort(np.argsort(-wrong, kind="stable")[:MOST_CLASSES])
        note += f" The figure shows the {MOST_CLASSES} classes with the most confusions."
    figure = figures.confusion_figure(
        said.confusion(shown), images[shown], [said.classes[label] for label in shown]
    )
    worst = [
        {
            "jpeg": base64.b64encode(jpeg).decode(),
            "name": said.names[row],
            "true": said.classes[said.labels[row]],
            "predicted": said.classes[said.predicted[row]],
            "probability": percent(float(said.probability[row])),
        }
        for row in said.most_confident_errors(len(said.labels)).tolist()
        if (jpeg := said.thumbnails[row]) is not None
    ]
    return {
        "name": name,
        "note": note,
        "plot": embed(figure, plot),
        "table": classes_table(said),
        "worst": worst,
    }


def _exports(run: RunContents) -> Part:
    """The exported files, and what an image must go through to become their input."""
    if not run.exports:
        return None
    inputs = {export["input"]["preprocessing"] for export in run.exports if "input" in export}
    return {"table": exports_table(run.exports), "inputs": sorted(inputs)}


def _retraining(run: RunContents) -> Part:
    """The networks to be shipped, by the way they got their weights, and how they were trained."""
    plots = [
        (each.name, embed(figures.retraining_figure(each.curves), f"retraining-plot-{position}"))
        for position, each in enumerate(run.retrained)
        if each.curves
    ]
    shipped = shipped_table(run.retrained, run.answers)
    if not shipped.rows and not plots:
        return None
    note = "Top-1 on validation images ± its standard error, sqrt(p (1 - p) / n), in points."
    if plots:
        note += " Lines: hold-out images; dotted: training images, augmented."
    return {
        "title": "Retraining" if plots else "Shipped networks",
        "note": note,
        "shipped": shipped,
        "recipes": recipes_table(run.retrained),
        "plots": plots,
    }
