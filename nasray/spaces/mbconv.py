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
class Place:
    """A block of the base, and where it is."""

    index: int  # of all blocks
    stage: int
    position: int  # in its stage
    block: BaseBlock
    expands: bool  # widens first; else its middle has as many channels as its input

    @property
    def name(self) -> str:
        """The name of the block."""
        return f"block{self.index}"

    @property
    def kernel_gene(self) -> str:
        """The name of the gene of its kernel, if it has one."""
        return f"{self.name}.kernel"

    @property
    def expand_gene(self) -> str:
        """The name of the gene of its middle channels, if it has one."""
        return f"{self.name}.expand"

    @property
    def depth_gene(self) -> str:
        """The name of the gene of its stage's depth, if it has one."""
        return f"stage{self.stage}.depth"


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
    def blocks(self) -> tuple[Place, ...]:
        """The blocks of the base, in order."""
        found, in_channels = [], self.network.stem
        for number, stage in enumerate(self.network.stages):
            for position, block in enumerate(stage.blocks):
                expands = block.mid_channels != in_channels
                found.append(Place(len(found), number, position, block, expands))
                in_channels = stage.out_channels
        return tuple(found)

    @cached_property
    def genes(self) -> tuple[Gene, ...]:
        resolution = Gene("resolution", "resolution", self.resolutions)
        return (*self._kernel_genes(), *self._expand_genes(), *self._depth_genes(), resolution)

    def _kernel_genes(self) -> Iterator[Gene]:
        for place in self.blocks:
            kernels = tuple(range(SMALLEST_KERNEL, place.block.kernel + 1, 2))
            if len(kernels) > 1:
                yield Gene(place.kernel_gene, "kernel", kernels)

    def _expand_genes(self) -> Iterator[Gene]:
        for place in self.blocks:
            if place.expands:
                yield Gene(place.expand_gene, "expand", self.expand_shares)

    def _depth_genes(self) -> Iterator[Gene]:
        for number, stage in enumerate(self.network.stages):
            depths = tuple(range(max(1, len(stage.blocks) - REMOVABLE), len(stage.blocks) + 1))
            if len(depths) > 1:
                yield Gene(f"stage{number}.depth", "depth", depths)

    @cached_property
    def _columns(self) -> dict[str, int]:
        return {gene.name: column for column, gene in enumerate(self.genes)}

    def _own_columns(self, place: Place) -> tuple[int, ...]:
        """The columns of a block's own genes."""
        names = (place.kernel_gene, place.expand_gene)
        return tuple(self._columns[name] for name in names if name in self._columns)

    def _switch(self, place: Place) -> Condition | None:
        """Which depth a block takes, with its own genes; None if it is always there."""
        column = self._columns.get(place.depth_gene)
        depths = self.genes[column].choices if column is not None else ()
        if column is None or place.position < depths[0]:
            return None
        return Condition(column, depths.index(place.position + 1), self._own_columns(place))

    @cached_property
    def conditions(self) -> tuple[Condition, ...]:
        """A stage's depth gene switches off the genes of the blocks behind that depth."""
        switches = map(self._switch, self.blocks)
        return tuple(switch for switch in switches if switch and switch.columns)

    @cached_property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        resolution = self._columns["resolution"]
        blocks = []
        for place in self.blocks:
            switch = self._switch(place)
            depth = (switch.depth,) if switch else ()
            blocks.append((*self._own_columns(place), *depth, resolution))
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
        for place in self.blocks:
            stage, block = network.stages[place.stage], place.block
            if place.position >= chosen(place.depth_gene, len(stage.blocks)):
                blocks.append(None)
                continue
            stride = stage.stride if place.position == 0 else 1
            share = chosen(place.expand_gene, 1.0)
            middle = block.mid_channels if share == 1 else div8(block.mid_channels * share)
            blocks.append(
                InvertedResidual(
                    name=place.name,
                    in_channels=in_channels,
                    mid_channels=middle,
                    out_channels=stage.out_channels,
                    kernel=int(chosen(place.kernel_gene, block.kernel)),
                    largest_kernel=block.kernel,
                    stride=stride,
                    resolution=resolution,
                    act=stage.act,
                    expands=place.expands,
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
