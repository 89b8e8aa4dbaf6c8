"""The lines in which the OFA code prints a sub-network, and the way back.

Those lines leave out the resolution (docs/spec.md, OFA 1.6); format() adds it as a last line.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from nasray.errors import UserError
from nasray.spaces import ofa_mbconv
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.ofa_proxyless import OfaProxyless
from nasray.spaces.ofa_resnet50d import BASE_WIDTHS, EXPANDS, STAGE_BLOCKS, WIDTHS, OfaResNet50D
from nasray.spaces.space import Architecture

PrintedSpace = OfaMobileNetV3 | OfaProxyless | OfaResNet50D

_MBCONV = re.compile(r"\((SE)?\(O(\d{1,6}), E(\d{1,6})\.0, K(\d)\), (None|Identity)\)")
_DYNAMIC_CONV = re.compile(r"\(?DyConv\(O(\d{1,6}), K3, S(\d)\)(, Identity\))?")
_BOTTLENECK = re.compile(
    r"\(3x3_BottleneckConv_in->(\d{1,6})->(\d{1,6})_S\d, (avgpool_conv|Identity)\)"
)
_RESOLUTION = re.compile(r"resolution (\d{1,6})")


def format(space: PrintedSpace, arch: Architecture) -> list[str]:
    """The lines of `arch`, the last one `resolution R`."""
    lines = _resnet_lines if isinstance(space, OfaResNet50D) else _mbconv_lines
    return [*lines(space, arch), f"resolution {space.resolution_of(arch)}"]


def split(lines: Sequence[str]) -> list[list[str]]:
    """The lines of each of several networks: `resolution R` ends one, if another follows."""
    networks: list[list[str]] = [[]]
    for line in filter(str.strip, lines):
        if networks[-1] and _RESOLUTION.fullmatch(networks[-1][-1].strip()):
            networks.append([])
        networks[-1].append(line)
    return networks


def parse(lines: Sequence[str], space: PrintedSpace, resolution: int | None = None) -> Architecture:
    """Read an architecture of `space`; `resolution` is used if no line gives it.

    Where two choices print the same line, the smaller one is taken. The pooling that some
    versions print is ignored.

    Raises:
        UserError: a line is not the one that format() writes, or there is no resolution.
    """
    given = [line.strip() for line in lines if line.strip() and "GlobalAvgPool2d" not in line]
    if given and (match := _RESOLUTION.fullmatch(given[-1])):
        if resolution not in (None, int(match[1])):
            raise UserError(f"the lines say {given[-1]!r}, not {resolution}")
        resolution = int(match[1])
    else:
        given.append(f"resolution {resolution}")
    if resolution is None:
        raise UserError("the lines do not say the resolution; give it, or end with 'resolution R'")
    read = _read_resnet if isinstance(space, OfaResNet50D) else _read_mbconv
    arch = space.from_json({**read(space, given), "r": resolution})
    wanted = format(space, arch)
    for line, expected in zip(given, wanted, strict=False):
        if line != expected:
            raise UserError(f"{space.name}: the line {line!r} must be {expected!r}")
    if len(given) != len(wanted):
        raise UserError(f"{space.name}: there must be {len(wanted)} lines, got {len(given)}")
    return arch


def _mbconv_lines(space: OfaMobileNetV3 | OfaProxyless, arch: Architecture) -> Iterator[str]:
    stem, fixed, *blocks, head = space.decode(arch)
    expands = space.to_json(arch)["e"]
    yield f"3x3_Conv_O{stem.out_channels}_{stem.act.upper()}_BN"
    yield (
        f"(3x3_MBConv1_{fixed.act.upper()}_O{fixed.out_channels}_BN, {_shortcut(fixed.identity)})"
    )
    for block, expand in zip(blocks, expands, strict=True):
        if block is not None:
            se = "SE" if block.se else ""
            yield (
                f"({se}(O{block.out_channels}, E{expand}.0, K{block.kernel}), "
                f"{_shortcut(block.identity)})"
            )
    if isinstance(space, OfaMobileNetV3):
        yield f"1x1_Conv_O{head.mid_channels}_H_SWISH_BN"
        yield f"1x1_Conv_O{head.out_channels}_H_SWISH"
    else:
        yield f"1x1_Conv_O{head.out_channels}_RELU6_BN"
    yield f"{head.out_channels}x{head.num_classes}_Linear"


def _resnet_lines(space: OfaResNet50D, arch: Architecture) -> Iterator[str]:
    stem, residual, end, *blocks, head = space.decode(arch)
    yield f"DyConv(O{stem.out_channels}, K3, S2)"
    if residual is not None:
        yield f"(DyConv(O{residual.in_channels}, K3, S1), Identity)"
    yield f"DyConv(O{end.out_channels}, K3, S1)"
    yield "max_pooling(ks=3, stride=2)"
    for block in blocks:
        if block is not None:
            shortcut = "Identity" if block.identity else "avgpool_conv"
            yield (
                f"(3x3_BottleneckConv_in->{block.mid_channels}->{block.out_channels}"
                f"_S{block.stride}, {shortcut})"
            )
    yield f"DyLinear({head.num_classes})"


def _shortcut(identity: bool) -> str:
    return "Identity" if identity else "None"


def _read_mbconv(space: OfaMobileNetV3 | OfaProxyless, lines: Sequence[str]) -> dict[str, Any]:
    num_blocks = sum(gene.kind == "kernel" for gene in space.genes)
    places = [min(ofa_mbconv.STAGE_BLOCKS, num_blocks - start) for start in range(0, num_blocks, 4)]
    found = [match for line in lines if (match := _MBCONV.fullmatch(line))]
    stages = _stages(space, found, places, starts=lambda match: match[5] == "None")
    return {
        "ks": _laid_out(stages, places, lambda match: int(match[4])),
        "e": _laid_out(stages, places, lambda match: int(match[3])),
        "d": [len(stage) for stage in stages[: ofa_mbconv.NUM_DEPTHS]],
    }


def _read_resnet(space: OfaResNet50D, lines: Sequence[str]) -> dict[str, Any]:
    convs = [match for line in lines if (match := _DYNAMIC_CONV.fullmatch(line))]
    found = [match for line in lines if (match := _BOTTLENECK.fullmatch(line))]
    stages = _stages(space, found, STAGE_BLOCKS, starts=lambda match: match[3] == "avgpool_conv")
    if len(convs) not in (2, 3):
        raise UserError(f"{space.name}: there must be two or three DyConv lines, got {len(convs)}")
    widths = [int(convs[0][1]), int(convs[-1][1]), *(int(stage[0][2]) for stage in stages)]

    def expand(match: re.Match[str]) -> float:
        mid, out = int(match[1]), int(match[2])
        ratios = {ofa_mbconv.div8(round(out * ratio)): ratio for ratio in reversed(EXPANDS)}
        return _one_of(ratios, mid, f"middle channels of {out}")

    return {
        "w": [
            _one_of(_width_ratios(base * space.width), width, "width")
            for base, width in zip(BASE_WIDTHS, widths, strict=True)
        ],
        "e": _laid_out(stages, STAGE_BLOCKS, expand),
        "d": [
            2 if len(convs) == 3 else 0,
            *(len(stage) - most + 2 for stage, most in zip(stages, STAGE_BLOCKS, strict=True)),
        ],
    }


def _stages(
    space: PrintedSpace,
    matches: Sequence[re.Match[str]],
    places: Sequence[int],
    *,
    starts: Callable[[re.Match[str]], bool],
) -> list[list[re.Match[str]]]:
    """Split the block lines into stages, of at most `places` blocks each."""
    stages: list[list[re.Match[str]]] = []
    for match in matches:
        if starts(match) or not stages:
            stages.append([])
        stages[-1].append(match)
    if len(stages) != len(places):
        raise UserError(
            f"{space.name} has {len(places)} stages, and the lines are of {len(stages)}, of "
            f"{len(matches)} blocks in all; `nasray show` prints how they must be"
        )
    for number, (stage, most) in enumerate(zip(stages, places, strict=True)):
        if len(stage) > most:
            raise UserError(
                f"{space.name}: stage {number} has at most {most} blocks, got {len(stage)}"
            )
    return stages


def _laid_out(
    stages: Sequence[Sequence[re.Match[str]]],
    places: Sequence[int],
    read: Callable[[re.Match[str]], Any],
) -> list[Any]:
    """One value per place of the deepest network, None where there is no block."""
    values: list[Any] = []
    for stage, most in zip(stages, places, strict=True):
        values += [*(read(match) for match in stage), *[None] * (most - len(stage))]
    return values


def _width_ratios(base: float) -> dict[int, float]:
    """Width -> its ratio to `base`."""
    return {ofa_mbconv.div8(base * ratio): ratio for ratio in reversed(WIDTHS)}


def _one_of(choices: dict[int, float], value: int, what: str) -> float:
    if value not in choices:
        raise UserError(f"{what} = {value} must be one of {sorted(choices)}")
    return choices[value]
