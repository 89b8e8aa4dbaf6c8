"""What one subnet costs, operation by operation, and its MicroNet scores."""

from collections.abc import Sequence
from dataclasses import dataclass

from nasray.costs.operations import OpCount, build_on_meta, count_ops
from nasray.costs.table import COSTS, COUNTS, MICRONET_OPS, MICRONET_PARAMS
from nasray.spaces.space import Architecture, Space
from nasray.spaces.supernet import build_subnet


def profile(space: Space, arch: Architecture) -> list[OpCount]:
    """Count `arch` operation by operation, in the order of execution."""
    subnet = build_on_meta(lambda: build_subnet(space.decode(arch)))
    return count_ops(subnet, (1, 3, space.resolution_of(arch), space.resolution_of(arch)))


def total(ops: Sequence[OpCount]) -> dict[str, float]:
    """Sum the counts of `ops` and derive every cost of COSTS."""
    counts = {name: float(sum(getattr(op, name) for op in ops)) for name in COUNTS}
    return {
        cost: sum(weight * counts[count] for count, weight in weights.items())
        for cost, weights in COSTS.items()
    }


@dataclass(frozen=True)
class MicroNetRow:
    """A network's MicroNet score at one precision, with the accumulators it assumes."""

    precision: str
    accumulator: str
    params: float
    ops: float

    @property
    def score(self) -> float:
        """The MicroNet Challenge's score: both counts relative to its baselines, added up."""
        return self.params / MICRONET_PARAMS + self.ops / MICRONET_OPS


def micronet_rows(ops: Sequence[OpCount]) -> list[MicroNetRow]:
    """The MicroNet counts at fp32, fp16 and int8, by the rules of docs/spec.md, OneShot 4.4.

    A b-bit parameter or multiplication counts b/32. fp16 is the rules' free storage and
    multiplication width for a network that quantises nothing: additions stay 32-bit. int8
    covers convolutions and ReLU with int32 accumulators, so additions count in full, and
    whatever is not quantised counts as 32-bit.
    """
    totals = total(ops)
    rest = total([op for op in ops if not op.quantizable])
    params, mults, adds = totals["micronet_params"], totals["mults"], totals["adds"]
    int8_params = (params - rest["micronet_params"]) / 4 + rest["micronet_params"]
    int8_mults = (mults - rest["mults"]) / 4 + rest["mults"]
    return [
        MicroNetRow("fp32", "fp32", params, mults + adds),
        MicroNetRow("fp16", "fp32", params / 2, mults / 2 + adds),
        MicroNetRow("int8", "int32", int8_params, int8_mults + adds),
    ]


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
    for row in micronet_rows(ops):
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
