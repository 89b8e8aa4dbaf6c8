"""Blocks of the ShuffleNet space: stem, choice blocks and heads (docs/spec.md, OneShot 1).

The leaf modules carry the operation names of the published profile (docs/spec.md, OneShot
4.1), so that `nasray profile` prints that table from a walk over the network.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasray.spaces.supernet import embed

OPS = ("shuffle3", "shuffle5", "shuffle7", "xception3")  # of a choice block
STEM_CHANNELS = 16
LAST_CHANNELS = 1024

# Layers of the xception branches -> their twins in the 3x3 shuffle branches; those without.
XCEPTION_TWINS = {
    **{"conv1": "conv0", "conv2": "conv1", "conv5": "conv2", "conv6": "conv3", "conv7": "conv4"},
    **{"bn1": "bn0", "bn2": "bn1", "bn5": "bn2", "bn6": "bn3", "bn7": "bn4"},
}
XCEPTION_EXTRAS = ("conv0", "bn0", "conv3", "bn3", "conv4", "bn4")


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
    """A choice block with its operation and width chosen (docs/spec.md, OneShot 1.3)."""

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
    """What follows the last choice block, to logits (docs/spec.md, OneShot 1.4)."""

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

    def __init__(self, block: ShuffleBlock) -> None:
        super().__init__()
        main = _xception_branch(block) if block.op == "xception3" else _shuffle_branch(block)
        self.stride = block.stride
        if block.stride == 1:
            self.shufflechannels0 = nn.ChannelShuffle(2)
        else:
            self.projection = _projection_branch(block)
        self.main = nn.Sequential(main)
        self.se0 = SqueezeExcite(_main_out(block)) if block.se else nn.Identity()

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
    """Channel attention after the last activation: biased convolutions, no BN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = -(-(channels // 4) // 8) * 8  # a quarter, up to a multiple of 8
        self.pool0 = nn.AdaptiveAvgPool2d(1)
        self.conv_squeeze = nn.Conv2d(channels, squeezed, 1)
        self.relu0 = nn.ReLU(inplace=True)
        self.conv_excitation = nn.Conv2d(squeezed, channels, 1)
        self.hardsigmoid0 = nn.Hardsigmoid(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        squeezed = self.relu0(self.conv_squeeze(self.pool0(features)))
        return features * self.hardsigmoid0(self.conv_excitation(squeezed))


def _activation(index: int, hardswish: bool) -> dict[str, nn.Module]:
    if hardswish:
        return {f"hardswish{index}": nn.Hardswish(inplace=True)}
    return {f"relu{index}": nn.ReLU(inplace=True)}


def _main_in(block: ShuffleBlock) -> int:
    return block.in_channels // 2 if block.stride == 1 else block.in_channels


def _main_out(block: ShuffleBlock) -> int:
    return block.out_channels - _main_in(block)


def _shuffle_branch(block: ShuffleBlock) -> OrderedDict[str, nn.Module]:
    kernel, mid = int(block.op[-1]), block.mid_channels
    return OrderedDict(
        **_pointwise(0, _main_in(block), mid, block.hardswish, act=0),
        **_depthwise(1, mid, kernel, block.stride),
        **_pointwise(2, mid, _main_out(block), block.hardswish, act=1),
    )


def _xception_branch(block: ShuffleBlock) -> OrderedDict[str, nn.Module]:
    mid = block.mid_channels
    return OrderedDict(
        **_depthwise(0, _main_in(block), 3, block.stride),  # the stride is in the first one only
        **_pointwise(1, _main_in(block), mid, block.hardswish, act=0),
        **_depthwise(2, mid, 3),
        **_pointwise(3, mid, mid, block.hardswish, act=1),
        **_depthwise(4, mid, 3),
        **_pointwise(5, mid, _main_out(block), block.hardswish, act=2),
    )


def _projection_branch(block: ShuffleBlock) -> nn.Sequential:
    # Numbered after the main branch's, as published: conv3 and conv4, or conv6 and conv7.
    conv, act = (6, 3) if block.op == "xception3" else (3, 2)
    return nn.Sequential(
        OrderedDict(
            **_depthwise(conv, block.in_channels, int(block.op[-1]), block.stride),
            **_pointwise(conv + 1, block.in_channels, block.in_channels, block.hardswish, act=act),
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


def copy_first_operation(operations: nn.ModuleList) -> None:
    """Copy a position's 3x3 shuffle operation into the others, which then compute nearly alike.

    Larger kernels hold the smaller one in their centre. An xception branch gets the same
    convolutions, and identities for those that it has more.
    """
    weights = operations[0].state_dict()
    for op, sibling in zip(OPS[1:], operations[1:], strict=True):
        is_xception = op == "xception3"
        for name, target in sibling.state_dict().items():
            branch, layer, *rest = name.split(".")
            if is_xception and branch == "main" and layer in XCEPTION_EXTRAS:
                if layer.startswith("conv"):
                    nn.init.dirac_(target, groups=len(target) // target.shape[1])
                continue
            twin = XCEPTION_TWINS.get(layer, layer) if is_xception else layer
            embed(target, weights[".".join((branch, twin, *rest))])
