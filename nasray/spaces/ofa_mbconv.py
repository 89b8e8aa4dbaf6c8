"""Inverted residual blocks (MBConv) with elastic kernel and width, for the OFA spaces.

Cai et al. 2020, Once-for-All (arXiv 1908.09791). The stored block has the most middle channels
and the largest kernel. A narrower one takes its leading channels, SE included; a smaller kernel
is the centre of the next larger one times a learned matrix, step by step (docs/spec.md, OFA 1.5).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasray.spaces.ofa import Condition
from nasray.spaces.space import Architecture, Block, Gene, out_resolution

KERNELS = (3, 5, 7)
EXPANDS = (3, 4, 6)  # middle channels per input channel
DEPTHS = (2, 3, 4)  # blocks of a stage
STAGE_BLOCKS = DEPTHS[-1]
NUM_DEPTHS = 5  # stages with a depth gene; a later block is always there
KEYS = {"ks": "kernel", "e": "expand", "d": "depth", "r": "resolution"}
ACTIVATIONS = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "swish": nn.SiLU,
    "h_swish": nn.Hardswish,
    "sigmoid": nn.Sigmoid,
    "h_sigmoid": nn.Hardsigmoid,
}


@dataclass(frozen=True)
class Stage:
    """Blocks of one output width, the first of which strides."""

    out_channels: int
    stride: int
    act: str
    se: bool
    blocks: int = STAGE_BLOCKS


def make_genes(num_blocks: int, resolutions: tuple[int, ...]) -> tuple[Gene, ...]:
    """Return the genes: kernels, expand ratios, depths, input resolution."""
    return (
        *(Gene(f"block{index}.kernel", "kernel", KERNELS) for index in range(num_blocks)),
        *(Gene(f"block{index}.expand", "expand", EXPANDS) for index in range(num_blocks)),
        *(Gene(f"stage{index}.depth", "depth", DEPTHS) for index in range(NUM_DEPTHS)),
        Gene("resolution", "resolution", resolutions),
    )


def make_conditions(num_blocks: int) -> tuple[Condition, ...]:
    """Return which blocks' genes the depths switch off: the third and fourth of a stage."""
    return tuple(
        Condition(2 * num_blocks + stage, needed, (block, num_blocks + block))
        for stage in range(NUM_DEPTHS)
        for needed, position in enumerate(range(DEPTHS[0], STAGE_BLOCKS), start=1)
        for block in (STAGE_BLOCKS * stage + position,)
    )


def make_gene_columns(num_blocks: int) -> tuple[tuple[int, ...], ...]:
    """Return each block's columns: its own genes, its stage's depth, the resolution."""
    depths = {condition.columns[0]: (condition.depth,) for condition in make_conditions(num_blocks)}
    resolution = 2 * num_blocks + NUM_DEPTHS
    return tuple(
        (block, num_blocks + block, *depths.get(block, ()), resolution)
        for block in range(num_blocks)
    )


def decode_blocks(
    arch: Architecture, stages: Sequence[Stage], *, in_channels: int, resolution: int, eps: float
) -> tuple[list[Block | None], int]:
    """Return the elastic blocks, None beyond a stage's depth, and their output resolution."""
    num_blocks = sum(stage.blocks for stage in stages)
    blocks: list[Block | None] = []
    for number, stage in enumerate(stages):
        depth = DEPTHS[arch[2 * num_blocks + number]] if stage.blocks > 1 else 1
        for position in range(stage.blocks):
            index = len(blocks)
            if position >= depth:
                blocks.append(None)
                continue
            blocks.append(
                MBConv(
                    name=f"block{index}",
                    in_channels=in_channels,
                    mid_channels=div8(round(in_channels * EXPANDS[arch[num_blocks + index]])),
                    out_channels=stage.out_channels,
                    kernel=KERNELS[arch[index]],
                    stride=stage.stride if position == 0 else 1,
                    resolution=resolution,
                    act=stage.act,
                    se=stage.se,
                    identity=position > 0,
                    eps=eps,
                )
            )
            if position == 0:
                in_channels = stage.out_channels
                resolution = out_resolution(resolution, stage.stride)
    return blocks, resolution


def div8(value: float) -> int:
    """Round to a multiple of 8, at least 8, never more than a tenth down."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


def stem_blocks(
    stem: int, fixed: int, *, resolution: int, acts: tuple[str, str], eps: float = 1e-5
) -> tuple["ConvStem", "MBConv"]:
    """Return the stem and the fixed block after it (expand ratio 1, kernel 3), by their widths."""
    return (
        ConvStem(name="stem", resolution=resolution, out_channels=stem, act=acts[0], eps=eps),
        MBConv(
            name="fixed",
            in_channels=stem,
            mid_channels=stem,
            out_channels=fixed,
            kernel=3,
            stride=1,
            resolution=out_resolution(resolution, 2),
            act=acts[1],
            se=False,
            identity=stem == fixed,
            eps=eps,
        ),
    )


@dataclass(frozen=True, kw_only=True)
class ConvStem:
    """3x3 convolution, stride 2, BN, activation."""

    name: str
    resolution: int
    out_channels: int
    act: str
    eps: float = 1e-5
    in_channels: int = 3

    def build(self) -> nn.Module:
        conv = nn.Conv2d(self.in_channels, self.out_channels, 3, 2, 1, bias=False)
        return nn.Sequential(with_bn(conv, act=self.act, eps=self.eps))


@dataclass(frozen=True, kw_only=True)
class MBConv:
    """1x1 to the middle (left out at expand ratio 1), depthwise, SE if any, linear 1x1."""

    name: str
    in_channels: int
    mid_channels: int
    out_channels: int
    kernel: int
    stride: int
    resolution: int
    act: str
    se: bool
    identity: bool  # adds its input to its output
    eps: float = 1e-5  # of BN

    @property
    def transform_names(self) -> tuple[str, ...]:
        """The stored matrices applied in turn to get from the largest kernel to this one."""
        if self.mid_channels == self.in_channels:
            return ()  # the fixed block
        return tuple(transform_name(larger) for larger in reversed(KERNELS) if larger > self.kernel)

    def build(self) -> nn.Module:
        return MBConvUnit(self)

    def elastic(self) -> "Block":
        """Return the block to store for this one, the largest of its position."""
        return ElasticMBConv(**vars(self)) if self.kernel == KERNELS[-1] else self

    def transform(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return this block's tensors, the kernel shrunk; leading slices are still to be taken."""
        return with_shrunk_kernel(stored, self.transform_names, self.mid_channels)


@dataclass(frozen=True, kw_only=True)
class ElasticMBConv(MBConv):
    """A stored block: the largest MBConv, with the matrices of its smaller kernels."""

    def build(self) -> nn.Module:
        block = super().build()
        for kernel, larger in zip(KERNELS, KERNELS[1:], strict=False):
            matrix = nn.Parameter(torch.eye(kernel * kernel))
            block.register_parameter(transform_name(larger), matrix)
        return block


class MBConvUnit(nn.Module):
    """The plain module of an MBConv block."""

    def __init__(self, block: MBConv) -> None:
        super().__init__()
        mid, act, eps = block.mid_channels, block.act, block.eps
        self.identity = block.identity
        if mid == block.in_channels:
            self.expand = nn.Identity()
        else:
            conv = nn.Conv2d(block.in_channels, mid, 1, bias=False)
            self.expand = nn.Sequential(with_bn(conv, act=act, eps=eps))
        conv = nn.Conv2d(
            mid, mid, block.kernel, block.stride, block.kernel // 2, groups=mid, bias=False
        )
        self.depthwise = nn.Sequential(with_bn(conv, act=act, eps=eps))
        self.se = SqueezeExcite(mid) if block.se else nn.Identity()
        conv = nn.Conv2d(mid, block.out_channels, 1, bias=False)
        self.project = nn.Sequential(with_bn(conv, eps=eps))

    def forward(self, features: Tensor) -> Tensor:
        """(n, in, height, width) -> (n, out, height / stride, width / stride), rounded up."""
        out = self.project(self.se(self.depthwise(self.expand(features))))
        return features + out if self.identity else out


class SqueezeExcite(nn.Module):
    """Channel attention through a quarter of the channels: biased convolutions, no BN."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        squeezed = div8(channels // 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.relu = nn.ReLU(inplace=True)
        self.restore = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        return features * self.gate(self.restore(self.relu(self.reduce(self.pool(features)))))


def with_bn(conv: nn.Conv2d, *, act: str = "", eps: float = 1e-5) -> OrderedDict[str, nn.Module]:
    """Return a convolution, its BN and, if named, its activation, by name."""
    layers = OrderedDict[str, nn.Module](conv=conv, bn=nn.BatchNorm2d(conv.out_channels, eps=eps))
    if act:
        layers[act] = ACTIVATIONS[act](inplace=True)
    return layers


def with_shrunk_kernel(
    stored: Mapping[str, Tensor], transforms: Sequence[str], channels: int
) -> dict[str, Tensor]:
    """Return a stored block's tensors without its matrices, its depthwise kernel shrunk.

    By the matrices named `transforms` in turn, of the first `channels`; left whole without any.
    """
    tensors = {name: stored[name] for name in stored if not name.startswith("transform")}
    if transforms:
        kernel = stored["depthwise.conv.weight"][:channels]
        for name in transforms:
            kernel = shrink_kernel(kernel, stored[name])
        tensors["depthwise.conv.weight"] = kernel
    return tensors


def shrink_kernel(kernel: Tensor, matrix: Tensor) -> Tensor:
    """Crop a depthwise kernel (n, 1, k, k) to its centre, (n, 1, k - 2, k - 2), times `matrix`."""
    centre = kernel[..., 1:-1, 1:-1]
    return (centre.flatten(1) @ matrix.t()).view(centre.shape)


def transform_name(larger: int) -> str:
    """Return the name of the matrix that makes a kernel of `larger` - 2 of one of `larger`."""
    return f"transform_{larger}to{larger - 2}"
