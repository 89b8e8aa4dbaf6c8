"""The scatter of a search: every candidate by top-1 and cost, generation by generation.

The slider and the buttons are plotly's own. A step of the slider changes the colour scale, not
the points: candidates are coloured by their generation, and the scale leaves out those to come.
So the page grows with the number of candidates, not with its product with the generations.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from nasray.report.drawing import arch_text
from nasray.report.figures import BLUE, COSTS, GREY, ORANGE, RED, finish
from nasray.search.candidate import Candidate, pareto_front
from nasray.search.scores import Fitness

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Generations = Sequence[Sequence[Candidate]]

MAX_SVG_POINTS = 5000  # above, a browser needs WebGL to stay quick
FRAME_MS = 600
EARLIER = "rgba(138,148,163,0.35)"  # GREY
# By generation: earlier ones, the one shown (half of the scale), later ones.
COLORSCALE = [
    *([0, EARLIER], [0.25, EARLIER]),
    *([0.25, BLUE], [0.75, BLUE]),
    *([0.75, "rgba(0,0,0,0)"], [1, "rgba(0,0,0,0)"]),
]
# The points of a front and of winners lie on candidates, which have the text to hover.
FRONT = {
    "name": "Pareto front so far",
    "mode": "lines+markers",
    "line": {"color": ORANGE, "width": 2, "shape": "hv"},
    "marker": {"size": 5},
    "hoverinfo": "skip",
}
WINNER = {
    "name": "winner",
    "mode": "markers",
    "marker": {"color": RED, "size": 14, "symbol": "star"},
    "hoverinfo": "skip",
}
LIMIT_LINE = {
    "type": "line",
    "yref": "paper",
    "y0": 0,
    "y1": 1,
    "line": {"color": GREY, "dash": "dot", "width": 1.5},
    "label": {"text": "limit", "textposition": "end", "textangle": 0}
    | {"xanchor": "right", "yanchor": "top"},
}
BUTTONS = {
    "type": "buttons",
    "direction": "right",
    "y": 1.12,
    "yanchor": "bottom",
    "pad": {"t": 0, "b": 0, "l": 0, "r": 0},
    "bgcolor": GREY,
    "bordercolor": GREY,
}
NOW = {"mode": "immediate", "frame": {"duration": 0}, "transition": {"duration": 0}}
# Of traces: two for the legend, then for each cost its candidates, its front and its winners, of
# which only those of the chosen cost are visible.
LEGEND, PER_COST = 2, 3


def search_figure(
    generations: Generations,
    costs: Sequence[str],
    *,
    paired: bool,
    limits: Sequence[dict[str, Any]],
    winners: Sequence[Sequence[int]],
    measure: Fitness,
) -> "Figure":
    """Plot all candidates and the Pareto front after each generation.

    Args:
        generations: candidates that were evaluated.
        costs: names of costs, one of which is the x axis; the first one at the beginning.
        paired: whether genes alternate between operation and channel scale.
        limits: what the search was held to, as search.json has it.
        winners: genes of the architectures that are marked.
        measure: what the fitness is.
    """
    import plotly.graph_objects as go

    shown = [c for generation in generations for c in generation]
    fronts = {cost: _fronts(generations, cost) for cost in costs}
    by_arch = {c.arch: c for c in reversed(shown)}
    marked = [by_arch[tuple(arch)] for arch in winners if tuple(arch) in by_arch]
    texts = [arch_text(c.arch, paired=paired, separator="<br>") for c in shown]
    candidates: dict[str, Any] = {
        "type": "scattergl" if len(shown) > MAX_SVG_POINTS else "scatter",
        "mode": "markers",
        "marker": {
            "size": 7,
            "color": [step for step, each in enumerate(generations) for _ in each],
            "colorscale": COLORSCALE,
            **_colour_range(len(generations) - 1),
        },
        "customdata": [[text, c.generation] for text, c in zip(texts, shown, strict=True)],
        "showlegend": False,
    }
    traces = _legend()
    for cost in costs:
        hover = {"hovertemplate": _hover_text(cost, measure)}
        traces.append(candidates | hover | _points(shown, cost, measure.scale))
        traces.append(FRONT | _points(fronts[cost][-1], cost, measure.scale))
        traces.append(WINNER | _points(marked, cost, measure.scale))
    for index, trace in enumerate(traces):
        trace["visible"] = index < LEGEND + PER_COST
    frames = [
        _frame(_number(generation), step, fronts, candidates["type"], measure.scale)
        for step, generation in enumerate(generations)
    ]
    figure = finish(go.Figure(traces, frames=frames), height=520)
    figure.update_yaxes(
        title_text=f"{measure.title} on the hold-out images, {measure.unit}",
        range=_padded([measure.scale * c.fitness for c in shown], 0.06),
        autorange=False,
    )
    axes = [_axis(shown, cost, limits) for cost in costs]
    menus = [_player(), _cost_buttons(costs, axes)] if len(costs) > 1 else [_player()]
    return figure.update_layout(
        axes[0],
        sliders=[_slider([_number(generation) for generation in generations])],
        updatemenus=menus,
        margin_t=84,
        legend={"itemclick": False, "itemdoubleclick": False},
    )


def _legend() -> list[dict[str, Any]]:
    """Traces without points: the two colours of the candidates, for the legend."""
    colours = {"earlier generations": EARLIER, "this generation": BLUE}
    dot = {"x": [None], "y": [None], "mode": "markers"}
    return [{**dot, "name": name, "marker": {"color": color}} for name, color in colours.items()]


def _frame(
    name: str, step: int, fronts: dict[str, list[list[Candidate]]], kind: str, scale: int
) -> dict[str, Any]:
    """What changes in the traces of every cost when the slider comes to `step`."""
    changes: list[dict[str, Any]] = []
    for cost, of_steps in fronts.items():
        changes.append({"type": kind, "marker": _colour_range(step)})
        changes.append({"type": "scatter", **_points(of_steps[step], cost, scale)})
    firsts = range(LEGEND, LEGEND + PER_COST * len(fronts), PER_COST)
    return {"name": name, "data": changes, "traces": [i for f in firsts for i in (f, f + 1)]}


def _slider(names: Sequence[str]) -> dict[str, Any]:
    """A slider whose steps are the frames of these names; at the last one."""
    return {
        "active": len(names) - 1,
        "currentvalue": {"prefix": "generation ", "xanchor": "right"},
        "pad": {"t": 36},
        "steps": [{"label": name, "method": "animate", "args": [[name], NOW]} for name in names],
        **dict.fromkeys(("bgcolor", "bordercolor", "tickcolor"), GREY),
    }


def _player() -> dict[str, Any]:
    """The buttons that play the generations one after the other, and stop that."""
    play = NOW | {"frame": {"duration": FRAME_MS}, "fromcurrent": True}
    buttons = [
        {"label": "Play", "method": "animate", "args": [None, play]},
        {"label": "Pause", "method": "animate", "args": [[None], NOW]},
    ]
    # Left of the mode bar.
    return BUTTONS | {"buttons": buttons, "x": 0.94, "xanchor": "right", "showactive": False}


def _cost_buttons(costs: Sequence[str], axes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The buttons that choose the cost of the x axis."""
    buttons = []
    for index, (cost, axis) in enumerate(zip(costs, axes, strict=True)):
        chosen = [each == index for each in range(len(costs)) for _ in range(PER_COST)]
        data = {"visible": [True] * LEGEND + chosen}
        buttons.append({"label": _label(cost), "method": "update", "args": [data, axis]})
    return BUTTONS | {"buttons": buttons, "x": 0.0, "xanchor": "left"}


def _axis(
    shown: Sequence[Candidate], cost: str, limits: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """The layout of the x axis for `cost`, with the limits within its range."""
    low, high = _padded([c.costs[cost] for c in shown], 0.04)
    bounds = [limit.get(end) for limit in limits for end in ("min", "max") if limit["cost"] == cost]
    return {
        "xaxis.title.text": _label(cost),
        "xaxis.tickformat": _format(cost),
        "xaxis.range": [low, high],
        "shapes": [
            LIMIT_LINE | {"x0": bound, "x1": bound}
            for bound in bounds
            if bound is not None and low <= bound <= high
        ],
    }


def _fronts(generations: Generations, cost: str) -> list[list[Candidate]]:
    """The Pareto front of all candidates so far, after each generation."""
    fronts: list[list[Candidate]] = [[]]
    for generation in generations:
        fronts.append(pareto_front([*fronts[-1], *generation], cost))
    return fronts[1:]


def _points(candidates: Sequence[Candidate], cost: str, scale: int) -> dict[str, list[float]]:
    return {
        "x": [c.costs[cost] for c in candidates],
        "y": [scale * c.fitness for c in candidates],
    }


def _colour_range(step: int) -> dict[str, float]:
    """The ends of the colour scale when generation `step` is shown."""
    return {"cmin": step - 1, "cmax": step + 1}


def _number(generation: Sequence[Candidate]) -> str:
    return str(generation[0].generation)


def _label(cost: str) -> str:
    return escape(COSTS.get(cost, (cost,))[0])  # plotly reads it as HTML


def _hover_text(cost: str, measure: Fitness) -> str:
    x = f"{_label(cost)} %{{x:{_format(cost)}}}"
    return (
        f"%{{customdata[0]}}<br>{measure.title} %{{y:.2f}} {measure.unit}, {x}"
        "<extra>generation %{customdata[1]}</extra>"
    )


def _format(cost: str) -> str:
    return COSTS.get(cost, (cost, "~s"))[1]


def _padded(values: Sequence[float], share: float) -> list[float]:
    """The range of `values` and a margin on both sides, a `share` of it."""
    low, high = min(values), max(values)
    margin = share * (high - low or abs(high) or 1)
    return [low - margin, high + margin]
