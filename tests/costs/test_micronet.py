"""MicroNet scores against the published figures (docs/spec.md, OneShot 4.2 to 4.4)."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nasray.costs.micronet import (
    INT8_KINDS,
    PUBLISHED,
    format_published,
    format_scores,
    int8_as_published,
    scores,
    strict,
)
from nasray.costs.operations import build_on_meta
from nasray.costs.profile import profile
from nasray.errors import UserError
from nasray.spaces import SPACES, space_class
from nasray.spaces.shufflenet import ShuffleNet
from nasray.spaces.supernet import build_subnet
from nasray.spaces.tiny import Tiny

RESULTS = Path(__file__).parents[2] / "docs/results.md"


def s_plus():
    space = ShuffleNet()
    return profile(space, space.named["oneshot-s+"])


def by_kind(ops, *kinds):
    chosen = [op for op in ops if op.kind in kinds]
    return tuple(
        sum(getattr(op, name) for op in chosen) for name in ("micronet_params", "mults", "adds")
    )


def test_what_of_s_plus_can_be_quantised():
    """Convolutions and ReLU, and the rest; the shuffles' masks are all parameters of the rest."""
    ops = s_plus()
    assert by_kind(ops, *INT8_KINDS) == (3520225, 292819840, 286217920)
    rest = {op.kind for op in ops} - set(INT8_KINDS)
    assert by_kind(ops, *rest) == (132000, 6800832, 2104640)
    assert by_kind(ops, "ChannelShuffle")[0] == 132000


def test_scores_of_s_plus():
    """Additions stay at 32 bits at fp16, by the rules, and at int8, with int32 accumulators."""
    fp32, fp16, int8 = scores(s_plus())
    assert [each.precision for each in (fp32, fp16, int8)] == ["fp32", "fp16", "int8"]
    assert [each.accumulator for each in (fp32, fp16, int8)] == ["fp32", "fp32", "int32"]
    assert (fp32.params, fp32.mults, fp32.adds) == (3652225, 299620672, 288322560)
    assert fp32.score == pytest.approx(1.0318, abs=5e-5)
    assert (fp16.params, fp16.mults, fp16.adds) == (1826112.5, 149810336, 288322560)
    assert fp16.ops == 438132896
    assert fp16.score == pytest.approx(0.639, abs=5e-4)
    assert int8.params == 3520225 / 4 + 132000
    assert (int8.mults, int8.adds) == (292819840 / 4 + 6800832, 288322560)
    assert int8.score == pytest.approx(0.461, abs=5e-4)


def test_the_published_int8_count_is_apart_and_says_how_it_counts():
    published = int8_as_published(s_plus())
    assert published.accumulator == "int8"
    assert published.params == 3520225 / 4 + 132000 / 2  # printed: 0.95 M
    assert published.ops == pytest.approx(149.2e6, abs=0.05e6)  # printed: 148 M
    assert published.score == pytest.approx(0.26, abs=5e-3)
    assert published not in scores(s_plus())


def test_scores_by_the_stricter_count():
    """Biases that folding BN leaves, SE's products (docs/spec.md, OneShot 4.4)."""
    ops = s_plus()
    fp32, fp16, int8 = scores(strict(ops))
    assert fp32.params == 3652225 + 10802
    assert fp32.adds - 288322560 == pytest.approx(4.908e6, abs=500)
    assert fp32.mults - 299620672 == pytest.approx(0.314e6, abs=500)
    assert fp32.ops == pytest.approx(593.16e6, abs=1e4)
    assert fp32.score == pytest.approx(1.038, abs=5e-4)
    assert fp16.score == pytest.approx(0.644, abs=5e-4)
    # They are added to 32-bit accumulators, so they stay 32-bit themselves.
    plain = scores(ops)[2]
    assert int8.params == plain.params + 10802
    assert int8.mults - plain.mults == fp32.mults - 299620672


def test_the_stricter_count_adds_no_second_bias():
    """Convolutions of this space have biases, and BN is folded into these."""
    space = Tiny()
    ops = profile(space, space.named["largest"])
    assert any(op.kind == "BatchNorm2d" for op in ops)
    assert scores(strict(ops)) == scores(ops)


def test_the_stricter_count_has_residual_sums():
    space = space_class("ofa_proxyless")(resolution=64, resolutions=(64,))
    ops = profile(space, space.named["largest"])
    blocks = [block for block in space.decode(space.named["largest"]) if block is not None]
    residual = [block for block in blocks if getattr(block, "identity", False)]
    elements = sum(block.out_channels * block.resolution**2 for block in residual)
    folded = sum(op.cin * op.inp_size**2 for op in ops if op.kind == "BatchNorm2d")
    assert elements > 0
    assert scores(strict(ops))[0].adds == scores(ops)[0].adds + folded + elements


class Elementwise(TorchDispatchMode):
    """Elements of all sums and products that torch computes, however they are written."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.strip("_")
        if name in ("add", "mul"):
            self.found.append((name, out[0].numel()))
        return out


@pytest.mark.parametrize("name", SPACES)
def test_no_sum_or_product_of_a_network_is_overlooked(name):
    fields = {field.name for field in dataclasses.fields(space_class(name))}
    sides = {"resolutions": (64,)} if "resolutions" in fields else {}
    space = space_class(name)(resolution=64, **sides)
    arch = list(space.named.values())[-1]
    side = space.resolution_of(arch)
    network = build_on_meta(lambda: build_subnet(space.decode(arch)))
    with torch.no_grad(), Elementwise() as mode:
        network(torch.empty((1, 3, side, side), device="meta"))
    ops = [op for op in profile(space, arch) if op.kind in ("add", "mul")]
    assert [(op.kind, op.cin * op.inp_size**2) for op in ops] == mode.found


def test_what_is_int8_is_for_the_caller_to_say():
    ops = s_plus()
    chosen = scores(ops, lambda op: op.kind in INT8_KINDS)
    assert chosen == scores(ops) == scores(ops, set(INT8_KINDS))
    all_but_one = scores(ops, lambda op: op.kind in INT8_KINDS and op.op_name != "output")[2]
    [output] = [op for op in ops if op.op_name == "output"]
    assert all_but_one.params == scores(ops)[2].params + 0.75 * output.micronet_params
    assert all_but_one.mults == scores(ops)[2].mults + 0.75 * output.mults
    hardswish = by_kind(ops, "Hardswish")
    more = scores(ops, {*INT8_KINDS, "Hardswish"})[2]
    assert scores(ops)[2].mults - more.mults == 0.75 * hardswish[1]
    assert scores(ops)[2].adds == more.adds == 288322560


def test_what_is_not_quantised_has_no_freebie():
    """One quantised operation, and all others count as 32-bit."""
    ops = s_plus()
    int8 = scores(ops, lambda op: op.op_name == "first_conv_fwd")[2]
    assert int8.params == 3652225 - 0.75 * 432


def test_an_unknown_kind_of_operation_is_named():
    with pytest.raises(UserError, match=r"int8: no operation is a 'Conv'; there are .*'Conv2d'"):
        scores(s_plus(), {"Conv"})
    assert scores(s_plus(), {"ReLU6", "Conv2d"})  # S+ has no ReLU6, others do


def test_the_baseline_scores_two():
    [baseline] = [row for row in PUBLISHED if row.network == "MobileNetV2-1.4"]
    assert baseline.recomputed == 2.0


def test_the_published_table_is_right_but_for_two_rows():
    expected = [
        *(3.671, 0.264, 0.6425, 1.0315, 1.068, 1.068, 1.151, 1.154, 1.156),
        *(1.662, 1.732, 1.744, 2.0),
    ]
    assert [row.recomputed for row in PUBLISHED] == pytest.approx(expected, abs=6e-4)
    differing = [row.network for row in PUBLISHED if row.differs]
    assert differing == ["OneShot (ours)", "OneShot (paper)"]
    assert {row.score for row in PUBLISHED if row.differs} == {1.05}


def test_the_published_table_as_text():
    lines = format_published().splitlines()
    assert len(lines) == 1 + 13
    assert lines[4].split() == ["OneShot-S+", "588", "3.65", "1.03", "1.032"]
    assert [line for line in lines if "differs" in line] == lines[5:7]
    assert lines[5].split() == [*"OneShot (ours) 656 3.50 1.05 1.068 differs".split()]


def test_scores_as_text():
    lines = format_scores(scores(s_plus())).splitlines()
    assert lines[1].split() == "fp32 fp32 3.652 299.6 288.3 587.9 1.0318".split()
    assert lines[3].split() == "int8 int32 1.012 80.0 288.3 368.3 0.4615".split()


def test_the_results_page_has_the_same_table():
    text = RESULTS.read_text()
    section = text[text.index("## The MicroNet Challenge's table") :].split("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+)", section, re.M)
    assert [row[0] for row in rows[:13]] == [row.network for row in PUBLISHED]
    for row, (_, ops, params, score, recomputed) in zip(PUBLISHED, rows, strict=False):
        found = (float(ops) * 1e6, float(params) * 1e6, float(score), recomputed)
        assert found == (row.ops, row.params, row.score, f"{row.recomputed:.3f}")
