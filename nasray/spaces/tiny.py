"""A space of six small choice blocks, for tests, smoke runs and as a pattern to copy.

The smallest space that has all the parts: operations, widths, named architectures.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from nasray.errors import UserError
from nasray.spaces.space import (
    Architecture,
    Block,
    Gene,
    Population,
    check_architecture,
    index_lists,
)
from nasray.spaces.supernet import Supernet, embed

OPS = ("conv3", "conv5")
SCALES = (0.5, 1.0, 2.0)  # of the block's output channels
CHANNELS = (8, 16, 32)  # output channels; each block has stride 2


@dataclass(frozen=True)
class Tiny:
    """Up to 216 architectures; `num_blocks` of 1 to 3."""

    name = "tiny"

    num_classes: int = 10
    resolution: int = 32
    num_blocks: int = 3

    def __post_init__(self) -> None:
        if not 1 <= self.num_blocks <= len(CHANNELS):
            raise UserError(f"space.num_blocks = {self.num_blocks} must be 1...{len(CHANNELS)}")
        if self.resolution % 8:
            raise UserError(f"space.resolution = {self.resolution} must be a multiple of 8")

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        return tuple(
            gene
            for index in range(self.num_blocks)
            for gene in (
                Gene(f"block{index}.op", "op", OPS),
                Gene(f"block{index}.scale", "scale", SCALES),
            )
        )

    @cached_property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        return (*((2 * index, 2 * index + 1) for index in range(self.num_blocks)), ())

    @property
    def named(self) -> Mapping[str, Architecture]:
        return {
            "smallest": (0, 0) * self.num_blocks,
            "largest": (len(OPS) - 1, len(SCALES) - 1) * self.num_blocks,
        }

    def resolution_of(self, arch: Architecture) -> int:
        return self.resolution

    def decode(self, arch: Architecture) -> tuple[Block, ...]:
        blocks: list[Block] = []
        in_channels, resolution = 3, self.resolution
        for index, out_channels in enumerate(CHANNELS[: self.num_blocks]):
            kernel = int(OPS[arch[2 * index]][-1])
            mid_channels = int(out_channels * SCALES[arch[2 * index + 1]])
            blocks.append(
                TinyBlock(
                    f"block{index}", kernel, in_channels, mid_channels, out_channels, resolution
                )
            )
            in_channels, resolution = out_channels, resolution // 2
        blocks.append(TinyHead("head", in_channels, resolution, self.num_classes))
        return tuple(blocks)

    def canonical(self, population: Population) -> Population:
        return population  # every gene always has an effect

    def max_blocks(self) -> tuple[tuple[Block, ...], ...]:
        full = len(SCALES) - 1
        by_op = [self.decode((op, full) * self.num_blocks) for op in range(len(OPS))]
        return (*zip(*(blocks[:-1] for blocks in by_op), strict=True), (by_op[0][-1],))

    def block_index(self, arch: Architecture) -> tuple[int, ...]:
        return (*arch[0::2], 0)

    def supernet(self) -> Supernet:
        return Supernet(self)

    def initialize(self, network: nn.Module, generator: torch.Generator) -> None:
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def copy_to_siblings(self, supernet: Supernet) -> None:
        with torch.no_grad():
            for small, large in supernet.positions[:-1]:
                weights = small.state_dict()
                for name, target in large.state_dict().items():
                    embed(target, weights[name])

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        return {"op": list(arch[0::2]), "scale": list(arch[1::2])}

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        lists = index_lists(self, values, {"op": "op", "scale": "scale"})
        genes = [index for pair in zip(lists["op"], lists["scale"], strict=True) for index in pair]
        return check_architecture(genes, self)


@dataclass(frozen=True)
class TinyBlock:
    """A convolution of the chosen kernel and width, then 1x1 to the output channels."""

    name: str
    kernel: int
    in_channels: int
    mid_channels: int
    out_channels: int
    resolution: int

    def build(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                conv0=nn.Conv2d(
                    self.in_channels, self.mid_channels, self.kernel, 2, self.kernel // 2
                ),
                bn0=nn.BatchNorm2d(self.mid_channels),
                relu0=nn.ReLU(inplace=True),
                conv1=nn.Conv2d(self.mid_channels, self.out_channels, 1),
                bn1=nn.BatchNorm2d(self.out_channels),
                relu1=nn.ReLU(inplace=True),
            )
        )


@dataclass(frozen=True)
class TinyHead:
    """Global average pooling and a linear classifier."""

    name: str
    in_channels: int
    resolution: int
    num_classes: int

    def build(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                pool0=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                output=nn.Linear(self.in_channels, self.num_classes),
            )
        )
