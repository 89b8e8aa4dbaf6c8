"""The plotly figures of a report, except the scatter of the search (scatter.py).

Data in, figure out: reads no file. Colours are mid-tones, which stand out on white and on
black; text and grid lines get theirs from the page's style sheet.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from nasray.search.candidate import Candidate

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


def generations_figure(generations: Sequence[Sequence[Candidate]]) -> "Figure":
    """Plot the best and the median fitness of each generation, and its middle half."""
    import plotly.graph_objects as go

    fitness = [100 * np.array([c.fitness for c in generation]) for generation in generations]
    numbers = [generation[0].generation for generation in generations]
    low, median, high = ([float(np.quantile(f, at)) for f in fitness] for at in (0.25, 0.5, 0.75))
    best = [float(f.max()) for f in fitness]
    band = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
    figure = go.Figure(
        [
            go.Scatter(x=numbers, y=low, showlegend=False, **band),
            go.Scatter(
                x=numbers,
                y=high,
                name="middle half",
                fill="tonexty",
                fillcolor="rgba(138,148,163,0.25)",
                **band,
            ),
            _line(numbers, median, "median", GREY),
            _line(numbers, best, "best", BLUE),
        ]
    )
    figure.update_xaxes(title_text="generation", dtick=1 if len(numbers) < 12 else None)
    figure.update_yaxes(title_text="top-1, %")
    figure.update_layout(hovermode="x unified")
    return finish(figure, height=320)


def baseline_figure(random_top1: Sequence[float], winner_top1: float) -> "Figure":
    """Mark every random architecture and the winner on one axis."""
    import plotly.graph_objects as go

    figure = go.Figure(
        [
            go.Scatter(
                x=[100 * top1 for top1 in random_top1],
                y=[0] * len(random_top1),
                name="random",
                mode="markers",
                marker={
                    "symbol": "line-ns-open",
                    "size": 26,
                    "color": GREY,
                    "line": {"width": 2},
                },
                hovertemplate="%{x:.2f} %<extra>random</extra>",
            ),
            go.Scatter(
                x=[100 * winner_top1],
                y=[0],
                name="winner",
                mode="markers",
                marker={"symbol": "star", "size": 16, "color": RED},
                hovertemplate="%{x:.2f} %<extra>winner</extra>",
            ),
        ]
    )
    figure.update_xaxes(title_text="top-1, %")
    figure.update_yaxes(visible=False, range=[-1, 1])
    return finish(figure, height=170)


def calibration_figure(measured: Sequence[float], predicted: Sequence[float]) -> "Figure":
    """Mark each held-out architecture by its predicted and its measured top-1."""
    import plotly.graph_objects as go

    ends = [100 * min(*measured, *predicted), 100 * max(*measured, *predicted)]
    figure = go.Figure(
        [
            _line(ends, ends, "as measured", GREY),
            go.Scatter(
                x=[100 * value for value in predicted],
                y=[100 * value for value in measured],
                name="held-out architectures",
                mode="markers",
                marker={"size": 8, "color": BLUE},
                hovertemplate="predicted %{x:.2f} %, measured %{y:.2f} %<extra></extra>",
            ),
        ]
    )
    figure.update_xaxes(title_text="predicted top-1, %")
    figure.update_yaxes(title_text="measured top-1, %")
    return finish(figure, height=360)


def study_figure(rows: Sequence[dict[str, Any]]) -> "Figure":
    """Plot each subnet's top-1 by way of recalibration against that with the most images."""
    import plotly.graph_objects as go

    most = [100 * value for value in rows[-1]["top1"]]
    figure = go.Figure(
        [
            _line([min(most), max(most)], [min(most), max(most)], "equal", GREY),
            *(
                go.Scatter(
                    x=most,
                    y=[100 * value for value in row["top1"]],
                    name=f"{row['calibration']}",
                    mode="markers",
                )
                for row in rows[:-1]
            ),
        ]
    )
    figure.update_xaxes(title_text=f"top-1 with {rows[-1]['calibration']} images, %")
    figure.update_yaxes(title_text="top-1, %")
    return finish(figure, height=360)


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
    figure.add_trace(
        _line(
            [row["epoch"] for row in validated],
            _percent(validated, "val_top1"),
            "hold-out, mean of fixed architectures",
            BLUE,
        ),
        1,
        2,
    )
    scales = _line(epochs, [row["lowest_scale"] for row in curve], "lowest scale", GREEN)
    figure.add_trace(scales.update(line_shape="hv"), 1, 3)
    figure.update_yaxes(rangemode="tozero", col=3)
    figure.update_traces(showlegend=False, col=1).update_traces(showlegend=False, col=3)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(title_text="epoch")
    return finish(figure, height=330).update_layout(
        legend={"x": 0.5, "xanchor": "center", "y": -0.3, "yanchor": "top"}, margin_b=84
    )


def retraining_figure(trials: Sequence[dict[str, Any]]) -> "Figure":
    """Plot each trial's hold-out (line) and training (dotted) top-1; stopped trials faint."""
    import plotly.graph_objects as go

    figure = go.Figure()
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
            line.update(
                line_dash=dash,
                opacity=0.5 if trial["stopped"] else 1,
                showlegend=key == "holdout_top1",
                legendgroup=str(number),
                hovertemplate=f"epoch %{{x}}, {key.split('_')[0]} %{{y:.2f}} %",
            )
            figure.add_trace(line)
    figure.update_xaxes(title_text="epoch")
    figure.update_yaxes(title_text="top-1, %")
    return finish(figure, height=340)


def _line(x: Sequence[float], y: Sequence[float | None], name: str, colour: str) -> Any:
    import plotly.graph_objects as go

    mode = "lines+markers" if len(x) <= 30 else "lines"
    return go.Scatter(
        x=x, y=y, name=name, mode=mode, line={"color": colour, "width": 2}, marker={"size": 5}
    )


def _percent(rows: Sequence[dict[str, Any]], key: str) -> list[float | None]:
    return [None if row[key] is None else 100 * row[key] for row in rows]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def finish(figure: "Figure", *, height: int) -> "Figure":
    """Give `figure` the look that all figures of a report share; return it."""
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 16, "t": 36, "b": 48},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, -apple-system, Segoe UI, sans-serif", "size": 12},
        legend={
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "itemsizing": "constant",
        },
        hoverlabel={"bgcolor": "#22262d", "bordercolor": GREY, "align": "left"},
        modebar={"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": BLUE},
    )
    figure.update_xaxes(zeroline=False, gridcolor=GREY, spikecolor=GREY, spikethickness=1)
    figure.update_yaxes(zeroline=False, gridcolor=GREY, hoverformat=".2f")
    return figure
