"""NAS-Bench-Macro: eight layers of three operations each, on CIFAR-10's 32 x 32 images.

Su et al. 2021, "Prioritized Architecture Sampling with Monto-Carlo Tree Search" (arXiv
2103.11922), which trained all of its networks; their repository's train/model.py has the layers.
An identity is the third operation, so of 6,561 architectures only 3,969 are different networks:
in a stage it does not matter where, behind the first layer, the identities stand. The supernet
holds weights for the canonical form only, as the authors trained that form only: a stage's n-th
layer that is no identity has the n-th weights.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasray.errors import UserError
from nasray.spaces.ofa_mbconv import MBConv, with_bn
from nasray.spaces.space import Architecture, Block, Gene, Population, largest
from nasray.spaces.supernet import Supernet

IDENTITY = "identity"
OPS = (IDENTITY, "mb3_k3", "mb6_k5")  # in the table's strings 0, 1, 2
SHAPES = {"mb3_k3": (3, 3), "mb6_k5": (6, 5)}  # middle channels per input channel, kernel
STEM_CHANNELS, HEAD_CHANNELS = 32, 1280
# The layers of each stage, and its output channels; the first layer has stride 2.
STAGES = (((0, 1), 64), ((2, 3, 4), 128), ((5, 6, 7), 256))
NUM_LAYERS = 8
DIGITS = re.compile("[012]{8}")


@dataclass(frozen=True)
class NasBenchMacro:
    """The 3,969 networks, each once or under several names."""

    name = "nasbench_macro"

    num_classes: int = 10
    resolution: int = 32

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: the resolution cannot be halved three times.
        """
        if self.resolution % 8:
            raise UserError(f"space.resolution = {self.resolution} must be a multiple of 8")

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        return tuple(Gene(f"layer{index}", "op", OPS) for index in range(NUM_LAYERS))

    @property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        stages = (columns for layers, _ in STAGES for columns in (layers[:1], layers[1:]))
        return ((), *stages, ())

    @property
    def named(self) -> Mapping[str, Architecture]:
        return {
            "smallest": (0,) * NUM_LAYERS,
            "best": (2, 2, 2, 1, 2, 2, 2, 0),  # of the table: 93.13 % on CIFAR-10
            "largest": largest(self),
        }

    def resolution_of(self, arch: Architecture) -> int:
        return self.resolution

    def decode(self, arch: Architecture) -> tuple[Block | None, ...]:
        resolution, in_channels = self.resolution, STEM_CHANNELS
        blocks: list[Block | None] = [Stem("stem", resolution)]
        for number, (layers, channels) in enumerate(STAGES):
            first, *later = (OPS[arch[layer]] for layer in layers)
            ops = tuple(op for op in later if op != IDENTITY)
            blocks.append(FirstLayer(f"stage{number}_first", first, in_channels, resolution))
            resolution, in_channels = resolution // 2, channels
            name = f"stage{number}_later"
            blocks.append(LaterLayers(name, ops, channels, resolution) if ops else None)
        return (*blocks, Head("head", in_channels, resolution, self.num_classes))

    def canonical(self, population: Population) -> Population:
        """Within a stage, put the identities behind its other layers; the first layer stays."""
        population = population.copy()
        for layers, _ in STAGES:
            later = population[:, layers[1:]]
            order = np.argsort(later == 0, axis=1, kind="stable")
            population[:, layers[1:]] = np.take_along_axis(later, order, axis=1)
        return population

    def max_blocks(self) -> tuple[tuple[Block, ...], ...]:
        by_op = [self.decode((op,) * NUM_LAYERS) for op in range(len(OPS))]
        return tuple(
            tuple(dict.fromkeys(map(_stored, filter(None, blocks))))
            for blocks in zip(*by_op, strict=True)
        )

    def block_index(self, arch: Architecture) -> tuple[int, ...]:
        return (0, *(index for layers, _ in STAGES for index in (arch[layers[0]], 0)), 0)

    def supernet(self) -> Supernet:
        return Supernet(self)

    def initialize(self, network: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights of each output channel with a norm of 1 on average, in place."""
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()

    def copy_to_siblings(self, supernet: Supernet) -> None:
        """Do nothing: the first operation is an identity, and has no weights."""

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        """Write `arch` as a string of digits, a key of the table."""
        return {"arch": "".join(map(str, arch))}

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        """Read what to_json() writes, into canonical form.

        Raises:
            UserError: it is not a string of eight of the digits 0, 1 and 2 under the key "arch".
        """
        digits = values.get("arch")
        if set(values) != {"arch"} or not isinstance(digits, str) or not DIGITS.fullmatch(digits):
            raise UserError(
                f'an architecture of {self.name} is {{"arch": "22212220"}}, a string of '
                f"{NUM_LAYERS} of the digits 0, 1 and 2, got {dict(values)}"
            )
        [arch] = self.canonical(np.array([list(map(int, digits))], dtype=np.int8)).tolist()
        return tuple(arch)


@dataclass(frozen=True)
class Stem:
    """3x3 convolution, BN, ReLU."""

    name: str
    resolution: int
    in_channels: int = 3

    def build(self) -> nn.Module:
        return _conv_bn(self.in_channels, STEM_CHANNELS, kernel=3, act="relu")


@dataclass(frozen=True)
class FirstLayer:
    """The first layer of a stage: stride 2, twice the channels; an identity is a projection."""

    name: str
    op: str
    in_channels: int
    resolution: int

    def build(self) -> nn.Module:
        if self.op == IDENTITY:
            layer = _conv_bn(self.in_channels, 2 * self.in_channels, stride=2)
        else:
            layer = _mbconv(self.op, self.in_channels, self.resolution, stride=2)
        return nn.Sequential(OrderedDict({self.op: layer}))


@dataclass(frozen=True)
class LaterLayers:
    """The other layers of a stage, without its identities."""

    name: str
    ops: tuple[str, ...]  # of the first, the second, ...; one or more
    in_channels: int
    resolution: int

    def build(self) -> nn.Module:
        return self._built(self._layers())

    def elastic(self) -> "ElasticLaterLayers":
        """Return the block to store for all with so many layers."""
        return ElasticLaterLayers(**vars(self) | {"ops": OPS[-1:] * len(self.ops)})

    def transform(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of this block's operations."""
        own = {name for name, _ in self._layers()}
        return {name: tensor for name, tensor in stored.items() if name.split(".")[0] in own}

    def _layers(self) -> list[tuple[str, str]]:
        """The name and the operation of each layer."""
        return [(f"layer{index}_{op}", op) for index, op in enumerate(self.ops)]

    def _built(self, layers: list[tuple[str, str]]) -> nn.Module:
        made = ((name, _mbconv(op, self.in_channels, self.resolution)) for name, op in layers)
        return nn.Sequential(OrderedDict(made))


@dataclass(frozen=True)
class ElasticLaterLayers(LaterLayers):
    """A stored block: every operation of every layer."""

    def build(self) -> nn.Module:
        return self._built(
            [(f"layer{index}_{op}", op) for index in range(len(self.ops)) for op in SHAPES]
        )


@dataclass(frozen=True)
class Head:
    """1x1 convolution, BN, ReLU, global average pooling and a linear classifier."""

    name: str
    in_channels: int
    resolution: int
    num_classes: int

    def build(self) -> nn.Module:
        return nn.Sequential(
            OrderedDict(
                mix=_conv_bn(self.in_channels, HEAD_CHANNELS, act="relu"),
                pool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(),
                output=nn.Linear(HEAD_CHANNELS, self.num_classes),
            )
        )


def _stored(block: Block) -> Block:
    return block.elastic() if isinstance(block, LaterLayers) else block


def _conv_bn(
    in_channels: int, out_channels: int, *, kernel: int = 1, stride: int = 1, act: str = ""
) -> nn.Module:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(with_bn(conv, act=act))


def _mbconv(op: str, in_channels: int, resolution: int, *, stride: int = 1) -> nn.Module:
    expand, kernel = SHAPES[op]
    return MBConv(
        name=op,
        in_channels=in_channels,
        mid_channels=in_channels * expand,
        out_channels=in_channels * stride,
        kernel=kernel,
        stride=stride,
        resolution=resolution,
        act="relu",
        se=False,
        identity=stride == 1,
    ).build()
