"""A published network of inverted residual blocks, made elastic: the largest subnet is the base.

Genes: the depth of each stage, the kernel and the share of the base's middle channels of each
block, and the resolution. Made to start from the base's trained weights (nasray/pretrained),
which is why nothing is larger than in the base.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from nasray.errors import UserError, did_you_mean
from nasray.spaces.mbconv_bases import BASES, Base, BaseBlock
from nasray.spaces.mbconv_blocks import ConvStem, Head, InvertedResidual
from nasray.spaces.ofa import Condition, OfaSpace
from nasray.spaces.ofa_mbconv import KEYS, div8
from nasray.spaces.space import Architecture, Block, Gene, out_resolution

SMALLEST_KERNEL = 3
REMOVABLE = 2  # a stage may lose so many of its blocks, but never its first


@dataclass(frozen=True)
class MBConv(OfaSpace):
    """The subnets of `base`, a name in mbconv_bases.BASES."""

    name = "mbconv"
    keys = KEYS

    base: str = "efficientnet_lite0"
    expand_shares: tuple[float, ...] = (0.35, 0.5, 0.75, 1.0)  # of the base's middle channels

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: the base is unknown, the shares are not ascending to 1, or the resolutions
                are out of range.
        """
        super().__post_init__()
        if self.base not in BASES:
            hint = did_you_mean(self.base, list(BASES)) or ";"
            raise UserError(
                f"space.base = {self.base!r} is unknown{hint} there are {', '.join(BASES)}"
            )
        shares = list(self.expand_shares)
        in_order = shares == sorted(set(shares)) and shares and shares[0] > 0 and shares[-1] == 1
        if not in_order:
            raise UserError(
                f"space.expand_shares = {shares} must be distinct, ascending, above 0, and end "
                "with 1.0, the base itself"
            )

    @property
    def network(self) -> Base:
        """The base's table of stages."""
        return BASES[self.base]

    @cached_property
    def blocks(self) -> tuple[tuple[int, int, BaseBlock, bool], ...]:
        """Stage, position in it, block, and whether it widens first, for each block."""
        found, in_channels = [], self.network.stem
        for number, stage in enumerate(self.network.stages):
            for position, block in enumerate(stage.blocks):
                found.append((number, position, block, block.mid_channels != in_channels))
                in_channels = stage.out_channels
        return tuple(found)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        return (*self._kernel_genes(), *self._expand_genes(), *self._depth_genes(), self._last)

    @property
    def _last(self) -> Gene:
        return Gene("resolution", "resolution", self.resolutions)

    def _kernel_genes(self) -> Iterator[Gene]:
        for index, (_, _, block, _) in enumerate(self.blocks):
            kernels = tuple(range(SMALLEST_KERNEL, block.kernel + 1, 2))
            if len(kernels) > 1:
                yield Gene(f"block{index}.kernel", "kernel", kernels)

    def _expand_genes(self) -> Iterator[Gene]:
        for index, (*_, expands) in enumerate(self.blocks):
            if expands:
                yield Gene(f"block{index}.expand", "expand", self.expand_shares)

    def _depth_genes(self) -> Iterator[Gene]:
        for number, stage in enumerate(self.network.stages):
            depths = tuple(range(max(1, len(stage.blocks) - REMOVABLE), len(stage.blocks) + 1))
            if len(depths) > 1:
                yield Gene(f"stage{number}.depth", "depth", depths)

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {gene.name: column for column, gene in enumerate(self.genes)}

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """A stage's depth gene switches off the genes of the blocks behind that depth."""
        found = []
        for index, (number, position, _, _) in enumerate(self.blocks):
            own = [f"block{index}.kernel", f"block{index}.expand"]
            columns = tuple(self._columns[name] for name in own if name in self._columns)
            depth = self._columns.get(f"stage{number}.depth")
            if depth is None:
                continue
            needed = self.genes[depth].choices.index(position + 1) if self._removable(index) else 0
            if needed and columns:
                found.append(Condition(depth, needed, columns))
        return tuple(found)

    def _removable(self, index: int) -> bool:
        number, position, _, _ = self.blocks[index]
        depth = self._columns.get(f"stage{number}.depth")
        return depth is not None and position >= self.genes[depth].choices[0]

    @cached_property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        resolution = self._columns["resolution"]
        blocks = []
        for index, (number, _, _, _) in enumerate(self.blocks):
            names = [f"block{index}.kernel", f"block{index}.expand"]
            if self._removable(index):
                names.append(f"stage{number}.depth")
            own = (self._columns[name] for name in names if name in self._columns)
            blocks.append((*own, resolution))
        return ((resolution,), *blocks, (resolution,))

    def decode(self, arch: Architecture) -> tuple[Block | None, ...]:
        network = self.network

        def chosen(name: str, default: float) -> float:
            column = self._columns.get(name)
            return default if column is None else self.genes[column].choices[arch[column]]

        resolution = self.resolution_of(arch)
        blocks: list[Block | None] = [
            ConvStem(
                name="stem",
                resolution=resolution,
                out_channels=network.stem,
                act=network.act,
                eps=network.eps,
                padding=network.padding,
            )
        ]
        resolution, in_channels = out_resolution(resolution, 2), network.stem
        for index, (number, position, block, expands) in enumerate(self.blocks):
            stage = network.stages[number]
            if position >= chosen(f"stage{number}.depth", len(stage.blocks)):
                blocks.append(None)
                continue
            stride = stage.stride if position == 0 else 1
            share = chosen(f"block{index}.expand", 1.0)
            blocks.append(
                InvertedResidual(
                    name=f"block{index}",
                    in_channels=in_channels,
                    mid_channels=block.mid_channels
                    if share == 1
                    else div8(block.mid_channels * share),
                    out_channels=stage.out_channels,
                    kernel=int(chosen(f"block{index}.kernel", block.kernel)),
                    largest_kernel=block.kernel,
                    stride=stride,
                    resolution=resolution,
                    act=stage.act,
                    expands=expands,
                    squeezed=block.squeezed,
                    squeeze_act=network.squeeze_act,
                    gate=network.gate,
                    identity=stride == 1 and in_channels == stage.out_channels,
                    eps=network.eps,
                    padding=network.padding,
                )
            )
            in_channels, resolution = stage.out_channels, out_resolution(resolution, stride)
        head = Head(
            name="head",
            in_channels=in_channels,
            mid_channels=network.head,
            features=network.features,
            resolution=resolution,
            num_classes=self.num_classes,
            act=network.act,
            eps=network.eps,
        )
        return (*blocks, head)
