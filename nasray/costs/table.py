"""What a subnet costs: parameters, MACs, and the mults and adds of the MicroNet rules.

Three conventions, three sets of names (spec 4.1):
- `params`, `macs`: trainable parameters (BN's included) and multiply-accumulates, as
  papers print them. Convolutions with their bias and global pooling count, nothing else.
- `micronet_params`, `mults`, `adds`: the MicroNet Challenge rules, multiplications and
  additions apart, activations counted, BN folded away, a channel shuffle as a sparse
  permutation matrix that must be stored.
- `micronet_score`, `score:<baseline>`: weighted sums of those.

There are two ways to a number. profile.profile() walks the built network op by op; users read
it and tests trust it. CostTable holds the sum of each block's walk by position and genes,
and prices a whole population by gathers.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from nasray.errors import UserError
from nasray.spaces.space import Population, Space

COUNTS = ("params", "macs", "micronet_params", "mults", "adds")

# MobileNetV2-1.4, the MicroNet Challenge's ImageNet baseline: score 2.0 by definition.
MICRONET_PARAMS, MICRONET_OPS = 6.9e6, 1170e6

# (MACs, params) of the baselines of the published combined score (spec 3.2).
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


Term = tuple[tuple[int, ...], np.ndarray]  # genes (columns), a table over their choices


class CostTable:
    """All costs of a space, compiled: prices a population by one gather per block."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.genes = space.genes
        self.parts = space.gene_columns

    @cached_property
    def tables(self) -> list[np.ndarray]:
        """Per part: float64 (choices of its genes..., counts). Takes seconds in large spaces."""
        return _compile(self.space)

    def __call__(self, population: Population) -> dict[str, np.ndarray]:
        """Price `population` (n, genes): {cost: float64 (n,)}."""
        counts = self._count(population)
        return {cost: counts @ _weights(cost) for cost in COSTS}

    def one(self, cost: str, population: Population) -> np.ndarray:
        """One cost of `population` (n, genes): float64 (n,), the same to the last bit."""
        return self._count(population) @ _weights(cost)

    def _count(self, population: Population) -> np.ndarray:
        counts = np.zeros((len(population), len(COUNTS)))
        for columns, table in zip(self.parts, self.tables, strict=True):
            counts += table[tuple(population[:, column] for column in columns)]
        return counts

    def bounds(self, cost: str) -> tuple[float, float]:
        """The smallest and largest value of `cost` that search can reach, to the last digits."""
        terms = []
        for columns, table in zip(self.parts, self.tables, strict=True):
            drawn = table[tuple(slice(self.genes[column].first, None) for column in columns)]
            terms.append((columns, drawn @ _weights(cost)))
        return smallest_sum(terms), -smallest_sum([(columns, -table) for columns, table in terms])


def smallest_sum(terms: Sequence[Term]) -> float:
    """The smallest sum of the `terms`, each a table over the choices of its genes (columns).

    Terms may share genes, as depth, width and input side do. Genes are decided one by one,
    each for every choice of those it still meets in a term (variable elimination).
    """
    open_terms = list(terms)
    while genes := sorted({column for columns, _ in open_terms for column in columns}):
        met = {gene: _met(gene, open_terms) for gene in genes}
        gene, columns = min(met.items(), key=lambda item: len(item[1]))
        values = np.asarray(sum(_spread(*term, columns) for term in open_terms if gene in term[0]))
        rest = tuple(column for column in columns if column != gene)
        open_terms = [term for term in open_terms if gene not in term[0]]
        open_terms.append((rest, values.min(axis=columns.index(gene))))
    return float(sum(values.item() for _, values in open_terms))


def check_cost(cost: str) -> str:
    if cost not in COSTS:
        raise UserError(f"search.limits: cost {cost!r} is unknown; there are {sorted(COSTS)}")
    return cost


def _met(gene: int, terms: Sequence[Term]) -> tuple[int, ...]:
    """The genes, ascending, that share a term with `gene`, itself among them."""
    return tuple(sorted({column for own, _ in terms if gene in own for column in own}))


def _spread(own: tuple[int, ...], values: np.ndarray, columns: tuple[int, ...]) -> np.ndarray:
    """Give a table over the genes `own` an axis for each of the ascending `columns`."""
    ordered = values.transpose(np.argsort(own))
    sizes = iter(ordered.shape)
    return ordered.reshape([next(sizes) if column in own else 1 for column in columns])


def _compile(space: Space) -> list[np.ndarray]:
    """Price each part at every choice of its own genes, the other genes at index 0."""
    tables = []
    for position, columns in enumerate(space.gene_columns):
        sizes = [len(space.genes[column].choices) for column in columns]
        table = np.zeros((*sizes, len(COUNTS)))
        for choices in itertools.product(*map(range, sizes)):
            arch = [0] * len(space.genes)
            for column, choice in zip(columns, choices, strict=True):
                arch[column] = choice
            block = space.decode(tuple(arch))[position]
            if block is not None:
                # Equal blocks of other names cost the same: one walk serves them all.
                table[choices] = _block_counts(replace(block, name="block"))  # type: ignore
        tables.append(table)
    return tables


def _weights(cost: str) -> np.ndarray:
    return np.array([COSTS[cost].get(count, 0.0) for count in COUNTS])


@lru_cache(maxsize=65536)
def _block_counts(block: Any) -> tuple[float, ...]:
    # Here, so that a search whose table is compiled already needs no torch.
    from nasray.costs.operations import build_on_meta, count_ops

    ops = count_ops(
        build_on_meta(block.build), (1, block.in_channels, block.resolution, block.resolution)
    )
    return tuple(float(sum(getattr(op, name) for op in ops)) for name in COUNTS)
