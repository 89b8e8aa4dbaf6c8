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
TRACES_PER_COST = 3  # candidates, front, winners; only those of the chosen cost are visible


def search_figure(
    generations: Generations,
    costs: Sequence[str],
    *,
    paired: bool,
    limits: Sequence[dict[str, Any]],
    winners: Sequence[Sequence[int]],
) -> "Figure":
    """Plot all candidates and the Pareto front after each generation.

    Args:
        generations: candidates that were evaluated.
        costs: names of costs, one of which is the x axis; the first one at the beginning.
        paired: whether genes alternate between operation and channel scale.
        limits: what the search was held to, as search.json has it.
        winners: genes of the architectures that are marked.
    """
    import plotly.graph_objects as go

    fronts = {cost: _fronts(generations, cost) for cost in costs}
    last = len(generations) - 1
    figure = go.Figure(_legend())
    for cost in costs:
        figure.add_traces(_traces(generations, cost, fronts[cost][last], paired, winners))
    for index, trace in enumerate(figure.data):
        trace.visible = index < 2 + TRACES_PER_COST
    figure.frames = [_frame(figure, generations, step, fronts) for step in range(len(generations))]
    top1 = [100 * c.fitness for generation in generations for c in generation]
    figure.update_yaxes(
        title_text="top-1 on the hold-out images, %", range=_padded(top1, 0.06), autorange=False
    )
    axes = [_axis(generations, cost, limits) for cost in costs]
    figure.update_layout(axes[0], sliders=[_slider(generations)], updatemenus=[_player()])
    if len(costs) > 1:
        figure.update_layout(updatemenus=[_player(), _cost_buttons(costs, axes)])
    return finish(figure, height=520).update_layout(
        margin_t=84, legend={"itemclick": False, "itemdoubleclick": False}
    )


def _legend() -> list[Any]:
    """What stands in the legend for the two colours of the candidates."""
    import plotly.graph_objects as go

    def dot(name: str, color: str) -> Any:
        return go.Scatter(x=[None], y=[None], name=name, mode="markers", marker_color=color)

    return [dot("earlier generations", EARLIER), dot("this generation", BLUE)]


def _traces(
    generations: Generations,
    cost: str,
    front: list[Candidate],
    paired: bool,
    winners: Sequence[Sequence[int]],
) -> list[Any]:
    import plotly.graph_objects as go

    label, number_format = _label(cost), _format(cost)
    shown = [c for generation in generations for c in generation]
    by_arch = {c.arch: c for c in reversed(shown)}
    marked = [by_arch[tuple(arch)] for arch in winners if tuple(arch) in by_arch]
    scatter = go.Scattergl if len(shown) > MAX_SVG_POINTS else go.Scatter
    return [
        scatter(
            **_points(shown, cost),
            mode="markers",
            marker={
                "size": 7,
                "color": [step for step, each in enumerate(generations) for _ in each],
                "colorscale": COLORSCALE,
                **_colour_range(len(generations) - 1),
            },
            customdata=[
                [arch_text(c.arch, paired=paired, separator="<br>"), c.generation] for c in shown
            ],
            hovertemplate=f"%{{customdata[0]}}<br>top-1 %{{y:.2f}} %, {label} "
            f"%{{x:{number_format}}}<extra>generation %{{customdata[1]}}</extra>",
            showlegend=False,
        ),
        # The points of these two lie on candidates, which have the text to hover.
        go.Scatter(
            **_points(front, cost),
            name="Pareto front so far",
            mode="lines+markers",
            line={"color": ORANGE, "width": 2, "shape": "hv"},
            marker={"size": 5},
            hoverinfo="skip",
        ),
        go.Scatter(
            **_points(marked, cost),
            name="winner",
            mode="markers",
            marker={"color": RED, "size": 14, "symbol": "star"},
            hoverinfo="skip",
        ),
    ]


def _frame(
    figure: "Figure", generations: Generations, step: int, fronts: dict[str, list[list[Candidate]]]
) -> Any:
    """What changes in the traces of every cost when the slider comes to `step`."""
    import plotly.graph_objects as go

    changes, traces = [], []
    for index, (cost, of_steps) in enumerate(fronts.items()):
        first = 2 + TRACES_PER_COST * index
        traces += [first, first + 1]
        changes += [
            type(figure.data[first])(marker=_colour_range(step)),
            go.Scatter(**_points(of_steps[step], cost)),
        ]
    return go.Frame(name=_number(generations[step]), data=changes, traces=traces)


def _slider(generations: Generations) -> dict[str, Any]:
    now = {"mode": "immediate", "frame": {"duration": 0}, "transition": {"duration": 0}}
    return {
        "active": len(generations) - 1,
        "currentvalue": {"prefix": "generation ", "xanchor": "right"},
        "pad": {"t": 36},
        "bgcolor": GREY,
        "bordercolor": GREY,
        "tickcolor": GREY,
        "steps": [
            {
                "label": _number(generation),
                "method": "animate",
                "args": [[_number(generation)], now],
            }
            for generation in generations
        ],
    }


def _player() -> dict[str, Any]:
    """The buttons that play the generations one after the other, and stop that."""
    play = {
        "frame": {"duration": FRAME_MS},
        "transition": {"duration": 0},
        "fromcurrent": True,
        "mode": "immediate",
    }
    stop = play | {"frame": {"duration": 0}}
    return _buttons(
        [
            {"label": "Play", "method": "animate", "args": [None, play]},
            {"label": "Pause", "method": "animate", "args": [[None], stop]},
        ],
        x=0.94,  # left of the mode bar
        xanchor="right",
        showactive=False,
    )


def _cost_buttons(costs: Sequence[str], axes: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The buttons that choose the cost of the x axis."""

    def visible(chosen: int) -> list[bool]:
        return [True, True] + [
            index == chosen for index in range(len(costs)) for _ in range(TRACES_PER_COST)
        ]

    return _buttons(
        [
            {"label": _label(cost), "method": "update", "args": [{"visible": visible(index)}, axis]}
            for index, (cost, axis) in enumerate(zip(costs, axes, strict=True))
        ],
        x=0.0,
        xanchor="left",
    )


def _buttons(buttons: list[dict[str, Any]], **place: Any) -> dict[str, Any]:
    return {
        "type": "buttons",
        "direction": "right",
        "buttons": buttons,
        "y": 1.12,
        "yanchor": "bottom",
        "pad": {"t": 0, "b": 0, "l": 0, "r": 0},
        "bgcolor": GREY,
        "bordercolor": GREY,
        **place,
    }


def _axis(generations: Generations, cost: str, limits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The layout of the x axis for `cost`, with the limits within its range."""
    low, high = _padded([c.costs[cost] for each in generations for c in each], 0.04)
    bounds = [limit.get(end) for limit in limits for end in ("min", "max") if limit["cost"] == cost]
    return {
        "xaxis.title.text": _label(cost),
        "xaxis.tickformat": _format(cost),
        "xaxis.range": [low, high],
        "shapes": [
            {
                "type": "line",
                "x0": bound,
                "x1": bound,
                "yref": "paper",
                "y0": 0,
                "y1": 1,
                "line": {"color": GREY, "dash": "dot", "width": 1.5},
                "label": {
                    "text": "limit",
                    "textposition": "end",
                    "textangle": 0,
                    "xanchor": "right",
                    "yanchor": "top",
                },
            }
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


def _points(candidates: Sequence[Candidate], cost: str) -> dict[str, list[float]]:
    return {
        "x": [c.costs[cost] for c in candidates],
        "y": [100 * c.fitness for c in candidates],
    }


def _colour_range(step: int) -> dict[str, float]:
    """The ends of the colour scale when generation `step` is shown."""
    return {"cmin": step - 1, "cmax": step + 1}


def _number(generation: Sequence[Candidate]) -> str:
    return str(generation[0].generation)


def _label(cost: str) -> str:
    return escape(COSTS.get(cost, (cost,))[0])  # plotly reads it as HTML


def _format(cost: str) -> str:
    return COSTS.get(cost, (cost, "~s"))[1]


def _padded(values: Sequence[float], share: float) -> list[float]:
    """The range of `values` and a margin on both sides, a `share` of it."""
    low, high = min(values), max(values)
    margin = share * (high - low or abs(high) or 1)
    return [low - margin, high + margin]
