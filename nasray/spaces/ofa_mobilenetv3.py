"""OFA MobileNetV3 space: 5 stages of 2 to 4 blocks x 3 kernels x 3 expand ratios, and resolution.

Cai et al. 2020, Once-for-All (arXiv 1908.09791). Facts: docs/spec.md, OFA 1.2.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from nasray.spaces import ofa_mbconv
from nasray.spaces.ofa import Condition, OfaSpace
from nasray.spaces.space import Architecture, Block, Gene

# Before the width multiplier: stem, fixed block, five stages, the head's two convolutions.
BASE_WIDTHS = (16, 16, 24, 40, 80, 112, 160, 960, 1280)
STAGES = (  # stride, activation, SE
    (2, "relu", False),
    (2, "relu", True),
    (2, "h_swish", False),
    (1, "h_swish", True),
    (2, "h_swish", True),
)
NUM_BLOCKS = ofa_mbconv.STAGE_BLOCKS * len(STAGES)


@dataclass(frozen=True)
class OfaMobileNetV3(OfaSpace):
    """7371^5 networks for each of `resolutions`; published at widths 1.0 and 1.2."""

    name = "ofa_mobilenetv3"
    keys = ofa_mbconv.KEYS

    width: float = 1.2  # multiplies all channels

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        return ofa_mbconv.make_genes(NUM_BLOCKS, self.resolutions)

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """A stage's depth gene switches off the kernel and expand genes of its last blocks."""
        return ofa_mbconv.make_conditions(NUM_BLOCKS)

    @cached_property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        resolution = (len(self.genes) - 1,)
        return (resolution, resolution, *ofa_mbconv.make_gene_columns(NUM_BLOCKS), resolution)

    def decode(self, arch: Architecture) -> tuple[Block | None, ...]:
        widths = [ofa_mbconv.div8(base * self.width) for base in BASE_WIDTHS]
        stem, fixed = ofa_mbconv.stem_blocks(
            *widths[:2], resolution=self.resolution_of(arch), acts=("h_swish", "relu")
        )
        stages = [
            ofa_mbconv.Stage(out_channels, *stage)
            for out_channels, stage in zip(widths[2:7], STAGES, strict=True)
        ]
        blocks, resolution = ofa_mbconv.decode_blocks(
            arch, stages, in_channels=widths[1], resolution=fixed.resolution, eps=1e-5
        )
        head = Head("head", widths[6], widths[7], widths[8], resolution, self.num_classes)
        return (stem, fixed, *blocks, head)


@dataclass(frozen=True)
class Head:
    """1x1 convolution, mean over pixels, a wider 1x1 without BN, classifier."""

    name: str
    in_channels: int
    mid_channels: int
    out_channels: int
    resolution: int
    num_classes: int

    def build(self) -> nn.Module:
        conv = nn.Conv2d(self.in_channels, self.mid_channels, 1, bias=False)
        return nn.Sequential(
            OrderedDict(
                mix=nn.Sequential(ofa_mbconv.with_bn(conv, act="h_swish")),
                pool=nn.AdaptiveAvgPool2d(1),
                features=nn.Conv2d(self.mid_channels, self.out_channels, 1, bias=False),
                h_swish=nn.Hardswish(inplace=True),
                flatten=nn.Flatten(),
                output=nn.Linear(self.out_channels, self.num_classes),
            )
        )
