"""What one subnet costs, operation by operation."""

from collections.abc import Sequence

from nasray.costs.micronet import scores
from nasray.costs.operations import OpCount, build_on_meta, count_ops
from nasray.costs.table import COSTS, COUNTS
from nasray.spaces.space import Architecture, Space
from nasray.spaces.supernet import build_subnet


def profile(space: Space, arch: Architecture) -> list[OpCount]:
    """Count `arch` operation by operation, in the order of execution."""
    subnet = build_on_meta(lambda: build_subnet(space.decode(arch)))
    side = space.resolution_of(arch)
    return count_ops(subnet, (1, 3, side, side), between_layers=True)


def total(ops: Sequence[OpCount]) -> dict[str, float]:
    """Sum the counts of `ops` and derive every cost of COSTS."""
    counts = {name: float(sum(getattr(op, name) for op in ops)) for name in COUNTS}
    return {
        cost: sum(weight * counts[count] for count, weight in weights.items())
        for cost, weights in COSTS.items()
    }


def format_table(ops: Sequence[OpCount]) -> str:
    """Format the published profile table (docs/spec.md, OneShot 4.1), counts in millions."""
    lines = [
        f"{'op_name':<38}{'inp_size':>9}{'kernel_size':>12}{'Cin':>6}{'Cout':>6}"
        f"{'params(M)':>11}{'mults(M)':>10}{'adds(M)':>10}{'MFLOPS':>10}"
    ]
    for op in ops:
        if op.listed:
            lines.append(
                f"{op.op_name:<38}{op.inp_size:>9}{op.kernel_size:>12}{op.cin:>6}{op.cout:>6}"
                f"{op.micronet_params / 1e6:>11.3f}{op.mults / 1e6:>10.3f}{op.adds / 1e6:>10.3f}"
                f"{(op.mults + op.adds) / 1e6:>10.3f}"
            )
    sums = total(ops)
    mults, adds = sums["mults"] / 1e6, sums["adds"] / 1e6
    lines.append(
        f"{'total':<71}{sums['micronet_params'] / 1e6:>11.3f}{mults:>10.1f}{adds:>10.1f}"
        f"{mults + adds:>10.1f}"
    )
    lines.append("")
    for row in scores(ops):
        lines.append(
            f"MicroNet score {row.precision} ({row.accumulator} accumulators): {row.score:.4f} = "
            f"{row.params / 1e6:.3f} M / 6.9 M parameters + {row.ops / 1e6:.1f} M / 1170 M "
            "operations"
        )
    lines.append(
        f"As papers count: {sums['params'] / 1e6:.3f} M trainable parameters, "
        f"{sums['macs'] / 1e6:.1f} M MACs"
    )
    return "\n".join(lines)
