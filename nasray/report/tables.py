"""The larger tables of a report: architectures, cost profiles, exported files."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from nasray.report import figures
from nasray.report.contents import Entry, Retrained
from nasray.report.drawing import arch_text
from nasray.report.page import Table, amount, number, percent, percent_of
from nasray.search.scores import Fitness, Predictions, by_class

# How a network got its weights, as result.json has it and as a reader does.
WAYS = {
    "supernet": "supernet's weights",
    "fine-tuned": "fine-tuned",
    "scratch": "from scratch",
}


def candidates_table(entries: Sequence[Entry], paired: bool, measure: Fitness) -> Table:
    """Fitness, costs and genes of each; before them its limit, if the first has one."""
    costs = [name for name in figures.COSTS if costs_of(entries[0]).get(name) is not None]
    limited = bool(entries[0].get("limit"))
    header = [measure.title, *(figures.COSTS[name][0] for name in costs), "architecture"]
    rows = [
        [
            *([_limit(entry["limit"])] if limited else []),
            measure.text(entry["fitness"]),
            *(amount(name, costs_of(entry)[name]) for name in costs),
            _arch_code(entry, paired),
        ]
        for entry in entries
    ]
    return Table(header=["limit", *header] if limited else header, rows=rows, text_last=True)


def costs_of(entry: Entry) -> Entry:
    """Costs of an entry, which holds them beside its other keys or under "costs"."""
    return entry.get("costs", entry)


def shipped_table(retrained: Sequence[Retrained], answers: Sequence[Entry]) -> Table:
    """The validation top-1 of each network by the way it got its weights, its costs, its limits.

    `answers` are those of a search that answers each limit by itself.
    """
    networks: dict[str, dict[str, Entry]] = {}  # by number, then by way
    for each in retrained:
        if each.result:
            networks.setdefault(each.number, {})[each.way] = each.result
    ways = [way for way in WAYS if any(_top1(found, way) for found in networks.values())]
    rows = []
    for name, found in networks.items():
        result = next(iter(found.values()))
        limits = [_limit(each["limit"]) for each in answers if each["genes"] == result["genes"]]
        images = result.get("num_val_images")
        rows.append(
            [
                name,
                *([", ".join(limits)] if answers else []),
                *(_top1(found, way) for way in ways),
                number(images),
                *(amount(cost, costs_of(result).get(cost)) for cost in figures.COSTS),
            ]
        )
    header = ["network", *(["limit"] if answers else []), *(WAYS[way] for way in ways)]
    header += ["validation images", *(label for label, _ in figures.COSTS.values())]
    return Table(header=header, rows=rows)


def _top1(found: dict[str, Entry], way: str) -> str:
    """The top-1 of a network in one way, with its standard error; empty if it has none."""
    if way in found:
        return percent_of(found[way]["val_top1"], found[way].get("num_val_images"))
    inherited = [each for each in found.values() if each.get("supernet_top1") is not None]
    if way == "supernet" and inherited:
        return percent_of(inherited[0]["supernet_top1"], inherited[0].get("num_val_images"))
    return ""


def classes_table(said: Predictions) -> Table:
    """The top-1 of each class, the worst first, and what its images are most often taken for."""
    top1, images = by_class(said.correct, said.labels, len(said.classes))
    most: dict[int, tuple[int, int]] = {}  # by class: what it is most often taken for
    for label, other, count in said.confused_pairs().tolist():
        most.setdefault(label, (other, count))
    rows = []
    for label in np.argsort(top1, kind="stable").tolist():  # those without images last
        other, count = most.get(label, (0, 0))
        rows.append(
            [
                said.classes[label],
                _of_class(top1[label], int(images[label])),
                number(int(images[label])),
                f"{said.classes[other]} ({count:,})" if count else "",
            ]
        )
    header = ["class", "top-1", "images", "most often taken for"]
    return Table(header=header, rows=rows, text_last=True)


def _of_class(top1: float, num_images: int) -> str:
    """The top-1 of one class; of none or all right, the formula's error of 0 would mislead."""
    if not num_images:
        return ""
    return percent_of(top1, num_images) if 0 < top1 < 1 else percent(top1)


def reliability_table(rankings: Sequence[Entry], measure: Fitness) -> Table:
    """For each ranking of the search: its reliability, and the chances of its best candidate."""
    names = ("second", "tenth", "median")
    rows = []
    for each in rankings:
        chances = {other["with"]: other["chance"] for other in each["comparisons"]}
        chances |= {"random": each["chance_random"]}
        rows.append(
            [
                _limit(each["limit"]) if each["limit"] else "all",
                number(each["num_candidates"]),
                number(each["num_images"]),
                f"{each['split_half']:.2f}",
                f"{measure.scale * each['standard_error']:.2f}",
                *(f"{chances[n]:.0%}" if n in chances else "" for n in (*names, "random")),
                number(each["num_equal"]),
            ]
        )
    error = f"standard error, {measure.unit_of_differences}"
    header = ["within", "candidates", "images", "reliability", error]
    header += [f"better than the {name}" for name in names]
    header += ["better than a random one", "not clearly worse"]
    return Table(header=header, rows=rows)


def reliability_curves(rankings: Sequence[Entry]) -> dict[str, list[float]]:
    """The chances by rank of each ranking, by the name of its limit."""
    return {
        _limit(each["limit"]) if each["limit"] else "all candidates": each["chances"]
        for each in rankings
    }


def rank_table(rankers: Entry) -> Table:
    """How well each ranker orders: [figure, low, high] of each measure."""
    rows = [
        [figures.COSTS.get(name, (name,))[0]] + [with_interval(*row) for row in found.values()]
        for name, found in rankers.items()
    ]
    names = ["Kendall's tau-b", "Spearman's rho", "overlap of the best tenths", "regret"]
    return Table(header=["ranked by", *names], rows=rows)


def with_interval(figure: float, low: float | None, high: float | None) -> str:
    """ "0.410 [0.320, 0.520]", or without an interval "0.410"."""
    return f"{figure:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def recipes_table(retrained: Sequence[Retrained]) -> Table | None:
    """The best recipe of each network that was trained."""
    rows = [
        [each.name, WAYS.get(each.way, each.way), _recipe(each.result["recipe"])]
        for each in retrained
        if each.result and each.result.get("recipe")
    ]
    header = ["network", "weights", "recipe"]
    return Table(header=header, rows=rows, text_last=True) if rows else None


def _recipe(recipe: Entry) -> str:
    return ", ".join(f"{key} {number(value)}" for key, value in recipe.items())


def profile_tables(retrained: Sequence[Retrained]) -> list[dict[str, Any]]:
    """For each network with a profile: its name, its MicroNet scores, its operations."""
    return [
        {
            "name": each.name,
            "micronet": _micronet_table(each.profile["micronet"]),
            "operations": _operations_table(each.profile["rows"], each.profile["totals"]),
        }
        for each in retrained
        if each.profile
    ]


def exports_table(exports: Sequence[Entry]) -> Table:
    """The exported files, each with its accuracy and how well it agrees with what it is made of."""
    rows = [
        [
            Markup("<code>{}</code>").format(entry["file"]),
            _precision(entry),
            f"{entry['bytes'] / 1e6:.2f} MB",
            f"{100 * entry['val_top1']:.1f} %" if "val_top1" in entry else "-",
            f"{entry['max_abs_diff']:.2g}" if "max_abs_diff" in entry else "-",
            f"{100 * entry['top1_agreement']:.1f} %" if "top1_agreement" in entry else "-",
            f"{entry['num_images']:,}" if "num_images" in entry else "-",
            entry.get("runtime", "-"),
            f"{entry['ms']:.3f}" if "ms" in entry else "-",
        ]
        for entry in exports
    ]
    header = ["file", "precision", "size", "top-1", "largest difference", "same top-1"]
    return Table(header=[*header, "images compared", "runtime", "ms, one image"], rows=rows)


def _precision(export: Entry) -> str:
    """The precision of an exported file, and the blocks of an int8 one that stayed float."""
    left = export.get("float_blocks", [])
    return export.get("precision", "fp32") + (f", but {', '.join(left)}" if left else "")


def _micronet_table(scores: Sequence[Entry]) -> Table | None:
    if not scores:
        return None
    names = list(scores[0])
    rows = [[number(row.get(name)) for name in names] for row in scores]
    return Table(header=[f"MicroNet: {names[0]}", *names[1:]], rows=rows, text_last=True)


def _operations_table(operations: Sequence[Entry], totals: Entry) -> Table:
    names = list(operations[0]) if operations else []
    return Table(
        header=names,
        rows=[[number(row.get(name)) for name in names] for row in operations],
        total=["total", *(number(totals.get(name)) for name in names[1:])],
    )


def _arch_code(entry: Entry, paired: bool) -> Markup:
    genes = [int(gene) for gene in entry["genes"]]
    separator = Markup(" &nbsp; ")
    return Markup("<code>{}</code>").format(
        separator.join(arch_text(genes, paired=paired, separator="\n").split("\n"))
    )


def _limit(limit: Entry) -> str:
    cost, most, least = limit["cost"], limit.get("max"), limit.get("min")
    low = f"{amount(cost, least)} ≤ " if least is not None else ""
    high = f" ≤ {amount(cost, most)}" if most is not None else ""
    return f"{low}{figures.COSTS.get(cost, (cost,))[0]}{high}"
