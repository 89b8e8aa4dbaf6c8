"""What several parts of the report page list: architectures, answers, the predictor's quality."""

from collections.abc import Sequence
from typing import Any

from nasray.report import figures
from nasray.report.page import amount, embed, percent, section, table

Entry = dict[str, Any]


def candidates_table(entries: Sequence[Entry], paired: bool) -> str:
    """Top-1, costs and genes of each; before them its limit, if the first has one."""
    costs = [name for name in figures.COSTS if costs_of(entries[0]).get(name) is not None]
    limited = bool(entries[0].get("limit"))
    header = ["top-1", *(figures.COSTS[name][0] for name in costs), "architecture"]
    return table(
        ["limit", *header] if limited else header,
        [
            [
                *([_limit(entry["limit"])] if limited else []),
                percent(entry["fitness"]),
                *(amount(name, costs_of(entry)[name]) for name in costs),
                arch_code(entry, paired),
            ]
            for entry in entries
        ],
        text_last=True,
    )


def answers_section(entries: Sequence[Entry], paired: bool) -> str:
    """The best architecture for each limit."""
    return entries and section("The best for each limit", candidates_table(entries, paired)) or ""


def predictor_section(fit: Entry | None) -> str:
    """How well the accuracy predictor predicts architectures that it was not fitted to."""
    if fit is None:
        return ""
    note = (
        f"Fitted to {fit['num_fitted']} evaluations, judged by {fit['num_held_out']} others: root "
        f"mean square error {100 * fit['rmse']:.2f} points, Kendall's tau {fit['kendall_tau']:.2f}."
        " The one that is kept is fitted to all of them."
    )
    plot = embed(figures.calibration_figure(fit["measured"], fit["predicted"]), "predictor-plot")
    return section("Accuracy predictor", plot, note)


def study_section(study: Entry | None) -> str:
    """What BN recalibration on fewer images costs in order, and saves in time."""
    if study is None:
        return ""
    note = (
        f"{study['num_archs']} random subnets on {study['num_images']} hold-out images; Kendall's "
        "tau compares their order with that of the last row."
    )
    header = ["calibration", "mean top-1", "Kendall's tau", "seconds"]
    rows = [
        [
            f"{row['calibration']}",
            percent(row["mean_top1"]),
            f"{row['kendall_tau']:.3f}",
            f"{row['seconds']:.2f}",
        ]
        for row in study["rows"]
    ]
    plot = embed(figures.study_figure(study["rows"]), "study-plot")
    return section("BN recalibration", plot + table(header, rows), note)


def costs_of(entry: Entry) -> Entry:
    """Costs of an entry, which holds them beside its other keys or under "costs"."""
    return entry.get("costs", entry)


def arch_code(entry: Entry, paired: bool) -> str:
    genes = [int(gene) for gene in entry["genes"]]
    return f"<code>{figures.arch_text(genes, paired=paired, separator=' &nbsp; ')}</code>"


def _limit(limit: Entry) -> str:
    cost, most, least = limit["cost"], limit.get("max"), limit.get("min")
    low = f"{amount(cost, least)} ≤ " if least is not None else ""
    high = f" ≤ {amount(cost, most)}" if most is not None else ""
    return f"{low}{figures.COSTS.get(cost, (cost,))[0]}{high}"
