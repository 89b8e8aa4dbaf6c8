"""The plotly figures of a report, except the scatter of the search (scatter.py).

Data in, figure out: reads no file. Colours are mid-tones, which stand out on white and on
black; text and grid lines get theirs from the page's style sheet.
"""

from collections.abc import Sequence
from html import escape
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np

from nasray.search.candidate import Candidate
from nasray.search.reliability import CLEARLY
from nasray.search.scores import Fitness

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BLUE, ORANGE, GREEN, RED = "#3d7fd9", "#e0871c", "#35a07a", "#d5506a"
PURPLE, GREY = "#9270cb", "#8a94a3"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED, GREY)

# cost: (label, plotly number format)
COSTS = {
    "macs": ("MACs", "~s"),
    "params": ("Parameters", "~s"),
    "micronet_score": ("MicroNet score", ".3~f"),
}


def generations_figure(generations: Sequence[Sequence[Candidate]], measure: Fitness) -> "Figure":
    """Plot the best and the median fitness of each generation, and its middle half."""
    scale = measure.scale
    fitness = [scale * np.array([c.fitness for c in generation]) for generation in generations]
    numbers = [generation[0].generation for generation in generations]
    low, median, high = ([float(np.quantile(f, at)) for f in fitness] for at in (0.25, 0.5, 0.75))
    best = [float(f.max()) for f in fitness]
    band: dict[str, Any] = {
        "x": numbers,
        "mode": "lines",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    fill = {"fill": "tonexty", "fillcolor": "rgba(138,148,163,0.25)"}
    traces = [
        {**band, "y": low, "showlegend": False},
        {**band, "y": high, "name": "middle half", **fill},
        _line(numbers, median, "median", GREY),
        _line(numbers, best, "best", BLUE),
    ]
    figure = make_figure(traces, height=320, x="generation", y=f"{measure.title}, {measure.unit}")
    figure.update_xaxes(dtick=1 if len(numbers) < 12 else None)
    return figure.update_layout(hovermode="x unified")


def baseline_figure(random_top1: Sequence[float], winner_top1: float, measure: Fitness) -> "Figure":
    """Mark every random architecture and the winner on one axis, which shows `measure`."""

    def marks(top1: Sequence[float], name: str, marker: dict[str, Any]) -> dict[str, Any]:
        hover = {"hovertemplate": f"%{{x:.2f}} %<extra>{name}</extra>"}
        return _markers(100 * np.array(top1), np.zeros(len(top1)), name, marker) | hover

    ticks = {"symbol": "line-ns-open", "size": 26, "color": GREY, "line": {"width": 2}}
    star = {"symbol": "star", "size": 16, "color": RED}
    traces = [marks(random_top1, "random", ticks), marks([winner_top1], "winner", star)]
    figure = make_figure(traces, height=170, x=f"{measure.title}, %")
    return figure.update_yaxes(visible=False, range=[-1, 1])


def reliability_figure(chances: dict[str, list[float]]) -> "Figure":
    """Plot, by rank, the probability that the best candidate is really better than each other."""
    traces = [
        _line(list(range(2, len(each) + 1)), [100 * chance for chance in each[1:]], name, colour)
        for (name, each), colour in zip(chances.items(), cycle(SERIES), strict=False)
    ]
    x, y = "rank by fitness", "probability that the best is better, %"
    figure = make_figure(traces, height=320, x=x, y=y)
    figure.add_hline(y=100 * CLEARLY, line={"dash": "dot", "color": GREY, "width": 1})
    return figure.update_layout(hovermode="x unified", showlegend=len(chances) > 1)


def calibration_figure(measured: Sequence[float], predicted: Sequence[float]) -> "Figure":
    """Mark each held-out architecture by its predicted and its measured top-1."""
    ends = [100 * min(*measured, *predicted), 100 * max(*measured, *predicted)]
    x, y = 100 * np.array(predicted), 100 * np.array(measured)
    held_out = _markers(x, y, "held-out architectures", {"size": 8, "color": BLUE})
    held_out["hovertemplate"] = "predicted %{x:.2f} %, measured %{y:.2f} %<extra></extra>"
    traces = [_line(ends, ends, "as measured", GREY), held_out]
    return make_figure(traces, height=360, x="predicted top-1, %", y="measured top-1, %")


def rank_figure(fitness: Sequence[float], true: Sequence[float], measure: Fitness) -> "Figure":
    """Mark each architecture by its fitness with the supernet's weights and its true value."""
    x = measure.scale * np.array(fitness)
    marks = _markers(x, np.array(true), "architectures", {"color": BLUE})
    marks["hovertemplate"] = f"supernet %{{x:.2f}} {measure.unit}, true %{{y:.4g}}<extra></extra>"
    title = f"{measure.title} with the supernet, {measure.unit}"
    return make_figure([marks], height=360, x=title, y="true value")


def study_figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Plot each subnet's top-1 by way of recalibration against that with the most images."""
    most = 100 * np.array(rows[-1]["top1"])
    ends = [float(most.min()), float(most.max())]
    others = [_markers(most, 100 * np.array(r["top1"]), str(r["calibration"]), {}) for r in rows]
    return make_figure(
        [_line(ends, ends, "equal", GREY), *others[:-1]],
        height=360,
        x=f"top-1 with {rows[-1]['calibration']} images, %",
        y="top-1, %",
    )


def training_figure(curve: Sequence[dict[str, Any]]) -> "Figure":
    """Plot supernet training: loss, top-1 and the lowest channel scale by epoch."""
    from plotly.subplots import make_subplots

    epochs = [row["epoch"] for row in curve]
    figure = make_subplots(
        1, 3, subplot_titles=("loss", "top-1, %", "lowest channel scale"), horizontal_spacing=0.06
    )
    validated = [row for row in curve if row["val_top1"] is not None]
    figure.add_trace(_line(epochs, [row["loss"] for row in curve], "loss", PURPLE), 1, 1)
    figure.add_trace(_line(epochs, _percent(curve, "train_top1"), "training", ORANGE), 1, 2)
    name, at = "hold-out, mean of fixed architectures", [row["epoch"] for row in validated]
    figure.add_trace(_line(at, _percent(validated, "val_top1"), name, BLUE), 1, 2)
    scales = _line(epochs, [row["lowest_scale"] for row in curve], "lowest scale", GREEN)
    scales["line"]["shape"] = "hv"
    figure.add_trace(scales, 1, 3)
    figure.update_yaxes(rangemode="tozero", col=3)
    figure.update_traces(showlegend=False, col=1).update_traces(showlegend=False, col=3)
    figure.update_annotations(font_size=13)
    return finish(figure, height=330, x="epoch").update_layout(
        legend={"x": 0.5, "xanchor": "center", "y": -0.3, "yanchor": "top"}, margin_b=84
    )


def retraining_figure(trials: Sequence[dict[str, Any]]) -> "Figure":
    """Plot each trial's hold-out (line) and training (dotted) top-1; stopped trials faint."""
    traces = []
    tuned = [
        key
        for key in (trials[0]["recipe"] if trials else {})
        if len({repr(trial["recipe"].get(key)) for trial in trials}) > 1
    ]
    for number, trial in enumerate(trials):
        colour = SERIES[number % len(SERIES)]
        recipe = ", ".join(f"{key} {_short(trial['recipe'].get(key))}" for key in tuned)
        name = f"trial {trial['trial']}" + ("; stopped" if trial["stopped"] else "")
        name = escape(f"{name}: {recipe}" if recipe else name)
        epochs = [row["epoch"] for row in trial["epochs"]]
        for key, dash in (("holdout_top1", "solid"), ("train_top1", "dot")):
            line = _line(epochs, _percent(trial["epochs"], key), name, colour)
            line["line"]["dash"] = dash
            line |= {
                "opacity": 0.5 if trial["stopped"] else 1,
                "showlegend": key == "holdout_top1",
                "legendgroup": str(number),
                "hovertemplate": f"epoch %{{x}}, {key.split('_')[0]} %{{y:.2f}} %",
            }
            traces.append(line)
    return make_figure(traces, height=340, x="epoch", y="top-1, %")


def confusion_figure(confusion: np.ndarray, images: np.ndarray, classes: Sequence[str]) -> "Figure":
    """Plot the share of each true class (rows) that is taken for each class (columns).

    `confusion` counts images, int (classes, classes), and `images` all of each class, (classes,).
    """
    number = len(classes)
    shares = 100 * confusion / np.maximum(images, 1)[:, None]
    names = [escape(name if len(name) <= 24 else f"{name[:23]}…") for name in classes]
    positions = list(range(number))
    heatmap = {
        "type": "heatmap",
        "z": shares.round(2).tolist(),
        "text": [
            [f"{names[row]} as {names[column]}: {confusion[row, column]:,}" for column in positions]
            for row in positions
        ],
        "hovertemplate": "%{text} images, %{z:.1f} % of the class<extra></extra>",
        "zmin": 0,
        "zmax": 100,
        "colorscale": [[0, "rgba(61,127,217,0)"], [0.25, "rgba(61,127,217,0.55)"], [1, BLUE]],
        "colorbar": {"title": {"text": "%"}, "thickness": 12},
        "xgap": 1,
        "ygap": 1,
    }
    height = 170 + number * max(12, min(34, 700 // number))
    figure = make_figure([heatmap], height=height, x="predicted class", y="true class")
    ticks = {"tickmode": "array", "tickvals": positions, "ticktext": names, "showgrid": False}
    figure.update_xaxes(**ticks, tickangle=-45, automargin=True)
    return figure.update_yaxes(**ticks, autorange="reversed", automargin=True)


def _line(x: Sequence[float], y: Sequence[float | None], name: str, colour: str) -> dict[str, Any]:
    line = {"color": colour, "width": 2}
    mode = "lines+markers" if len(x) <= 30 else "lines"
    return {"x": x, "y": y, "name": name, "mode": mode, "line": line, "marker": {"size": 5}}


def _markers(x: np.ndarray, y: np.ndarray, name: str, marker: dict[str, Any]) -> dict[str, Any]:
    # As lists: plotly writes arrays in base64.
    return {"x": x.tolist(), "y": y.tolist(), "name": name, "mode": "markers", "marker": marker}


def _percent(rows: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    return [None if row[key] is None else 100 * row[key] for row in rows]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def make_figure(
    traces: Sequence[dict[str, Any]], *, height: int, x: str = "", y: str = ""
) -> "Figure":
    """Make a figure of `traces`, `height` pixels high; x and y are the titles of its axes."""
    import plotly.graph_objects as go

    return finish(go.Figure(traces), height=height, x=x, y=y)


def finish(figure: "Figure", *, height: int, x: str = "", y: str = "") -> "Figure":
    """Give `figure` the look that all figures of a report share; return it."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 16, "t": 36, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 12},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        legend_itemsizing="constant",
        hoverlabel={"bgcolor": "#22262d", "bordercolor": GREY, "align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
    )
    grid = {"zeroline": False, "gridcolor": GREY}
    figure.update_xaxes(spikecolor=GREY, spikethickness=1, **grid)
    figure.update_yaxes(hoverformat=".2f", **grid)
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure
