"""Blocks of the mbconv space: stem, inverted residual, head, with the padding of either framework.

A stored block has the base's middle channels and kernel. A narrower one takes its leading
channels, in squeeze-and-excitation too, whose own middle keeps the base's channels; a smaller
kernel is the centre of the next larger one times a learned matrix (docs/spec.md, OFA 1.5).
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasray.spaces.ofa_mbconv import ACTIVATIONS, transform_name, with_bn, with_shrunk_kernel
from nasray.spaces.space import out_resolution


@dataclass(frozen=True, kw_only=True)
class ConvStem:
    """3x3 convolution, stride 2, BN, activation."""

    name: str
    resolution: int
    out_channels: int
    act: str
    eps: float
    padding: str
    in_channels: int = 3

    def build(self) -> nn.Module:
        return conv_bn(
            self.in_channels,
            self.out_channels,
            kernel=3,
            stride=2,
            act=self.act,
            eps=self.eps,
            same_resolution=self.resolution if self.padding == "tensorflow" else 0,
        )


@dataclass(frozen=True, kw_only=True)
class InvertedResidual:
    """1x1 to the middle (if the base has it), depthwise, SE if any, linear 1x1."""

    name: str
    in_channels: int
    mid_channels: int
    out_channels: int
    kernel: int
    largest_kernel: int  # of the stored block
    stride: int
    resolution: int
    act: str
    expands: bool
    squeezed: int  # 0: no squeeze-and-excitation
    squeeze_act: str
    gate: str
    identity: bool  # adds its input to its output
    eps: float
    padding: str

    @property
    def transform_names(self) -> tuple[str, ...]:
        """The stored matrices applied in turn to get from the largest kernel to this one."""
        return tuple(map(transform_name, range(self.largest_kernel, self.kernel, -2)))

    def build(self) -> nn.Module:
        return InvertedResidualUnit(self)

    def elastic(self) -> "ElasticInvertedResidual":
        """Return the block to store for this one, the largest of its position."""
        return ElasticInvertedResidual(**vars(self))

    def transform(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this block's tensors, the kernel shrunk; leading slices are still to be taken."""
        return with_shrunk_kernel(stored, self.transform_names, self.mid_channels)


@dataclass(frozen=True, kw_only=True)
class ElasticInvertedResidual(InvertedResidual):
    """A stored block: the largest one, with the matrices of its smaller kernels."""

    def build(self) -> nn.Module:
        block = super().build()
        for larger in range(self.largest_kernel, 3, -2):
            matrix = nn.Parameter(torch.eye((larger - 2) ** 2))
            block.register_parameter(transform_name(larger), matrix)
        return block


class InvertedResidualUnit(nn.Module):
    """The plain module of an InvertedResidual block."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        mid, eps = block.mid_channels, block.eps
        self.identity = block.identity
        self.expand = (
            conv_bn(block.in_channels, mid, act=block.act, eps=eps)
            if block.expands
            else nn.Identity()
        )
        self.depthwise = conv_bn(
            mid,
            mid,
            kernel=block.kernel,
            stride=block.stride,
            groups=mid,
            act=block.act,
            eps=eps,
            same_resolution=block.resolution if block.padding == "tensorflow" else 0,
        )
        self.se = SqueezeExcite(block) if block.squeezed else nn.Identity()
        self.project = conv_bn(mid, block.out_channels, eps=eps)

    def forward(self, features: Tensor) -> Tensor:
        """(n, in, height, width) -> (n, out, height / stride, width / stride), rounded up."""
        out = self.project(self.se(self.depthwise(self.expand(features))))
        return features + out if self.identity else out


class SqueezeExcite(nn.Module):
    """Channel attention: mean over pixels, two biased 1x1 convolutions, a gate for each channel."""

    def __init__(self, block: InvertedResidual) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(block.mid_channels, block.squeezed, 1)
        self.act = ACTIVATIONS[block.squeeze_act]()
        self.restore = nn.Conv2d(block.squeezed, block.mid_channels, 1)
        self.gate = ACTIVATIONS[block.gate]()

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        return features * self.gate(self.restore(self.act(self.reduce(self.pool(features)))))


@dataclass(frozen=True, kw_only=True)
class Head:
    """1x1 convolution, mean over pixels, in MobileNetV3 a biased 1x1 without BN, classifier."""

    name: str
    in_channels: int
    mid_channels: int
    features: int  # output channels of that biased convolution; 0: there is none
    resolution: int
    num_classes: int
    act: str
    eps: float

    def build(self) -> nn.Module:
        layers = OrderedDict[str, nn.Module](
            mix=conv_bn(self.in_channels, self.mid_channels, act=self.act, eps=self.eps),
            pool=nn.AdaptiveAvgPool2d(1),
        )
        if self.features:
            layers["features"] = nn.Conv2d(self.mid_channels, self.features, 1)
            layers[self.act] = ACTIVATIONS[self.act]()
        layers["flatten"] = nn.Flatten()
        layers["output"] = nn.Linear(self.features or self.mid_channels, self.num_classes)
        return nn.Sequential(layers)


def same_padding(kernel: int, stride: int, resolution: int) -> tuple[int, int]:
    """TensorFlow's "SAME" margins of a side: before it and after it, where the odd pixel goes.

    So many that ceil(resolution / stride) outputs come out. Sides that stay even down to the last
    stride, as all multiples of 32 do, have the same margins.
    """
    needed = (out_resolution(resolution, stride) - 1) * stride + kernel - resolution
    return max(needed, 0) // 2, max(needed, 0) - max(needed, 0) // 2


def conv_bn(
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    act: str = "",
    eps: float,
    same_resolution: int = 0,
) -> nn.Sequential:
    """Return a convolution, its BN and, if named, its activation.

    Padded by kernel // 2; if `same_resolution`, the side of the input in pixels, is given, as
    TensorFlow does.
    """
    layers = OrderedDict[str, nn.Module]()
    margin = kernel // 2
    before, after = same_padding(kernel, stride, same_resolution) if same_resolution else (0, 0)
    if before != after:
        layers["pad"], margin = nn.ZeroPad2d((before, after, before, after)), 0
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, margin, groups=groups, bias=False)
    return nn.Sequential(layers | with_bn(conv, act=act, eps=eps))
