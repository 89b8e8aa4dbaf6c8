"""How a report becomes a page: its template, its figures as HTML, its numbers as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of the page. Cells that are no Markup are escaped."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    total: Sequence[str] = ()  # the last row, in bold
    text_last: bool = False  # whether the last column is text, as the first one always is


def render(**values: Any) -> str:
    """Fill templates/report.html.j2, which says which values it takes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("nasray.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.j2").render(values)


def embed(figure: "Figure", name: str) -> Markup:
    """The HTML of a figure whose element has the id `name`."""
    from plotly.io import to_html

    html = to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,  # once, in the head
        auto_play=False,
        div_id=name,
        config={
            "responsive": True,
            "displaylogo": False,
            "modeBarButtons": [["toImage", "resetScale2d"]],
            "plotlyServerURL": "",  # plotly 6 would name its own
        },
    )
    return Markup(html)


def plotly_script() -> Markup:
    """The code of plotly.js, which every figure needs."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())


def number(value: Any) -> str:
    """A value of any type as a table shows it; None is empty."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def percent(fraction: float) -> str:
    """0.5 is "50.00 %"."""
    return f"{100 * fraction:.2f} %"


def percent_of(fraction: float, number: int | None) -> str:
    """A fraction of `number` images with its standard error: "50.00 % ± 0.50"; None: without."""
    error = f" ± {100 * (fraction * (1 - fraction) / number) ** 0.5:.2f}" if number else ""
    return f"{percent(fraction)}{error}"


def amount(cost: str, value: float | None) -> str:
    """A cost: counts in millions; None is empty."""
    if value is None:
        return ""
    if cost == "micronet_score":
        return f"{value:.3f}"
    return f"{value / 1e6:.2f} M" if value < 1e8 else f"{value / 1e6:.1f} M"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever has few digits."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
