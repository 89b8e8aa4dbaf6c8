"""OneShot+ ShuffleNet space: 20 choice blocks x 4 operations x 10 channel scales.

Guo et al. 2019 (Single Path One-Shot, arXiv 1904.00420) with the channel choices, SE,
hard-swish and heads of OneShot+ / OneShot-S+ (CanyonWind 2019); facts in docs/spec.md, OneShot 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nasray.errors import UserError
from nasray.spaces.shufflenet_blocks import (
    OPS,
    STEM_CHANNELS,
    Head,
    ShuffleBlock,
    Stem,
    copy_first_operation,
)
from nasray.spaces.space import (
    Architecture,
    Block,
    Gene,
    Population,
    check_architecture,
    index_lists,
)
from nasray.spaces.supernet import Supernet

SCALES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)  # of half the output channels
STAGE_REPEATS = (4, 4, 8, 4)  # choice blocks; the first of each stage has stride 2
LAYOUTS = {"oneshot": (64, 160, 320, 640), "shufflenetv2plus": (48, 128, 256, 512)}
HEADS = ("after_pooling", "shufflenetv2plus", "spos")

# (block, channel) of published architectures. oneshot-s+: CanyonWind, MicroNet Challenge
# 2019. oneshot: the encoding of the SPOS paper, which OneShot and OneShot+ share.
PUBLISHED = {
    "oneshot-s+": (
        (0, 0, 0, 1, 0, 0, 1, 0, 3, 2, 0, 1, 2, 2, 1, 2, 0, 0, 2, 0),
        (8, 7, 6, 8, 5, 7, 3, 4, 2, 4, 2, 3, 4, 5, 6, 6, 3, 3, 4, 6),
    ),
    "oneshot": (
        (0, 0, 3, 1, 1, 1, 0, 0, 2, 0, 2, 1, 1, 0, 2, 0, 2, 1, 3, 2),
        (6, 5, 3, 5, 2, 6, 3, 4, 2, 5, 7, 5, 4, 6, 7, 4, 4, 5, 4, 3),
    ),
}


@dataclass(frozen=True)
class ShuffleNet:
    """The space, for one layout, head and input; `se` also switches hard-swish and dropout."""

    name = "shufflenet"

    num_classes: int = 1000
    resolution: int = 224
    layout: str = "oneshot"
    head: str = "after_pooling"
    se: bool = True
    first_scale: int = 2  # search draws SCALES[first_scale:]; 0 opens all ten

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise UserError(f"space.layout = {self.layout!r} must be one of {list(LAYOUTS)}")
        if self.head not in HEADS:
            raise UserError(f"space.head = {self.head!r} must be one of {list(HEADS)}")
        if self.se and self.head == "spos":
            raise UserError('space.head = "spos" has no SE form; set se = false')
        if not self.se and self.head == "shufflenetv2plus":
            raise UserError('space.head = "shufflenetv2plus" has SE; set se = true')
        if not 0 <= self.first_scale < len(SCALES):
            raise UserError(f"space.first_scale = {self.first_scale} must be 0...9")
        if self.resolution < 32 or self.resolution % 32:
            raise UserError(f"space.resolution = {self.resolution} must be a multiple of 32")

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        return tuple(
            gene
            for index in range(sum(STAGE_REPEATS))
            for gene in (
                Gene(f"block{index}.op", "op", OPS),
                Gene(f"block{index}.scale", "scale", SCALES, self.first_scale),
            )
        )

    @cached_property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        return ((), *((2 * index, 2 * index + 1) for index in range(sum(STAGE_REPEATS))), ())

    @property
    def named(self) -> Mapping[str, Architecture]:
        return {
            name: self.from_json({"block": list(block), "channel": list(channel)})
            for name, (block, channel) in PUBLISHED.items()
        }

    def resolution_of(self, arch: Architecture) -> int:
        return self.resolution

    def decode(self, arch: Architecture) -> tuple[Block, ...]:
        blocks: list[Block] = [Stem("stem", self.resolution, self.se)]
        in_channels, resolution = STEM_CHANNELS, self.resolution // 2
        genes = iter(arch)
        for index, (stage, out_channels, stride) in enumerate(_geometry(self.layout)):
            op, scale = OPS[next(genes)], SCALES[next(genes)]
            blocks.append(
                ShuffleBlock(
                    name=f"SNB{index}",
                    op=op,
                    in_channels=in_channels,
                    mid_channels=int(out_channels // 2 * scale),  # truncated, never rounded
                    out_channels=out_channels,
                    stride=stride,
                    resolution=resolution,
                    hardswish=self.se and stage >= 1,
                    se=self.se and stage >= 2,
                )
            )
            in_channels, resolution = out_channels, resolution // stride
        blocks.append(Head("head", in_channels, resolution, self.num_classes, self.head, self.se))
        return tuple(blocks)

    def canonical(self, population: Population) -> Population:
        return population  # every gene always has an effect

    def max_blocks(self) -> tuple[tuple[Block, ...], ...]:
        full = len(SCALES) - 1
        by_op = [self.decode((op, full) * sum(STAGE_REPEATS)) for op in range(len(OPS))]
        stem, head = by_op[0][0], by_op[0][-1]
        return ((stem,), *zip(*(blocks[1:-1] for blocks in by_op), strict=True), (head,))

    def block_index(self, arch: Architecture) -> tuple[int, ...]:
        return (0, *arch[0::2], 0)

    def supernet(self) -> Supernet:
        return Supernet(self)

    def initialize(self, network: nn.Module, generator: torch.Generator) -> None:
        """Draw the published initial weights in place (docs/spec.md, OneShot 1.7).

        Running variances start at 1. The original's start at 0, which collapsed its validation.
        """
        narrow = ("first_conv", "conv_fc", "output", "conv_squeeze", "conv_excitation")
        with torch.no_grad():
            for name, module in network.named_modules():
                if isinstance(module, nn.Conv2d):
                    std = 0.01 if name.endswith(narrow) else 1.0 / module.weight.shape[1]
                    module.weight.normal_(0.0, std, generator=generator)
                    if module.bias is not None:
                        module.bias.zero_()
                elif isinstance(module, nn.BatchNorm2d):
                    module.reset_running_stats()
                    module.weight.fill_(1.0)
                    module.bias.fill_(1e-4)

    def copy_to_siblings(self, supernet: Supernet) -> None:
        with torch.no_grad():
            for position in supernet.positions[1:-1]:
                copy_first_operation(position)

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        return {"block": list(arch[0::2]), "channel": list(arch[1::2])}

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        lists = index_lists(self, values, {"block": "op", "channel": "scale"})
        genes = [
            index for pair in zip(lists["block"], lists["channel"], strict=True) for index in pair
        ]
        return check_architecture(genes, self)


def _geometry(layout: str) -> list[tuple[int, int, int]]:
    """(stage, output channels, stride) of each choice block."""
    return [
        (stage, channels, 2 if index == 0 else 1)
        for stage, (repeats, channels) in enumerate(
            zip(STAGE_REPEATS, LAYOUTS[layout], strict=True)
        )
        for index in range(repeats)
    ]
