"""What subnets cost: parameters, MACs, and the mults and adds of the MicroNet rules.

Three conventions, three sets of names (docs/spec.md, OneShot 4.1):
- `params`, `macs`: trainable parameters (BN's included) and multiply-accumulates, as
  papers print them. Convolutions with their bias and global pooling count, nothing else.
- `micronet_params`, `mults`, `adds`: the MicroNet Challenge rules, multiplications and
  additions apart, activations counted, BN folded away, a channel shuffle as a sparse
  permutation matrix that must be stored.
- `micronet_score`, `score:<baseline>`: weighted sums of those.

There are two ways to a number. profile.profile() walks the built network op by op; users read
it and tests trust it. A BlockTable holds each block's share by position and genes, so that a
population costs one gather. CostTable here and latency.LatencyTable are both built on it.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nasray.costs.micronet import MICRONET_OPS, MICRONET_PARAMS
from nasray.errors import UserError
from nasray.spaces.space import Architecture, Population, Space

COUNTS = ("params", "macs", "micronet_params", "mults", "adds")

# (MACs, params) of the baselines of the published combined score (docs/spec.md, OneShot 3.2).
SCORE_BASELINES = {
    "single_path_one_shot": (328e6, 3.4e6),
    "mobilenetv3_large": (217e6, 5.4e6),
    "mobilenetv2_1.4": (585e6, 6.9e6),
    "shufflenetv2plus_medium": (222e6, 5.6e6),
}

# Each cost as a weighted sum of the counts. All are additive over blocks.
COSTS: dict[str, dict[str, float]] = {
    **{count: {count: 1.0} for count in COUNTS},
    "micronet_score": {
        "micronet_params": 1 / MICRONET_PARAMS,
        "mults": 1 / MICRONET_OPS,
        "adds": 1 / MICRONET_OPS,
    },
    **{
        f"score:{name}": {"macs": 0.5 / macs, "params": 0.5 / params}
        for name, (macs, params) in SCORE_BASELINES.items()
    },
}

# (block, resolution of the network's input, pixels) -> the block's value, or values.
ValueOf = Callable[[Any, int], float | Sequence[float]]
Term = tuple[tuple[int, ...], np.ndarray]  # genes (columns), a table over their choices


class BlockTable:
    """What each block of a space adds to a sum, compiled by the genes that the block depends on.

    `value_of` gives one value of a block, or several: then `shape` is (their number,). It is
    called for every position and all choices of the position's genes, where there is a block.
    """

    def __init__(self, space: Space, value_of: ValueOf, shape: tuple[int, ...] = ()) -> None:
        self.genes, self.gene_columns = space.genes, space.gene_columns
        # Per position: float64 (choices of its genes..., *shape); 0 where depth omits the block.
        self.tables = [
            np.zeros([*(len(space.genes[column].choices) for column in columns), *shape])
            for columns in space.gene_columns
        ]
        for position, arch, choices in block_choices(space):
            block = space.decode(arch)[position]
            if block is not None:
                self.tables[position][choices] = value_of(block, space.resolution_of(arch))
        self._flatten(shape)

    def sums(self, population: Population) -> np.ndarray:
        """The sum over the blocks of each row of `population` (n, genes): float64 (n, *shape)."""
        # No matrix product: it would wake BLAS threads, which then spin on the cores that a
        # predictor computes on.
        choices = population.T.astype(self.offsets.dtype)
        places = np.repeat(self.offsets[:, None], len(population), axis=1)
        for columns, strides in zip(self.columns, self.strides, strict=True):
            places += choices[columns] * strides[:, None]
        total = np.zeros((len(population), *self.entries.shape[1:]))
        for values in self.entries[places]:  # in this order, for populations of any size
            total += values
        return total

    def bounds(self, weights: np.ndarray | None = None) -> tuple[float, float]:
        """The smallest and largest sum that search can reach, to the last digits.

        Of the sum itself, or of several values' sum weighted by `weights` (values,).
        """
        terms = []
        for columns, table in zip(self.gene_columns, self.tables, strict=True):
            drawn = table[tuple(slice(self.genes[column].first, None) for column in columns)]
            terms.append((columns, drawn if weights is None else drawn @ weights))
        return smallest_sum(terms), -smallest_sum([(columns, -table) for columns, table in terms])

    def _flatten(self, shape: tuple[int, ...]) -> None:
        """Join the entries of all tables, and compute how choices lead to a place among them."""
        self.entries = np.concatenate([table.reshape(-1, *shape) for table in self.tables])
        sizes = [table.size // int(np.prod(shape)) for table in self.tables]
        dtype = np.int16 if len(self.entries) <= np.iinfo(np.int16).max else np.int32
        self.offsets = np.cumsum([0, *sizes[:-1]], dtype=dtype)  # of each position's entries
        # The first gene column of every position, the second, ...: (most genes, positions).
        most = max(len(columns) for columns in self.gene_columns)
        self.columns = np.zeros((most, len(sizes)), dtype=np.intp)
        self.strides = np.zeros((most, len(sizes)), dtype=dtype)  # 0: no such column
        for position, columns in enumerate(self.gene_columns):
            table = self.tables[position]
            entry = table.itemsize * int(np.prod(shape))
            strides = np.array(table.strides[: len(columns)], dtype=dtype) // entry
            self.columns[: len(columns), position] = columns
            self.strides[: len(columns), position] = strides


class CostTable:
    """All of COSTS for a space, by a BlockTable of the counts that they are weighted sums of."""

    def __init__(self, space: Space) -> None:
        self.space = space

    @cached_property
    def blocks(self) -> BlockTable:
        """The counts of each block, in the order of COUNTS. Takes seconds in large spaces."""
        return BlockTable(self.space, _counts_of, (len(COUNTS),))

    def __call__(self, population: Population) -> dict[str, np.ndarray]:
        """All costs of `population` (n, genes): {cost: float64 (n,)}."""
        counts = self.blocks.sums(population)
        return {cost: counts @ _weights(cost) for cost in COSTS}

    def one(self, cost: str, population: Population) -> np.ndarray:
        """One cost of `population` (n, genes): float64 (n,), the same to the last bit."""
        return self.blocks.sums(population) @ _weights(cost)

    def bounds(self, cost: str) -> tuple[float, float]:
        """The smallest and largest value of `cost` that search can reach, to the last digits."""
        return self.blocks.bounds(_weights(cost))


def block_choices(space: Space) -> Iterator[tuple[int, Architecture, tuple[int, ...]]]:
    """Yield (position, architecture, choices) for all choices of each position's genes.

    All other genes of the architecture are at index 0.
    """
    for position, columns in enumerate(space.gene_columns):
        sizes = [len(space.genes[column].choices) for column in columns]
        for choices in itertools.product(*map(range, sizes)):
            arch = [0] * len(space.genes)
            for column, choice in zip(columns, choices, strict=True):
                arch[column] = choice
            yield position, tuple(arch), choices


def smallest_sum(terms: Sequence[Term]) -> float:
    """The smallest sum of the `terms`, each a table over the choices of its genes (columns).

    Terms may share genes, as depth, width and resolution do. Genes are decided one by one,
    each for every choice of those it still shares a term with (variable elimination).
    """
    open_terms = list(terms)
    while genes := sorted({column for columns, _ in open_terms for column in columns}):
        sharing = {gene: _sharing(gene, open_terms) for gene in genes}
        gene, columns = min(sharing.items(), key=lambda item: len(item[1]))
        values = np.asarray(sum(_align(*term, columns) for term in open_terms if gene in term[0]))
        rest = tuple(column for column in columns if column != gene)
        open_terms = [term for term in open_terms if gene not in term[0]]
        open_terms.append((rest, values.min(axis=columns.index(gene))))
    return float(sum(values.item() for _, values in open_terms))


def check_cost(cost: str) -> str:
    """Return `cost` if it is one of COSTS.

    Raises:
        UserError: it is not.
    """
    if cost not in COSTS:
        raise UserError(f"search.limits: cost {cost!r} is unknown; there are {sorted(COSTS)}")
    return cost


def _sharing(gene: int, terms: Sequence[Term]) -> tuple[int, ...]:
    """The genes, ascending, that share a term with `gene`, itself among them."""
    return tuple(sorted({column for own, _ in terms if gene in own for column in own}))


def _align(own: tuple[int, ...], values: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
    """Give a table over the genes `own` an axis for each of the ascending `columns`."""
    ordered = values.transpose(np.argsort(own))
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if column in own else 1 for column in columns])


def _weights(cost: str) -> np.ndarray:
    return np.array([COSTS[cost].get(count, 0.0) for count in COUNTS])


def _counts_of(block: Any, resolution: int) -> tuple[float, ...]:
    # Equal blocks of other names cost the same: one walk serves them all.
    return _walk(replace(block, name="block"))


@lru_cache(maxsize=65536)
def _walk(block: Any) -> tuple[float, ...]:
    # Here, so that a search whose table is compiled already needs no torch.
    from nasray.costs.operations import build_on_meta, count_ops

    shape = (1, block.in_channels, block.resolution, block.resolution)
    ops = count_ops(build_on_meta(block.build), shape)
    return tuple(float(sum(getattr(op, name) for op in ops)) for name in COUNTS)
