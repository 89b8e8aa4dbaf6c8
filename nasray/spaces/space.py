"""What every design space offers.

One architecture is a tuple of small integers, one choice index per gene. A population is
an int8 array (n, genes); population.py has the operators. Knows no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from nasray.errors import UserError

Architecture = tuple[int, ...]
Population = np.ndarray  # int8 (n, genes)


@dataclass(frozen=True)
class Gene:
    """One decision. What `kind` means to those who know no space:

    - "op": an operation. Its choices have no order (population.embedded), and a shared start
      trains the first one alone (training/sampler.py).
    - "scale": a width, by the channel-selection warm-up; choices are shares, ascending.
    - "kernel", "depth", "expand", "width": by progressive shrinking (ibid.). "kernel" and "expand"
      of names alike up to their last dot mutate together in the staged searches.
    - "resolution": the side of the input, pixels.

    Genes of any other kind are drawn from all of their choices from the first step on.
    """

    name: str  # unique in its space
    kind: str
    choices: tuple[Any, ...]  # but for "op" from the cheapest to the costliest
    first: int = 0  # search draws from choices[first:]; all of choices[] can be built


class Block(Protocol):
    """One block of a decoded architecture: frozen, hashable, complete in itself.

    Equal blocks cost the same: cost and latency tables hold one entry for all of them.
    """

    name: str
    in_channels: int
    resolution: int  # of the square input, pixels

    def build(self) -> Any:
        """Build the block as a plain nn.Module of standard layers.

        It maps features (n, in_channels, resolution, resolution) to the next block's input.
        Layers are what is counted and measured: an activation is a module, not a function. BN is
        folded into a convolution only if it is the next child of the same nn.Sequential.
        """


class Space(Protocol):
    """A design space: a frozen dataclass in a file of its own, listed in spaces/__init__.py.

    Its fields are the keys of a job's [space] section.
    """

    name: str
    resolution: int  # of the images that are loaded, pixels
    num_classes: int

    @property
    def genes(self) -> tuple[Gene, ...]:
        """The decisions that make up an architecture, in its order."""

    @property
    def gene_columns(self) -> tuple[tuple[int, ...], ...]:
        """For each position of decode(): the genes (columns) that its block depends on."""

    @property
    def named(self) -> Mapping[str, Architecture]:
        """Published architectures by name."""

    def resolution_of(self, arch: Architecture) -> int:
        """Return the resolution of the square input of `arch`, pixels; at most `resolution`."""

    def decode(self, arch: Architecture) -> tuple[Block | None, ...]:
        """List the blocks of the subnet that `arch` stands for, stem to head.

        One entry per position of the deepest network, None where `arch` has no block.
        """

    def canonical(self, population: Population) -> Population:
        """Zero genes without effect, and order those that may trade places: one row a network."""

    def supernet(self) -> Any:
        """Build the supernet: forward(images, arch), extract(arch)."""

    def initialize(self, network: Any, generator: Any) -> None:
        """Draw the initial weights of a supernet or subnet in place, from `generator` alone."""

    def copy_to_siblings(self, supernet: Any) -> None:
        """Copy the weights of each position's first operation into its others, where they fit."""

    def to_json(self, arch: Architecture) -> dict[str, Any]:
        """Write `arch` under the keys that the space's publication uses."""

    def from_json(self, values: Mapping[str, Any]) -> Architecture:
        """Read what to_json() writes.

        Raises:
            UserError: `values` is no architecture of this space; the message names the key.
        """


def largest(space: Space) -> Architecture:
    """Return the last choice of every gene: the costliest architecture, but for operations."""
    return tuple(len(gene.choices) - 1 for gene in space.genes)


def num_architectures(genes: Sequence[Gene]) -> int:
    """Count the architectures search may draw (before canonical form)."""
    return prod(len(gene.choices) - gene.first for gene in genes)


def out_resolution(resolution: int, stride: int) -> int:
    """Return the output resolution of a convolution with padding kernel // 2."""
    return (resolution - 1) // stride + 1


def check_architecture(arch: Sequence[int], space: Space) -> Architecture:
    """Return `arch` as a tuple.

    Raises:
        UserError: it does not lie in `space`; the message names the first gene that does not.
    """
    if len(arch) != len(space.genes):
        raise UserError(f"{space.name} has {len(space.genes)} genes, got {len(arch)}: {list(arch)}")
    for gene, choice in zip(space.genes, arch, strict=True):
        if not 0 <= choice < len(gene.choices):
            raise UserError(
                f"{space.name}: gene {gene.name} = {choice} must be an index 0..."
                f"{len(gene.choices) - 1} of its choices {list(gene.choices)}"
            )
    return tuple(int(choice) for choice in arch)


def index_lists(
    space: Space, values: Mapping[str, Any], keys: Mapping[str, str]
) -> dict[str, list[int]]:
    """Read a JSON object of lists of choice indices, given the kind of genes of each key.

    Raises:
        UserError: a key is missing or unknown, or a list has not one integer per gene.
    """
    unknown = sorted(set(values) - set(keys))
    missing = sorted(set(keys) - set(values))
    if unknown or missing:
        raise UserError(
            f"an architecture of {space.name} has the keys {sorted(keys)}, got {sorted(values)}"
        )
    lists = {}
    for key, kind in keys.items():
        count = sum(gene.kind == kind for gene in space.genes)
        value = values[key]
        whole = isinstance(value, list) and all(type(index) is int for index in value)
        if not whole or len(value) != count:
            raise UserError(
                f"{space.name}: {key!r} must be a list of {count} integers, got {value}"
            )
        lists[key] = value
    return lists
