"""An architecture as text and as a drawing (SVG)."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from nasray.report.figures import SERIES

OPS = ("shuffle 3&times;3", "shuffle 5&times;5", "shuffle 7&times;7", "xception 3&times;3")
NUM_SCALES = 10  # 0.2, 0.4, ... 2.0 of half the output channels
STAGE_REPEATS = (4, 4, 8, 4)  # blocks of each stage, where there are 20


def arch_text(genes: Sequence[int], *, paired: bool, separator: str) -> str:
    """Write genes compactly, in one row per kind if they are `paired`.

    Paired genes alternate between operation and channel scale.
    """
    if not paired:
        return "-".join(map(str, genes))
    rows = []
    for name, choices in (("block", genes[0::2]), ("channel", genes[1::2])):
        digits = "".join(map(str, choices))
        rows.append(f"{name} {' '.join(digits[i : i + 4] for i in range(0, len(digits), 4))}")
    return separator.join(rows)


def architecture_svg(entry: dict[str, Any]) -> Markup:
    """Draw an architecture: block by block if it has operations and scales, else its genes."""
    arch = entry["arch"]
    if isinstance(arch, dict) and set(arch) == {"block", "channel"}:
        ops, scales = arch["block"], arch["channel"]
        known = all(type(op) is int and 0 <= op < len(OPS) for op in ops) and all(
            type(scale) is int and 0 <= scale < NUM_SCALES for scale in scales
        )
        if known and ops and len(ops) == len(scales):
            return Markup(_blocks_svg(ops, scales))
    return Markup(_genes_svg([int(gene) for gene in entry["genes"]]))


def _blocks_svg(ops: Sequence[int], scales: Sequence[int]) -> str:
    repeats = STAGE_REPEATS if len(ops) == sum(STAGE_REPEATS) else (len(ops),)
    bar, step, gap, middle, unit = 36, 46, 26, 118, 8.5  # px; unit: half height of 0.2
    parts, x, index = [], 34, 0
    for stage, repeat in enumerate(repeats, start=1):
        centre = x + (step * repeat - (step - bar)) / 2
        if len(repeats) > 1:
            parts.append(f'<text x="{centre}" y="14" class="strong">stage {stage}</text>')
        for _ in range(repeat):
            op, half = ops[index], (scales[index] + 1) * unit
            scale = (scales[index] + 1) / 5
            parts.append(
                f"<g><title>block {index}: {OPS[op]}, scale {scale:.1f}</title>"
                f'<rect x="{x}" y="{middle - half}" width="{bar}" height="{2 * half}" rx="4"'
                f' fill="{SERIES[op]}"/></g>'
                f'<text x="{x + bar / 2}" y="222">{scale:.1f}</text>'
                f'<text x="{x + bar / 2}" y="240" class="faint">{index}</text>'
            )
            x, index = x + step, index + 1
        x += gap
    width = x - gap + 34
    flow = f'<line x1="6" x2="{width - 6}" y1="{middle}" y2="{middle}" class="flow"/>'
    legend = "".join(
        f'<span><i style="background:{SERIES[op]}"></i>{name}</span>' for op, name in enumerate(OPS)
    )
    return (
        f'<svg viewBox="0 0 {width} 248" role="img" aria-label="architecture">{flow}'
        f'{"".join(parts)}</svg><p class="legend">{legend}<span class="faint">height and upper '
        "number: channel scale, of half the output channels; lower number: block</span></p>"
    )


def _genes_svg(genes: Sequence[int]) -> str:
    columns, side = 20, 50
    cells = []
    for index, gene in enumerate(genes):
        x, y = index % columns * side, index // columns * (side + 14)
        cells.append(
            f'<g><title>gene {index}: choice {gene}</title><rect x="{x + 2}" y="{y + 2}" '
            f'width="{side - 4}" height="{side - 16}" rx="4" fill="{SERIES[gene % len(SERIES)]}" '
            f'opacity="{0.95 if gene < len(SERIES) else 0.6}"/>'
            f'<text x="{x + side / 2}" y="{y + 24}" class="cell">{gene}</text>'
            f'<text x="{x + side / 2}" y="{y + 50}" class="faint">{index}</text></g>'
        )
    height = -(-len(genes) // columns) * (side + 14)
    return (
        f'<svg viewBox="0 0 {columns * side} {height}" role="img" aria-label="genes">'
        f'{"".join(cells)}</svg><p class="legend"><span class="faint">a cell is a gene; its number '
        "and colour are the choice</span></p>"
    )
