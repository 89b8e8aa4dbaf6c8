"""The MicroNet Challenge's score of a network, and what one of its entries published.

The organisers' rules (docs/spec.md, OneShot 4.4): parameters / 6.9 M + operations / 1170 M. A
value of b bits counts b/32, an operation by its widest input. A network that quantises nothing
may count parameters and multiplications as 16-bit, its additions stay 32-bit.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nasray.errors import UserError

if TYPE_CHECKING:
    from nasray.costs.operations import OpCount

# MobileNetV2-1.4, the baseline on ImageNet: score 2.0 by definition.
MICRONET_PARAMS, MICRONET_OPS = 6.9e6, 1170e6

# Kinds of operations that are int8 unless told otherwise. A fully connected layer is a
# convolution on one pixel.
INT8_KINDS = ("Conv2d", "Linear", "ReLU", "ReLU6")

# Kinds that an exported int8 network leaves as they are: onnxruntime computes the first two in
# float, masks of shuffles have a bit per value, and biases (of BN) the 32 bits of a sum.
NOT_INT8_KINDS = ("SiLU", "Sigmoid", "ChannelShuffle", "BatchNorm2d")

# Which operations are int8: their kinds, or a function of one operation.
Int8 = Callable[["OpCount"], bool] | Collection[str]


@dataclass(frozen=True)
class Score:
    """A network's MicroNet score at one precision, with the accumulators it assumes.

    The counts are weighted by bits: a 32-bit parameter or operation is 1.
    """

    precision: str
    accumulator: str
    params: float
    mults: float
    adds: float

    @property
    def ops(self) -> float:
        """Multiplications and additions."""
        return self.mults + self.adds

    @property
    def score(self) -> float:
        """Parameters and operations relative to those of the baseline, added up."""
        return _score(self.params, self.ops)

    def to_json(self) -> dict[str, Any]:
        """Return the fields with `ops` and `score`."""
        return {**vars(self), "ops": self.ops, "score": self.score}


def scores(ops: Sequence["OpCount"], int8: Int8 = INT8_KINDS) -> list[Score]:
    """Score the operations of one network at fp32, fp16 and int8, by the organisers' rules.

    Accumulators are 32 bits wide, so additions always count in full. With int8, what `int8`
    leaves out counts as 32-bit.

    Args:
        ops: of the network, as profile() returns them.
        int8: which of them are int8: kinds of operations, or a function that says so of one.

    Raises:
        UserError: `int8` holds a kind that is no operation's.
    """
    params, mults, adds = _sums(ops)
    params8, mults8, _ = _sums(filter(_chosen(ops, int8), ops))
    return [
        Score("fp32", "fp32", params, mults, adds),
        Score("fp16", "fp32", params / 2, mults / 2, adds),
        Score("int8", "int32", params - 0.75 * params8, mults - 0.75 * mults8, adds),
    ]


def int8_as_published(ops: Sequence["OpCount"], int8: Int8 = INT8_KINDS) -> Score:
    """Score int8 as the entry OneShot-S+ published it, to compare with; the rules forbid it.

    It divides the additions of int8 operations by 4, too, and counts what is not int8 at 16 bits.

    Raises:
        UserError: `int8` holds a kind that is no operation's.
    """
    whole = _sums(ops)
    quantised = _sums(filter(_chosen(ops, int8), ops))
    counts = (part / 4 + (total - part) / 2 for total, part in zip(whole, quantised, strict=True))
    return Score("int8", "int8", *counts)


def strict(ops: Sequence["OpCount"]) -> list["OpCount"]:
    """Return `ops` with what the published count forgets: biases, products, sums.

    Folding BN into a convolution leaves a bias, which is stored and added. It stays 32-bit beside
    int8 weights, for it is added to a 32-bit accumulator. SE multiplies, residual blocks add.
    """
    counted: list[OpCount] = []
    for op in ops:
        elements = op.cin * op.inp_size**2
        if op.kind == "BatchNorm2d" and not _has_bias(counted[-1]):
            op = replace(op, micronet_params=op.cin, adds=elements)
        elif op.kind == "mul":
            op = replace(op, mults=elements)
        elif op.kind == "add":
            op = replace(op, adds=elements)
        counted.append(op)
    return counted


def _has_bias(conv: "OpCount") -> bool:
    """Whether a convolution has a bias: without one, it adds one product less than it has."""
    return conv.adds == conv.mults


def _score(params: float, ops: float) -> float:
    return params / MICRONET_PARAMS + ops / MICRONET_OPS


def _sums(ops: Iterable["OpCount"]) -> tuple[float, float, float]:
    """The parameters, multiplications and additions of `ops`."""
    counts = [(op.micronet_params, op.mults, op.adds) for op in ops]
    params, mults, adds = map(sum, zip((0, 0, 0), *counts, strict=True))
    return params, mults, adds


def _chosen(ops: Sequence["OpCount"], int8: Int8) -> Callable[["OpCount"], bool]:
    """Whether an operation of `ops` is int8."""
    if callable(int8):
        return int8
    kinds = {op.kind for op in ops}
    if unknown := set(int8) - kinds - set(INT8_KINDS):
        raise UserError(f"int8: no operation is a {min(unknown)!r}; there are {sorted(kinds)}")
    return lambda op: op.kind in int8


@dataclass(frozen=True)
class PublishedRow:
    """A row of the published table, as printed there."""

    network: str
    ops: float
    params: float
    score: float

    @property
    def recomputed(self) -> float:
        """The score of the printed operations and parameters."""
        return _score(self.params, self.ops)

    @property
    def differs(self) -> bool:
        """Whether the printed score is not the recomputed one, rounded as printed."""
        return f"{self.recomputed:.2f}" != f"{self.score:.2f}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields with `recomputed` and `differs`."""
        return {**vars(self), "recomputed": self.recomputed, "differs": self.differs}


# The table of the entry OneShot-S+ (CanyonWind/Single-Path-One-Shot-NAS-MXNet, README.md of
# MicroNetChallenge/ at 9c735f0, 2019-10-11). Operations are twice the MACs of the papers, but
# those of OneShot-S+ itself count activations and pooling, too.
PUBLISHED = (
    PublishedRow("OneShot-S+ supernet", 1684e6, 15.4e6, 3.67),
    PublishedRow("OneShot-S+, int8", 148e6, 0.95e6, 0.26),
    PublishedRow("OneShot-S+, float16", 438e6, 1.85e6, 0.64),
    PublishedRow("OneShot-S+", 588e6, 3.65e6, 1.03),
    PublishedRow("OneShot (ours)", 656e6, 3.5e6, 1.05),
    PublishedRow("OneShot (paper)", 656e6, 3.5e6, 1.05),
    PublishedRow("MnasNet", 634e6, 4.2e6, 1.15),
    PublishedRow("MobileNetV3-large", 434e6, 5.4e6, 1.15),
    PublishedRow("FBNet-B", 590e6, 4.5e6, 1.16),
    PublishedRow("DARTS", 1148e6, 4.7e6, 1.66),
    PublishedRow("NASNet-A", 1128e6, 5.3e6, 1.73),
    PublishedRow("PNASNet", 1176e6, 5.1e6, 1.74),
    PublishedRow("MobileNetV2-1.4", 1170e6, 6.9e6, 2.00),
)


def format_scores(rows: Sequence[Score]) -> str:
    """Format scores as a table, counts in millions."""
    lines = [
        f"{'precision':<11}{'accumulator':<13}{'params(M)':>9}{'mults(M)':>10}{'adds(M)':>10}"
        f"{'ops(M)':>10}{'score':>9}"
    ]
    for row in rows:
        counts = f"{row.mults / 1e6:>10.1f}{row.adds / 1e6:>10.1f}{row.ops / 1e6:>10.1f}"
        lines.append(
            f"{row.precision:<11}{row.accumulator:<13}{row.params / 1e6:>9.3f}{counts}"
            f"{row.score:>9.4f}"
        )
    return "\n".join(lines)


def format_published() -> str:
    """Format the published table, counts in millions, with each score recomputed."""
    lines = [f"{'network':<22}{'ops(M)':>8}{'params(M)':>11}{'published':>11}{'recomputed':>12}"]
    for row in PUBLISHED:
        lines.append(
            f"{row.network:<22}{row.ops / 1e6:>8.0f}{row.params / 1e6:>11.2f}{row.score:>11.2f}"
            f"{row.recomputed:>12.3f}{'  differs' if row.differs else ''}"
        )
    return "\n".join(lines)
