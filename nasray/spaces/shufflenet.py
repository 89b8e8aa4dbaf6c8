"""OneShot+ ShuffleNet space: 20 choice blocks x 4 operations x 10 channel scales.

Guo et al. 2019 (Single Path One-Shot, arXiv 1904.00420) with the channel choices, SE,
hard-swish and heads of OneShot+ / OneShot-S+ (CanyonWind 2019). Facts: spec 1.

The leaf modules carry the operation names of the published profile (spec 4.1 B), so that
`nasray profile` prints that table from a walk over the network.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

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

OPS = ("shuffle3", "shuffle5", "shuffle7", "xception3")
SCALES = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)  # of half the output channels
STEM_CHANNELS = 16
STAGE_REPEATS = (4, 4, 8, 4)  # choice blocks; the first of each stage has stride 2
LAYOUTS = {"oneshot": (64, 160, 320, 640), "shufflenetv2plus": (48, 128, 256, 512)}
HEADS = ("after_pooling", "shufflenetv2plus", "spos")
LAST_CHANNELS = 1024

# Layers of the xception branches -> their twins in the 3x3 shuffle branches; those without.
XCEPTION_TWINS = {
    **{"conv1": "conv0", "conv2": "conv1", "conv5": "conv2", "conv6": "conv3", "conv7": "conv4"},
    **{"bn1": "bn0", "bn2": "bn1", "bn5": "bn2", "bn6": "bn3", "bn7": "bn4"},
}
XCEPTION_EXTRAS = ("conv0", "bn0", "conv3", "bn3", "conv4", "bn4")

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
        """Draw the published initial weights in place (spec 1.7), but running variances of 1.

        The original starts running variances at 0, which is what collapsed its validation.
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
        """Copy each 3x3 shuffle operation into its siblings, which then compute (nearly) alike.

        Larger kernels hold the smaller one in their middle. An xception branch gets the
        same convolutions, and identities for those that it has more.
        """
        with torch.no_grad():
            for source, *siblings in supernet.positions[1:-1]:
                weights = source.state_dict()
                for sibling, op in zip(siblings, OPS[1:], strict=True):
                    renamed = XCEPTION_TWINS if op == "xception3" else {}
                    for name, target in sibling.state_dict().items():
                        branch, layer, *rest = name.split(".")
                        twin = ".".join((branch, renamed.get(layer, layer), *rest))
                        if branch == "main" and layer in XCEPTION_EXTRAS and renamed:
                            if layer.startswith("conv"):
                                nn.init.dirac_(target, groups=len(target) // target.shape[1])
                        else:
                            embed(target, weights[twin])

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        return {"block": list(arch[0::2]), "channel": list(arch[1::2])}

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        lists = index_lists(self, values, {"block": "op", "channel": "scale"})
        genes = [
            index for pair in zip(lists["block"], lists["channel"], strict=True) for index in pair
        ]
        return check_architecture(genes, self)


@dataclass(frozen=True)
class Stem:
    """3x3 convolution, stride 2, to 16 channels."""

    name: str
    resolution: int
    hardswish: bool
    in_channels: int = 3

    def build(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                first_conv=nn.Conv2d(3, STEM_CHANNELS, 3, stride=2, padding=1, bias=False),
                bn=nn.BatchNorm2d(STEM_CHANNELS),
                **_activation(0, self.hardswish),
            )
        )


@dataclass(frozen=True, kw_only=True)
class ShuffleBlock:
    """A choice block with its operation and width chosen (spec 1.3)."""

    name: str
    op: str
    in_channels: int
    mid_channels: int
    out_channels: int
    stride: int
    resolution: int
    hardswish: bool
    se: bool

    def build(self) -> nn.Module:
        return ShuffleUnit(self)


@dataclass(frozen=True)
class Head:
    """What follows the last choice block, to logits (spec 1.4)."""

    name: str
    in_channels: int
    resolution: int
    num_classes: int
    kind: str
    se: bool

    def build(self) -> nn.Module:
        layers = OrderedDict(
            **{
                "after_pooling": self._after_pooling,
                "shufflenetv2plus": self._shufflenetv2plus,
                "spos": self._spos,
            }[self.kind](),
            dropout=nn.Dropout(0.2 if self.se else 0.1),
            output=nn.Conv2d(LAST_CHANNELS, self.num_classes, 1),
            flatten=nn.Flatten(),
        )
        return nn.Sequential(layers)

    def _after_pooling(self) -> dict[str, nn.Module]:
        return {
            "pool0": nn.AdaptiveAvgPool2d(1),
            "conv_fc": nn.Conv2d(self.in_channels, LAST_CHANNELS, 1),
            **_activation(1, self.se),
        }

    def _shufflenetv2plus(self) -> dict[str, nn.Module]:
        channels = 768  # 0.75 x 1024
        return {
            "last_conv": nn.Conv2d(self.in_channels, channels, 1, bias=False),
            "bn": nn.BatchNorm2d(channels),
            **_activation(1, self.se),
            "pool0": nn.AdaptiveAvgPool2d(1),
            "se0": SqueezeExcite(channels),
            "conv_fc": nn.Conv2d(channels, LAST_CHANNELS, 1),
            **_activation(2, self.se),
        }

    def _spos(self) -> dict[str, nn.Module]:
        return {
            "last_conv": nn.Conv2d(self.in_channels, LAST_CHANNELS, 1, bias=False),
            "bn": nn.BatchNorm2d(LAST_CHANNELS),
            **_activation(1, self.se),
            "pool0": nn.AdaptiveAvgPool2d(1),
        }


class ShuffleUnit(nn.Module):
    """ShuffleNet v2 unit: half the channels pass or are projected, half are transformed."""

    def __init__(self, row: ShuffleBlock) -> None:
        super().__init__()
        main = _xception_branch(row) if row.op == "xception3" else _shuffle_branch(row)
        self.stride = row.stride
        if row.stride == 1:
            self.shufflechannels0 = nn.ChannelShuffle(2)
        else:
            self.projection = _projection_branch(row)
        self.main = nn.Sequential(main)
        self.se0 = SqueezeExcite(_main_out(row)) if row.se else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """(n, in, height, width) -> (n, out, height / stride, width / stride)."""
        if self.stride == 1:
            kept, main = _halves_of_shuffled(self.shufflechannels0, features)
        else:  # the published order of operations: projection first
            kept, main = self.projection(features), features
        return torch.cat((kept, self.se0(self.main(main))), dim=1)


def _halves_of_shuffled(shuffle: nn.ChannelShuffle, features: Tensor) -> tuple[Tensor, Tensor]:
    """Shuffle the channels of `features` (n, c, height, width) and split them into two halves.

    torch's own shuffle returns channels-first tensors on a GPU, and BN and convolutions take
    twice as long on those. This one keeps channels last, and makes each half dense.
    """
    if not (features.is_cuda and features.is_contiguous(memory_format=torch.channels_last)):
        first, second = shuffle(features).chunk(2, dim=1)
        return first, second
    groups = shuffle.groups
    n, channels, height, width = features.shape
    # (n, height, width, group, half, channel of the half's share of the group)
    split = features.permute(0, 2, 3, 1).reshape(n, height, width, groups, 2, -1)
    first, second = (
        half.transpose(3, 4).reshape(n, height, width, -1).permute(0, 3, 1, 2)
        for half in split.unbind(4)
    )
    return first, second


class SqueezeExcite(nn.Module):
    """Channel attention after the last activation: biased convolutions, no BN (spec 1.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = -(-(channels // 4) // 8) * 8  # a quarter, up to a multiple of 8
        self.pool0 = nn.AdaptiveAvgPool2d(1)
        self.conv_squeeze = nn.Conv2d(channels, squeezed, 1)
        self.relu0 = nn.ReLU(inplace=True)
        self.conv_excitation = nn.Conv2d(squeezed, channels, 1)
        self.hardsigmoid0 = nn.Hardsigmoid(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        squeezed = self.relu0(self.conv_squeeze(self.pool0(features)))
        return features * self.hardsigmoid0(self.conv_excitation(squeezed))


def _geometry(layout: str) -> list[tuple[int, int, int]]:
    """(stage, output channels, stride) of each choice block."""
    return [
        (stage, channels, 2 if index == 0 else 1)
        for stage, (repeats, channels) in enumerate(
            zip(STAGE_REPEATS, LAYOUTS[layout], strict=True)
        )
        for index in range(repeats)
    ]


def _activation(index: int, hardswish: bool) -> dict[str, nn.Module]:
    if hardswish:
        return {f"hardswish{index}": nn.Hardswish(inplace=True)}
    return {f"relu{index}": nn.ReLU(inplace=True)}


def _main_in(row: ShuffleBlock) -> int:
    return row.in_channels // 2 if row.stride == 1 else row.in_channels


def _main_out(row: ShuffleBlock) -> int:
    return row.out_channels - _main_in(row)


def _shuffle_branch(row: ShuffleBlock) -> OrderedDict[str, nn.Module]:
    kernel, mid = int(row.op[-1]), row.mid_channels
    return OrderedDict(
        **_pointwise(0, _main_in(row), mid, row.hardswish, act=0),
        **_depthwise(1, mid, kernel, row.stride),
        **_pointwise(2, mid, _main_out(row), row.hardswish, act=1),
    )


def _xception_branch(row: ShuffleBlock) -> OrderedDict[str, nn.Module]:
    mid = row.mid_channels
    return OrderedDict(
        **_depthwise(0, _main_in(row), 3, row.stride),  # the stride is in the first one only
        **_pointwise(1, _main_in(row), mid, row.hardswish, act=0),
        **_depthwise(2, mid, 3),
        **_pointwise(3, mid, mid, row.hardswish, act=1),
        **_depthwise(4, mid, 3),
        **_pointwise(5, mid, _main_out(row), row.hardswish, act=2),
    )


def _projection_branch(row: ShuffleBlock) -> nn.Sequential:
    # Numbered after the main branch's, as published: conv3 and conv4, or conv6 and conv7.
    conv, act = (6, 3) if row.op == "xception3" else (3, 2)
    return nn.Sequential(
        OrderedDict(
            **_depthwise(conv, row.in_channels, int(row.op[-1]), row.stride),
            **_pointwise(conv + 1, row.in_channels, row.in_channels, row.hardswish, act=act),
        )
    )


def _depthwise(index: int, channels: int, kernel: int, stride: int = 1) -> dict[str, nn.Module]:
    return {
        f"conv{index}": nn.Conv2d(
            channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False
        ),
        f"bn{index}": nn.BatchNorm2d(channels),
    }


def _pointwise(
    index: int, in_channels: int, out_channels: int, hardswish: bool, *, act: int
) -> dict[str, nn.Module]:
    return {
        f"conv{index}": nn.Conv2d(in_channels, out_channels, 1, bias=False),
        f"bn{index}": nn.BatchNorm2d(out_channels),
        **_activation(act, hardswish),
    }
