"""What the OFA spaces share: genes that a depth switches off, their JSON, first weights.

A stage has a depth gene; the genes of blocks beyond the depth have no effect. Knows no
layers.
"""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from nasray.errors import UserError
from nasray.spaces.space import Architecture, Block, Gene, Population, Space, check_architecture


class Condition(NamedTuple):
    """`columns` have an effect only while the gene in column `depth` is at least `needed`."""

    depth: int
    needed: int  # a choice index
    columns: tuple[int, ...]


class OfaSpace(Space, Protocol):
    """A space with genes that others switch off, and a JSON form of values."""

    @property
    def conditions(self) -> tuple[Condition, ...]: ...

    @property
    def keys(self) -> Mapping[str, str]:
        """JSON key -> kind of its genes."""


def check_resolutions(resolution: int, resolutions: tuple[int, ...]) -> None:
    """Refuse resolutions that are not ascending, or larger than the images that are loaded."""
    if not resolutions or list(resolutions) != sorted(set(resolutions)):
        raise UserError(f"space.resolutions = {list(resolutions)} must be distinct and ascending")
    if resolutions[0] < 32:
        raise UserError(f"space.resolutions = {list(resolutions)} must all be 32 or more")
    if resolutions[-1] > resolution:
        raise UserError(
            f"space.resolutions = {list(resolutions)} must not exceed "
            f"space.resolution = {resolution}, that of the loaded images"
        )


def check_width(width: float) -> None:
    if not 0 < width <= 8:
        raise UserError(f"space.width = {width} must be above 0 and at most 8")


def extremes(genes: Sequence[Gene]) -> dict[str, Architecture]:
    """The smallest and the largest architecture: choices are listed cheapest first."""
    return {
        "smallest": (0,) * len(genes),
        "largest": tuple(len(gene.choices) - 1 for gene in genes),
    }


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


def canonical(population: Population, conditions: Iterable[Condition]) -> Population:
    """Zero the genes that a depth gene switches off."""
    population = population.copy()
    for depth, needed, columns in conditions:
        there = population[:, depth] >= needed
        for column in columns:
            population[:, column] *= there
    return population


def inactive(arch: Architecture, conditions: Iterable[Condition]) -> set[int]:
    """The columns of `arch` that its depths switch off."""
    return {
        column
        for depth, needed, columns in conditions
        if arch[depth] < needed
        for column in columns
    }


def to_json(space: OfaSpace, arch: Architecture) -> dict[str, Any]:
    """Write `arch` as values, not indices; genes without effect as null."""
    off = inactive(arch, space.conditions)
    lists: dict[str, list[Any]] = {key: [] for key in space.keys}
    by_kind = {kind: lists[key] for key, kind in space.keys.items()}
    for column, (gene, choice) in enumerate(zip(space.genes, arch, strict=True)):
        by_kind[gene.kind].append(None if column in off else gene.choices[choice])
    return {
        key: values[0] if space.keys[key] == "resolution" else values
        for key, values in lists.items()
    }


def from_json(space: OfaSpace, values: Mapping[str, Any]) -> Architecture:
    """Read what to_json() writes; values of genes without effect are checked, then dropped."""
    if set(values) != set(space.keys):
        raise UserError(
            f"an architecture of {space.name} has the keys {sorted(space.keys)}, "
            f"got {sorted(values)}"
        )
    arch: list[int | None] = [None] * len(space.genes)
    for key, kind in space.keys.items():
        columns = [column for column, gene in enumerate(space.genes) if gene.kind == kind]
        given = [values[key]] if kind == "resolution" else values[key]
        if not isinstance(given, list) or len(given) != len(columns):
            raise UserError(
                f"{space.name}: {key!r} must be a list of {len(columns)} values, got {values[key]}"
            )
        for column, value in zip(columns, given, strict=True):
            arch[column] = _choice(space, key, space.genes[column], value)
    off = inactive(tuple(choice or 0 for choice in arch), space.conditions)
    for column, choice in enumerate(arch):
        if choice is None and column not in off:
            raise UserError(
                f"{space.name}: gene {space.genes[column].name} has an effect, not null"
            )
    return check_architecture(
        [0 if column in off else choice or 0 for column, choice in enumerate(arch)], space
    )


def initialize(network: nn.Module, generator: torch.Generator) -> None:
    """Draw the weights of each output channel with a norm of 1 on average, in place.

    BN and kernel matrices start as identities. The published He weights by fan-out have
    norms that differ by a factor of 6 between the layers of a block. After BN such a norm is
    without effect on the outputs, but learning rates count relative to its square: small
    data sets were not learnt at any one rate.
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


def stored(rows: Sequence[Block | None]) -> tuple[tuple[Block, ...], ...]:
    """For each row of the largest network, the one stored block that all its choices are cut of."""
    return tuple(
        (row.elastic() if hasattr(row, "elastic") else row,) for row in rows if row is not None
    )


def _choice(space: Space, key: str, gene: Gene, value: Any) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or value not in gene.choices:
        raise UserError(
            f"{space.name}: {key!r}: gene {gene.name} = {value!r} must be one of "
            f"{list(gene.choices)}"
        )
    return gene.choices.index(value)
