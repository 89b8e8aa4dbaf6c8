"""OFA ProxylessNAS space: as OFA MobileNetV3, without SE, with ReLU6 and a sixth stage.

Cai et al. 2019, ProxylessNAS (arXiv 1812.00332), as elastic in Once-for-All (arXiv
1908.09791). The sixth stage has one block, with a kernel and an expand gene but no depth.
Facts: docs/spec.md, OFA 1.3.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from nasray.spaces import ofa_mbconv
from nasray.spaces.ofa import Condition, OfaSpace
from nasray.spaces.space import Architecture, Block, Gene

# Before the width multiplier: stem, fixed block, six stages, the head's convolution.
BASE_WIDTHS = (32, 16, 24, 40, 80, 96, 192, 320, 1280)
STRIDES = (2, 2, 2, 1, 2, 1)
NUM_BLOCKS = 5 * ofa_mbconv.STAGE_BLOCKS + 1
BN_EPS = 1e-3


@dataclass(frozen=True)
class OfaProxyless(OfaSpace):
    """9 * 7371^5 networks for each of `resolutions`; published at width 1.3."""

    name = "ofa_proxyless"
    keys = ofa_mbconv.KEYS

    width: float = 1.3  # multiplies all channels

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
            *widths[:2], resolution=self.resolution_of(arch), acts=("relu6", "relu6"), eps=BN_EPS
        )
        stages = [
            ofa_mbconv.Stage(out_channels, stride, "relu6", se=False)
            for out_channels, stride in zip(widths[2:8], STRIDES, strict=True)
        ]
        stages[-1] = replace(stages[-1], blocks=1)
        blocks, resolution = ofa_mbconv.decode_blocks(
            arch, stages, in_channels=widths[1], resolution=fixed.resolution, eps=BN_EPS
        )
        head = Head("head", widths[7], widths[8], resolution, self.num_classes)
        return (stem, fixed, *blocks, head)


@dataclass(frozen=True)
class Head:
    """1x1 convolution, mean over pixels, classifier."""

    name: str
    in_channels: int
    out_channels: int
    resolution: int
    num_classes: int

    def build(self) -> nn.Module:
        conv = nn.Conv2d(self.in_channels, self.out_channels, 1, bias=False)
        return nn.Sequential(
            OrderedDict(
                mix=nn.Sequential(ofa_mbconv.with_bn(conv, act="relu6", eps=BN_EPS)),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                output=nn.Linear(self.out_channels, self.num_classes),
            )
        )
