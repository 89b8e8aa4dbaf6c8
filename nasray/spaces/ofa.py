"""What the OFA spaces share: genes that a depth switches off, their JSON, first weights.

A stage has a depth gene, and the genes of blocks beyond that depth have no effect. How the
blocks compute is in ofa_mbconv.py and in the spaces' own files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from nasray.errors import UserError
from nasray.spaces.space import Architecture, Block, Gene, Population, check_architecture, largest
from nasray.spaces.supernet import SlicedSpace, Supernet


class Condition(NamedTuple):
    """The genes in `columns` have an effect only while gene `depth` is at least `needed`."""

    depth: int  # a column
    needed: int  # a choice index
    columns: tuple[int, ...]


@dataclass(frozen=True)
class OfaSpace(SlicedSpace):
    """Base of the OFA spaces; they add genes, conditions, gene_columns and decode().

    Every block that a position may have is a slice of one stored block. Choices of a gene are
    listed cheapest first, and the last gene is the resolution.
    """

    name: ClassVar[str]
    keys: ClassVar[Mapping[str, str]]  # JSON key -> kind of its genes

    num_classes: int = 1000
    resolution: int = 224  # of the images that are loaded, pixels
    resolutions: tuple[int, ...] = (160, 176, 192, 208, 224)  # of the network's input, pixels

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            UserError: resolutions are not ascending or exceed that of the loaded images, or
                the width, in the spaces that have this option, is out of range.
        """
        resolutions = list(self.resolutions)
        if not resolutions or resolutions != sorted(set(resolutions)):
            raise UserError(f"space.resolutions = {resolutions} must be distinct and ascending")
        if resolutions[0] < 32:
            raise UserError(f"space.resolutions = {resolutions} must all be 32 or more")
        if resolutions[-1] > self.resolution:
            raise UserError(
                f"space.resolutions = {resolutions} must not exceed "
                f"space.resolution = {self.resolution}, the side of the loaded images"
            )
        width = getattr(self, "width", 1.0)
        if not 0 < width <= 8:
            raise UserError(f"space.width = {width} must be above 0 and at most 8")

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Which genes the depth genes switch off."""
        raise NotImplementedError

    @property
    def named(self) -> Mapping[str, Architecture]:
        return {
            "smallest": (0,) * len(self.genes),
            "largest": largest(self),
        }

    def resolution_of(self, arch: Architecture) -> int:
        return self.resolutions[arch[-1]]

    def canonical(self, population: Population) -> Population:
        population = population.copy()
        for depth, needed, columns in self.conditions:
            is_used = population[:, depth] >= needed
            for column in columns:
                population[:, column] *= is_used
        return population

    def max_blocks(self) -> tuple[tuple[Block, ...], ...]:
        blocks = self.decode(self.named["largest"])
        return tuple((block.elastic() if hasattr(block, "elastic") else block,) for block in blocks)

    def block_index(self, arch: Architecture) -> tuple[int, ...]:
        return (0,) * len(self.gene_columns)

    def supernet(self) -> Supernet:
        return Supernet(self)

    def copy_to_siblings(self, supernet: Supernet) -> None:
        """Do nothing: a position has one stored block, of which every choice is a part."""

    def initialize(self, network: nn.Module, generator: torch.Generator) -> None:
        """Draw the weights of each output channel with a norm of 1 on average, in place.

        BN and kernel matrices start as identities. The published He weights by fan-out have
        norms that differ by a factor of 6 between the layers of a block. After BN such a norm
        is without effect on the outputs, but learning rates count relative to its square:
        small data sets were not learnt at any one rate.
        """
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "transform_" in name:
                    nn.init.eye_(parameter)
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    fan_in = module.weight[0].numel()
                    module.weight.normal_(0.0, fan_in**-0.5, generator=generator)
                elif isinstance(module, nn.Linear):
                    bound = module.in_features**-0.5
                    module.weight.uniform_(-bound, bound, generator=generator)
                elif isinstance(module, nn.BatchNorm2d):
                    module.reset_parameters()
                if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
                    module.bias.zero_()

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        """Write `arch` as values, not choice indices; genes without effect as null."""
        inactive = self._inactive(arch)
        lists: dict[str, list[Any]] = {kind: [] for kind in self.keys.values()}
        for column, (gene, choice) in enumerate(zip(self.genes, arch, strict=True)):
            lists[gene.kind].append(None if column in inactive else gene.choices[choice])
        return {
            key: lists[kind][0] if kind == "resolution" else lists[kind]
            for key, kind in self.keys.items()
        }

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        """Read what to_json() writes; values of genes without effect are checked, then dropped.

        Raises:
            UserError: a key is missing or unknown, a list has the wrong length, or a value is
                not among its gene's choices.
        """
        if set(values) != set(self.keys):
            raise UserError(
                f"an architecture of {self.name} has the keys {sorted(self.keys)}, "
                f"got {sorted(values)}"
            )
        arch: list[int | None] = [None] * len(self.genes)
        for key, kind in self.keys.items():
            columns = [column for column, gene in enumerate(self.genes) if gene.kind == kind]
            given = [values[key]] if kind == "resolution" else values[key]
            if not isinstance(given, list) or len(given) != len(columns):
                raise UserError(
                    f"{self.name}: {key!r} must be a list of {len(columns)} values, "
                    f"got {values[key]}"
                )
            for column, value in zip(columns, given, strict=True):
                arch[column] = self._choice_index(key, self.genes[column], value)
        inactive = self._inactive(tuple(choice or 0 for choice in arch))
        for column, choice in enumerate(arch):
            if choice is None and column not in inactive:
                raise UserError(
                    f"{self.name}: gene {self.genes[column].name} has an effect, not null"
                )
        return check_architecture(
            [0 if column in inactive else choice or 0 for column, choice in enumerate(arch)], self
        )

    def _inactive(self, arch: Architecture) -> set[int]:
        """The columns of `arch` that its depths switch off."""
        return {
            column
            for depth, needed, columns in self.conditions
            if arch[depth] < needed
            for column in columns
        }

    def _choice_index(self, key: str, gene: Gene, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or value not in gene.choices:
            raise UserError(
                f"{self.name}: {key!r}: gene {gene.name} = {value!r} must be one of "
                f"{list(gene.choices)}"
            )
        return gene.choices.index(value)


def num_networks(space: OfaSpace) -> int:
    """Count the networks of `space`, each once, at every input resolution."""
    sizes = [len(gene.choices) for gene in space.genes]
    depths = {condition.depth for condition in space.conditions}
    switched = {column for condition in space.conditions for column in condition.columns}
    count = prod(size for column, size in enumerate(sizes) if column not in depths | switched)
    for depth in depths:
        count *= sum(
            prod(
                sizes[column]
                for condition in space.conditions
                if condition.depth == depth and choice >= condition.needed
                for column in condition.columns
            )
            for choice in range(sizes[depth])
        )
    return count
