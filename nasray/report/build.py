"""The report of a run: one HTML file that needs nothing beside it, not even a network.

Shows whatever the run directory holds so far; every part is optional. Pictures are drawn
in figures.py. Every string that comes from a file is escaped.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import mean
from string import Template
from typing import Any

from nasray.errors import UserError
from nasray.report import figures
from nasray.report.page import (
    PAGE,
    SEARCH_CONTROLS,
    amount,
    cell,
    duration,
    embed,
    number,
    percent,
    plotly_script,
    section,
    table,
)
from nasray.report.tables import (
    answers_section,
    candidates_table,
    costs_of,
    predictor_section,
    study_section,
)
from nasray.search.candidate import Candidate
from nasray.search.history import History
from nasray.storage import files as storage

logger = logging.getLogger(__name__)

Entry = dict[str, Any]  # one object of a JSON file


@dataclass(frozen=True, kw_only=True)
class Retrained:
    name: str  # of the folder, RUN/retrain/<name>
    result: Entry | None
    curves: list[Entry]
    profile: Entry | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run directory holds so far."""

    name: str
    job: Entry | None
    curve: list[Entry]  # of supernet training
    generations: list[list[Candidate]]  # without candidates that could not be evaluated
    num_failed: int
    images: list[int]  # that each candidate was judged on; fewer where a race dropped it
    search: Entry | None
    front: list[Entry]
    top: list[Entry]
    retrained: list[Retrained]
    exports: list[Entry]
    predictor: Entry | None
    study: Entry | None

    @property
    def answers(self) -> list[Entry]:
        """The best for each limit, of a search that answers them one by one."""
        answers = (self.search or {}).get("answers") or []
        return answers if any(entry.get("limit") for entry in answers) else []

    @property
    def winner(self) -> Entry | None:
        """The winner of the search, or the first retrained network."""
        if self.search:
            return self.search["winner"]
        first = next(iter(self.top), None)
        return first or next((r.result for r in self.retrained if r.result), None)

    @property
    def retrained_winner(self) -> Entry | None:
        results = [r.result for r in self.retrained if r.result]
        genes = self.winner["genes"] if self.winner else None
        return next((r for r in results if r["genes"] == genes), next(iter(results), None))

    @property
    def paired(self) -> bool:
        """Whether genes alternate between the operation and the channel scale of a block."""
        arch = self.winner["arch"] if self.winner else {}
        return set(arch) == {"block", "channel"} or (
            self.job is not None and self.job["job"]["space"]["name"] == "shufflenet"
        )


def build_report(run_dir: str) -> str:
    """Write RUN_DIR/report.html and return its path."""
    run = _read_run(run_dir)
    sections = (
        _tiles(run),
        _search(run),
        _architecture(run),
        _baseline(run),
        _front(run),
        predictor_section(run.predictor),
        study_section(run.study),
        _training(run),
        _retraining(run),
        _profiles(run),
        _exports(run),
    )
    if not any(sections):
        raise UserError(f"{run_dir}: nothing to report yet; start with `nasray run JOB {run_dir}`")
    body = "\n".join((*sections, _job(run)))
    page = Template(PAGE).substitute(
        title=escape(run.name), facts=_facts(run), body=body, plotly=plotly_script(body)
    )
    path = storage.join(run_dir, "report.html")
    storage.write(path, page.encode())
    logger.info("wrote %s", path)
    return path


def _read_run(run_dir: str) -> Run:
    history = History(storage.join(run_dir, "history"))
    images = [candidate.images for candidate in history.candidates if not candidate.failed]
    generations = [
        [c for c in generation if not c.failed and c.images == max(images)]
        for generation in history
    ]
    retrain = storage.join(run_dir, "retrain")
    export = storage.join(run_dir, "export")
    exports = [name for name in storage.list_names(export) if name.endswith(".json")]
    candidate = ("arch", "genes", "fitness")
    return Run(
        name=storage.absolute(run_dir).rsplit("/", 1)[-1],
        job=_load(run_dir, "job.json", "job", "versions", "started"),
        curve=_load_rows(
            run_dir,
            "curves/supernet.json",
            *("epoch", "loss", "train_top1", "val_top1", "lowest_scale", "seconds"),
        ),
        generations=[generation for generation in generations if generation],
        num_failed=len(history.candidates) - len(images),
        images=images,
        search=_load(run_dir, "search.json", "num_evaluations", "seconds", "limits", "winner"),
        front=_load_rows(run_dir, "front.json", *candidate),
        top=_load_rows(run_dir, "top.json", *candidate),
        retrained=[
            Retrained(
                name=name,
                result=_load(retrain, f"{name}/result.json", "arch", "genes", "val_top1"),
                curves=_load_rows(
                    retrain, f"{name}/curves.json", "trial", "recipe", "stopped", "epochs"
                ),
                profile=_load(retrain, f"{name}/profile.json", "rows", "totals", "micronet"),
            )
            for name in sorted(storage.list_names(retrain), key=lambda name: (len(name), name))
        ],
        predictor=_load(
            run_dir,
            "predictor/fit.json",
            *("num_fitted", "num_held_out", "measured", "predicted", "rmse", "kendall_tau"),
        ),
        study=_load(run_dir, "calibration.json", "num_images", "num_archs", "rows"),
        exports=[
            _load(export, name, "file", "bytes", "max_abs_diff", "num_images", "top1_agreement")
            for name in sorted(exports, key=lambda name: (len(name), name))
        ],
    )


def _load(folder: str, name: str, *keys: str) -> Any:
    """Read a JSON object that must have `keys`; None if the file is absent."""
    path = storage.join(folder, name)
    value = _parse(path)
    if value is not None:
        _check(path, value, keys)
    return value


def _load_rows(folder: str, name: str, *keys: str) -> list[Entry]:
    """Read a JSON list of objects that must have `keys`; empty if the file is absent."""
    path = storage.join(folder, name)
    rows = _parse(path) or []
    for row in rows:
        _check(path, row, keys)
    return rows


def _parse(path: str) -> Any:
    if not storage.exists(path):
        return None
    try:
        return storage.read_json(path)
    except ValueError as error:  # not JSON, or not UTF-8
        raise UserError(
            f"{path}: not readable as JSON ({error}); remove the file and run again"
        ) from None


def _check(path: str, value: Any, keys: Sequence[str]) -> None:
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise UserError(f"{path}: {key!r} is missing; remove the file and run again")


def _facts(run: Run) -> str:  # like all parts of the page: empty if the run lacks it
    if run.job is None:
        return ""
    job, versions = run.job["job"], run.job["versions"]
    facts = [
        f"space {job['space']['name']}",
        f"data {job['data']['source']}",
        f"seed {job['seed']}",
        f"started {run.job['started']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    return "".join(f"<span>{escape(str(fact))}</span>" for fact in facts)


def _tiles(run: Run) -> str:
    tiles = []
    retrained, winner = run.retrained_winner, run.winner
    candidates = [c for generation in run.generations for c in generation]
    if retrained:
        images = retrained.get("num_val_images")
        note = "winner, retrained" + (f"; {images:,} validation images" if images else "")
        tiles.append((percent(retrained["val_top1"]), "top-1", note))
    elif winner or candidates:
        best = winner["fitness"] if winner else max(c.fitness for c in candidates)
        tiles.append((percent(best), "top-1", "best subnet, supernet weights, hold-out images"))
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
        "retraining": sum(r.result.get("seconds", 0) for r in run.retrained if r.result),
    }
    if sum(spent.values()):
        note = ", ".join(f"{part} {duration(s)}" for part, s in spent.items() if s)
        tiles.append((duration(sum(spent.values())), "time", note))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(label)}</span>'
        f"<small>{escape(note)}</small></div>"
        for value, label, note in tiles
    )
    return f'<div class="tiles">{cells}</div>' if cells else ""


def _search(run: Run) -> str:
    if not run.generations:
        return ""
    known, first = run.generations[0][0].costs, (run.search or {}).get("front_cost")
    names = [name for name in figures.COSTS if name in known] or list(known)[:3]
    names.sort(key=lambda name: name != first)  # the others keep their order
    points = figures.search_points(
        run.generations,
        names,
        paired=run.paired,
        limits=run.search["limits"] if run.search else [],
        winners=[entry["genes"] for entry in run.answers or filter(None, [run.winner])],
    )
    buttons = "".join(
        f'<button type="button" data-cost="{index}">{cost["label"]}</button>'
        for index, cost in enumerate(points["costs"])
    )
    scatter = Template(SEARCH_CONTROLS).substitute(
        buttons=buttons,
        last=len(run.generations) - 1,
        plot=embed(figures.search_figure(len(points["top1"])), "search-plot"),
        data=json.dumps(points).replace("<", "\\u003c"),
    )
    failed = f" {run.num_failed} could not be evaluated." if run.num_failed else ""
    note = f"Every point is an architecture evaluated with the supernet's weights.{failed}"
    note += _raced(run)
    best = embed(figures.generations_figure(run.generations), "generations-plot")
    return section("Search", scatter, note) + section("Fitness by generation", best)


def _raced(run: Run) -> str:
    """What races saved, if there were any."""
    full = max(run.images) * len(run.images)
    if sum(run.images) == full:
        return ""
    dropped = sum(number < max(run.images) for number in run.images)
    return (
        f" Races dropped {dropped} of {len(run.images)} early, which are not shown: "
        f"{sum(run.images):,} images judged instead of {full:,}."
    )


def _architecture(run: Run) -> str:
    if run.winner is None:
        return ""
    encoding = escape(json.dumps(run.winner["arch"]))
    drawing = f'<div class="wide">{figures.architecture_svg(run.winner)}</div>'
    return section("The winner", f"{drawing}<pre>{encoding}</pre>")


def _baseline(run: Run) -> str:
    baseline = run.search.get("baseline") if run.search else None
    if not baseline or not baseline["random_top1"]:
        return ""
    winner, others = baseline["winner_top1"], baseline["random_top1"]
    average = mean(others)
    text = (
        f"On {baseline['num_images']:,} validation images, with the supernet's weights, the winner "
        f"has {percent(winner)} top-1. {len(others)} random architectures within the same limits "
        f"have {percent(average)} on average ({percent(min(others))} to "
        f"{percent(max(others))}): the search gains {100 * (winner - average):+.2f} points and "
        f"beats {sum(winner > top1 for top1 in others)} of {len(others)}."
    )
    plot = embed(figures.baseline_figure(others, winner), "baseline-plot")
    return section("Winner against random architectures", plot, text)


def _front(run: Run) -> str:
    cost = (run.search or {}).get("front_cost", "cost")
    label = figures.COSTS.get(cost, (cost,))[0]
    note = f"No evaluated architecture beats one of these in both top-1 and {label}."
    front = run.front and section("Pareto front", candidates_table(run.front, run.paired), note)
    top = run.top and section("Best architectures", candidates_table(run.top, run.paired))
    return answers_section(run.answers, run.paired) + (front or "") + (top or "")


def _training(run: Run) -> str:
    if not run.curve:
        return ""
    return section("Supernet training", embed(figures.training_figure(run.curve), "training-plot"))


def _retraining(run: Run) -> str:
    results = [(r.name, r.result) for r in run.retrained if r.result]
    parts = []
    if results:
        rows = [
            [
                escape(name),
                percent(result["val_top1"]),
                *(amount(cost, costs_of(result).get(cost)) for cost in figures.COSTS),
                escape(_recipe(result.get("recipe", {}))),
            ]
            for name, result in results
        ]
        labels = [label for label, _ in figures.COSTS.values()]
        parts.append(
            table(["network", "validation top-1", *labels, "recipe"], rows, text_last=True)
        )
    for position, retrained in enumerate(run.retrained):
        if retrained.curves:
            plot = figures.retraining_figure(retrained.curves)
            parts.append(f"<h3>Network {escape(retrained.name)}</h3>")
            parts.append(embed(plot, f"retraining-plot-{position}"))
    note = "Trained from scratch. Lines: hold-out images; dotted: training images, augmented."
    return section("Retraining", "".join(parts), note) if parts else ""


def _profiles(run: Run) -> str:
    parts = []
    for retrained in run.retrained:
        if retrained.profile is None:
            continue
        rows, totals = retrained.profile["rows"], retrained.profile["totals"]
        parts.append(f"<h3>Network {escape(retrained.name)}</h3>")
        micronet = retrained.profile["micronet"]
        if micronet:
            names = list(micronet[0])
            cells = [[cell(row.get(name)) for name in names] for row in micronet]
            parts.append(table([f"MicroNet: {names[0]}", *names[1:]], cells, text_last=True))
        names = list(rows[0]) if rows else []
        cells = [[cell(row.get(name)) for name in names] for row in rows]
        cells.append(["<b>total</b>", *(f"<b>{cell(totals.get(key))}</b>" for key in names[1:])])
        operations = table(names, cells)
        parts.append(f"<details><summary>{len(rows)} operations</summary>{operations}</details>")
    note = "A multiply-accumulate (MAC) is counted once; mults and adds apart, by MicroNet rules."
    return section("Cost profile", "".join(parts), note) if parts else ""


def _exports(run: Run) -> str:
    rows = [
        [
            f"<code>{escape(str(entry['file']))}</code>",
            f"{entry['bytes'] / 1e6:.2f} MB",
            f"{entry['max_abs_diff']:.2g}",
            f"{100 * entry['top1_agreement']:.1f} %",
            f"{entry['num_images']:,}",
        ]
        for entry in run.exports
    ]
    header = ["ONNX file", "size", "largest difference", "same top-1", "images compared"]
    note = "Each file was run by onnxruntime and compared with torch, logit by logit."
    return section("Export", table(header, rows), note) if rows else ""


def _job(run: Run) -> str:
    if run.job is None:
        return ""
    text = escape(json.dumps(run.job["job"], indent=2))
    details = f"<details><summary>The job, resolved</summary><pre>{text}</pre></details>"
    return f"<section>{details}</section>"


def _recipe(recipe: Entry) -> str:
    return ", ".join(f"{key} {number(value)}" for key, value in recipe.items())
