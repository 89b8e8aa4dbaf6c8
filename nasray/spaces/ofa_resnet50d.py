"""OFA ResNet50D space: elastic depth, expand ratio, width and input resolution; kernels are fixed.

He et al. 2018, Bag of Tricks (arXiv 1812.01187), as elastic in the Once-for-All code.
Facts: docs/spec.md, OFA 1.4. That code accepts depths beyond its range and drops nothing for
them, and the MobileNetV3 encodings of other notebooks; here a value outside the choices is refused.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from nasray.spaces import ofa_mbconv
from nasray.spaces.ofa import Condition, OfaSpace
from nasray.spaces.space import Architecture, Block, Gene, out_resolution

EXPANDS = (0.2, 0.25, 0.35)  # middle channels per output channel
WIDTHS = (0.65, 0.8, 1.0)
BASE_WIDTHS = (32, 64, 256, 512, 1024, 2048)  # stem middle, stem out, four stages
STEM_DEPTHS = (0, 2)  # only 2 keeps the stem's residual convolution
DEPTHS = (0, 1, 2)  # blocks beyond a stage's base depth
BASE_DEPTHS = (2, 2, 4, 2)
STRIDES = (1, 2, 2, 2)
STAGE_BLOCKS = tuple(base + DEPTHS[-1] for base in BASE_DEPTHS)
STARTS = tuple(sum(STAGE_BLOCKS[:stage]) for stage in range(len(STAGE_BLOCKS)))
NUM_BLOCKS = sum(STAGE_BLOCKS)

# The first column of each kind of gene; expand ratios come first.
WIDTH, DEPTH = NUM_BLOCKS, NUM_BLOCKS + len(BASE_WIDTHS)
RESOLUTION = DEPTH + 1 + len(BASE_DEPTHS)


@dataclass(frozen=True)
class OfaResNet50D(OfaSpace):
    """2,458,914,796,962 architectures for each of `resolutions`.

    Stem middles of 0.65 and 0.8 are both 24 channels, but count as two, as published.
    """

    name = "ofa_resnet50d"
    keys = {"e": "expand", "w": "width", "d": "depth", "r": "resolution"}

    resolution: int = 256  # of the images that are loaded, pixels
    resolutions: tuple[int, ...] = (128, 144, 160, 176, 192, 224, 240, 256)  # of the input
    width: float = 1.0  # multiplies all channels; smaller for trials

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        places = ("stem.middle", "stem", *(f"stage{stage}" for stage in range(len(BASE_DEPTHS))))
        return (
            *(Gene(f"block{index}.expand", "expand", EXPANDS) for index in range(NUM_BLOCKS)),
            *(Gene(f"{place}.width", "width", WIDTHS) for place in places),
            Gene("stem.depth", "depth", STEM_DEPTHS),
            *(Gene(f"stage{stage}.depth", "depth", DEPTHS) for stage in range(len(BASE_DEPTHS))),
            Gene("resolution", "resolution", self.resolutions),
        )

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """A stage's depth gene switches off the expand genes of its last blocks."""
        return tuple(
            Condition(DEPTH + 1 + stage, beyond, (STARTS[stage] + base + beyond - 1,))
            for stage, base in enumerate(BASE_DEPTHS)
            for beyond in DEPTHS[1:]
        )

    @cached_property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        depths = {condition.columns[0]: (condition.depth,) for condition in self.conditions}
        blocks = []
        for stage, start in enumerate(STARTS):
            width = WIDTH + 2 + stage
            for index in range(start, start + STAGE_BLOCKS[stage]):
                widths = (width - 1, width) if index == start else (width,)
                blocks.append((index, *widths, *depths.get(index, ()), RESOLUTION))
        stem = ((WIDTH, RESOLUTION), (WIDTH, DEPTH, RESOLUTION), (WIDTH, WIDTH + 1, RESOLUTION))
        return (*stem, *blocks, (DEPTH - 1, RESOLUTION))

    def decode(self, arch: Architecture) -> tuple[Block | None, ...]:
        middle, stem, *stages = (
            ofa_mbconv.div8(base * self.width * WIDTHS[choice])
            for base, choice in zip(BASE_WIDTHS, arch[WIDTH:DEPTH], strict=True)
        )
        resolution = out_resolution(self.resolution_of(arch), 2)
        blocks: list[Block | None] = [
            ofa_mbconv.ConvStem(
                name="stem", resolution=self.resolution_of(arch), out_channels=middle, act="relu"
            ),
            StemResidual("stem_residual", middle, resolution) if STEM_DEPTHS[arch[DEPTH]] else None,
            StemEnd("stem_end", middle, stem, resolution),
        ]
        in_channels, resolution = stem, out_resolution(resolution, 2)
        for stage, out_channels in enumerate(stages):
            depth = BASE_DEPTHS[stage] + DEPTHS[arch[DEPTH + 1 + stage]]
            for position in range(STAGE_BLOCKS[stage]):
                if position >= depth:
                    blocks.append(None)
                    continue
                index, stride = STARTS[stage] + position, 1 if position else STRIDES[stage]
                mid = ofa_mbconv.div8(round(out_channels * EXPANDS[arch[index]]))
                blocks.append(
                    Bottleneck(
                        name=f"block{index}",
                        in_channels=in_channels,
                        mid_channels=mid,
                        out_channels=out_channels,
                        stride=stride,
                        resolution=resolution,
                        identity=position > 0,
                    )
                )
                in_channels, resolution = out_channels, out_resolution(resolution, stride)
        return (*blocks, Head("head", in_channels, resolution, self.num_classes))


@dataclass(frozen=True)
class StemResidual:
    """3x3 convolution at the stem's middle width, added to its input."""

    name: str
    in_channels: int
    resolution: int

    def build(self) -> nn.Module:
        return StemResidualUnit(self)


@dataclass(frozen=True)
class StemEnd:
    """3x3 convolution to the stem's output width, then 3x3 maximum pooling, stride 2."""

    name: str
    in_channels: int
    out_channels: int
    resolution: int

    def build(self) -> nn.Module:
        conv = nn.Conv2d(self.in_channels, self.out_channels, 3, 1, 1, bias=False)
        pool = nn.MaxPool2d(3, stride=2, padding=1)
        return nn.Sequential(OrderedDict(**ofa_mbconv.with_bn(conv, act="relu"), pool=pool))


@dataclass(frozen=True, kw_only=True)
class Bottleneck:
    """1x1 to the middle, 3x3, 1x1; added to the input, or to its pooled projection."""

    name: str
    in_channels: int
    mid_channels: int
    out_channels: int
    stride: int
    resolution: int
    identity: bool
    kernel: int = 3
    act: str = "relu"
    se: bool = False

    def build(self) -> nn.Module:
        return BottleneckUnit(self)


@dataclass(frozen=True)
class Head:
    """Mean over pixels and classifier."""

    name: str
    in_channels: int
    resolution: int
    num_classes: int

    def build(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                output=nn.Linear(self.in_channels, self.num_classes),
            )
        )


class StemResidualUnit(nn.Module):
    """The plain module of a StemResidual block."""

    def __init__(self, block: StemResidual) -> None:
        super().__init__()
        conv = nn.Conv2d(block.in_channels, block.in_channels, 3, 1, 1, bias=False)
        self.main = nn.Sequential(ofa_mbconv.with_bn(conv, act="relu"))

    def forward(self, features: Tensor) -> Tensor:
        """(n, channels, height, width) -> the same shape."""
        return features + self.main(features)


class BottleneckUnit(nn.Module):
    """The plain module of a Bottleneck block."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        mid, stride = block.mid_channels, block.stride
        inner = nn.Conv2d(block.in_channels, mid, 1, bias=False)
        middle = nn.Conv2d(mid, mid, block.kernel, stride, block.kernel // 2, bias=False)
        outer = nn.Conv2d(mid, block.out_channels, 1, bias=False)
        self.inner = nn.Sequential(ofa_mbconv.with_bn(inner, act=block.act))
        self.middle = nn.Sequential(ofa_mbconv.with_bn(middle, act=block.act))
        self.outer = nn.Sequential(ofa_mbconv.with_bn(outer))
        if block.identity:
            self.shortcut = nn.Identity()
        else:
            conv = nn.Conv2d(block.in_channels, block.out_channels, 1, bias=False)
            pool = nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()
            self.shortcut = nn.Sequential(OrderedDict(pool=pool, **ofa_mbconv.with_bn(conv)))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, features: Tensor) -> Tensor:
        """(n, in, height, width) -> (n, out, height / stride, width / stride), rounded up."""
        out = self.outer(self.middle(self.inner(features)))
        return self.relu(self.shortcut(features) + out)
