"""The page around a report: its skeleton, style sheet and script, and the writing of pieces.

PAGE and SEARCH_CONTROLS are for string.Template. The content security policy keeps the
page from fetching anything; `unsafe-eval` is for the WebGL of plotly's large scatters.
"""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --faint: #69727f; --line: #e3e6ea;
  --page: #f7f8f9; --card: #ffffff; --mark: #3d7fd9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #98a1ad; --line: #2f353d;
  --page: #15181c; --card: #1c2026; --mark: #6aa3ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 32px 24px 64px; max-width: 1160px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { margin: 0; font-size: 28px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { margin: 0 0 4px; font-size: 18px; }
h3 { margin: 16px 0 4px; font-size: 14px; }
.facts { display: flex; flex-wrap: wrap; gap: 2px 18px; color: var(--faint); font-size: 13px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px;
  margin: 20px 0 12px; }
.tile, section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 12px 14px; }
.tile b { display: block; font-size: 24px; font-weight: 600; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
.tile span, .tile small { display: block; line-height: 1.35; }
.tile small { color: var(--faint); font-size: 12px; }
section { padding: 18px 20px; margin: 12px 0; }
section > h3:first-child { margin-top: 0; }
.note { margin: 0 0 8px; max-width: 85ch; color: var(--faint); font-size: 14px; }
.wide { overflow: auto; max-height: 520px; }
table { border-collapse: collapse; width: 100%; font-size: 13px;
  font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: var(--card); color: var(--faint); font-weight: 500;
  text-align: right; padding: 6px 10px; white-space: nowrap; }
td { border-top: 1px solid var(--line); padding: 6px 10px; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.text-last :is(th, td):last-child { text-align: left; }
code { white-space: nowrap; }
code, pre { font: 12px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { overflow: auto; max-height: 520px; margin: 12px 0 0; color: var(--faint); }
summary { cursor: pointer; color: var(--mark); font-size: 14px; padding: 6px 0; }
svg[role=img] { display: block; width: 100%; min-width: 760px; }
svg[role=img] text { fill: var(--ink); font-size: 12px; text-anchor: middle; }
svg[role=img] .faint { fill: var(--faint); font-size: 10.5px; }
svg[role=img] .strong { fill: var(--faint); font-weight: 600; }
svg[role=img] .cell { fill: #ffffff; font-weight: 600; }
svg[role=img] .flow { stroke: var(--line); stroke-width: 3; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 8px 0 0; font-size: 13px; }
.legend i { display: inline-block; width: 11px; height: 11px; margin-right: 6px;
  border-radius: 3px; }
.faint { color: var(--faint); }
.controls { display: flex; flex-wrap: wrap; align-items: center; gap: 10px; margin: 10px 0 4px; }
.controls button { font: inherit; font-size: 13px; padding: 4px 12px; border-radius: 7px;
  border: 1px solid var(--line); background: none; color: var(--ink); cursor: pointer; }
.controls button[aria-pressed=true] { border-color: var(--mark); color: var(--mark); }
.controls input { flex: 1; min-width: 140px; accent-color: var(--mark); }
.controls output { min-width: 8.5em; text-align: right; font-size: 13px; color: var(--faint);
  font-variant-numeric: tabular-nums; }
.js-plotly-plot text { fill: var(--ink) !important; }
.js-plotly-plot .hoverlayer text { fill: #f2f4f6 !important; }
.js-plotly-plot .hoverlayer .hovertext rect { fill: var(--card) !important; }
.js-plotly-plot .hoverlayer .hovertext .name { fill: var(--ink) !important; }
.js-plotly-plot .gridlayer path { stroke: var(--line) !important; }
@media print { body { max-width: none; } section, .tile { break-inside: avoid; } }
"""

PAGE = (
    """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';
 script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:">
<title>$title</title>
<style>"""
    + STYLE
    + """</style>
$plotly
</head>
<body>
<header><h1>$title</h1><div class="facts">$facts</div></header>
$body
</body>
</html>
"""
)

# Fills the empty figure #search-plot: traces 0 earlier, 1 this generation, 2 front, 3 winner.
SEARCH_SCRIPT = """
(() => {
  const data = JSON.parse(document.getElementById("search-data").textContent);
  const plot = document.getElementById("search-plot");
  const find = (selector) => document.querySelector("#search-controls " + selector);
  const [slider, play, label] = [find("input"), find(".play"), find("output")];
  const buttons = [...document.querySelectorAll("#search-controls [data-cost]")];
  const count = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);
  const padded = (values, share) => {
    const [low, high] = values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)],
      [Infinity, -Infinity]);
    const margin = share * (high - low || Math.abs(high) || 1);
    return [low - margin, high + margin];
  };
  const heights = padded(data.top1, 0.06);
  let chosen = 0;
  let timer = null;

  function show() {
    const step = Number(slider.value);
    const cost = data.costs[chosen];
    const traces = [
      count(0, data.starts[step]),
      count(data.starts[step], data.starts[step + 1]),
      cost.fronts[step],
      data.winners,
    ];
    const hover = "%{customdata[0]}<br>top-1 %{y:.2f} %, " + cost.label + " %{x:" + cost.format
      + "}<extra>generation %{customdata[1]}</extra>";
    const pick = (values) => traces.map((indices) => indices.map((i) => values[i]));
    const range = padded(cost.x, 0.04);
    const limits = cost.limits.filter((limit) => limit >= range[0] && limit <= range[1]);
    Plotly.update(plot, {
      x: pick(cost.x),
      y: pick(data.top1),
      customdata: traces.map((indices) => indices.map((i) => [data.arch[i], data.generation[i]])),
      hovertemplate: hover,
    }, {
      "xaxis.title.text": cost.label,
      "xaxis.tickformat": cost.format,
      "xaxis.range": range,
      "yaxis.range": heights,
      shapes: limits.map((limit) => ({ type: "line", x0: limit, x1: limit, yref: "paper", y0: 0,
        y1: 1, line: { color: "#8a94a3", dash: "dot", width: 1.5 }, label: { text: "limit",
        textposition: "end", textangle: 0, xanchor: "right", yanchor: "top" } })),
    }, [0, 1, 2, 3]);
    const first = data.generation[data.starts[step]];
    label.textContent = "generation " + first;
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === chosen));
  }

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }

  function advance() {
    if (slider.value === slider.max) return stop();
    slider.value = Number(slider.value) + 1;
    show();
  }

  buttons.forEach((button, i) => button.addEventListener("click", () => { chosen = i; show(); }));
  slider.addEventListener("input", () => { stop(); show(); });
  play.addEventListener("click", () => {
    if (timer) return stop();
    if (slider.value === slider.max) { slider.value = 0; show(); }
    play.textContent = "Pause";
    timer = setInterval(advance, 600);
  });
  show();
})();
"""

SEARCH_CONTROLS = (
    """<div class="controls" id="search-controls">$buttons
<button type="button" class="play">Play</button>
<input type="range" min="0" max="$last" value="$last" step="1" aria-label="generation">
<output></output></div>
$plot
<script type="application/json" id="search-data">$data</script>
<script>"""
    + SEARCH_SCRIPT
    + "</script>"
)


def section(title: str, content: str, note: str = "") -> str:
    note = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note}{content}</section>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_last: bool = False) -> str:
    """Write a table. Cells are HTML already; the first column is text, perhaps the last too."""
    head = "".join(f"<th>{escape(str(name))}</th>" for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{content}</td>' for content in row)}</tr>" for row in rows)
    kind = ' class="text-last"' if text_last else ""
    return f'<div class="wide"><table{kind}><tr>{head}</tr>{body}</table></div>'


def embed(figure: "Figure", name: str) -> str:
    from plotly.io import to_html

    return to_html(
        figure,
        full_html=False,
        include_plotlyjs=False,  # once, in the head
        div_id=name,
        config={
            "responsive": True,
            "displaylogo": False,
            "modeBarButtons": [["toImage", "resetScale2d"]],
            "plotlyServerURL": "",  # plotly 6 would name its own
        },
    )


def plotly_script(body: str) -> str:
    if "plotly-graph-div" not in body:
        return ""
    from plotly.offline import get_plotlyjs

    return f"<script>{get_plotlyjs()}</script>"


def cell(value: Any) -> str:
    return escape(number(value))


def number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.1f}"
    return f"{int(value):,}" if isinstance(value, int | float) else str(value)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def amount(cost: str, value: float | None) -> str:
    if value is None:
        return ""
    if cost == "micronet_score":
        return f"{value:.3f}"
    return f"{value / 1e6:.2f} M" if value < 1e8 else f"{value / 1e6:.1f} M"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
