"""Channels in order of importance, before narrower blocks begin to be trained.

Once-for-All (Cai et al. 2020, arXiv 1908.09791, section 3.3) sorts the middle channels of every
block whenever a smaller expansion opens, so that a narrow block starts with those that matter most.
Plain torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from nasray.config import SupernetConfig
from nasray.spaces.space import Block, largest
from nasray.spaces.supernet import Supernet
from nasray.training.loop import Reorder
from nasray.training.sampler import open_choices

WIDTHS = ("expand", "scale")  # kinds of genes that narrow the middle of one block

# Of a tensor by name: the new order of its first entries along a dimension.
Order = tuple[str, int, Tensor]


def sorting(supernet: Supernet, config: SupernetConfig, epoch: int) -> Reorder | None:
    """What sorts channels before `epoch` (from 0) with sampling = "progressive"; None: nothing.

    Sorts where the epoch draws narrower blocks than the one before, which begins with the
    largest. Only channels of the narrowest blocks so far change places, and so what all blocks
    compute that were trained stays as it is.
    """
    if config.sampling != "progressive":
        return None
    space = supernet.space
    before = open_choices(space, config, epoch - 1)[0] if epoch else largest(space)
    now, _ = open_choices(space, config, epoch)
    orders = channel_orders(supernet, before, now)
    return partial(_apply, orders) if orders else None


def channel_orders(supernet: Supernet, before: Sequence[int], now: Sequence[int]) -> list[Order]:
    """The orders of all channels that blocks of the widths `before` have and those of `now` lack.

    Both are choices, one for each gene, of which those of a block's width count. A channel's
    importance is the L1 norm of all weights of its block that read it.
    """
    space, orders = supernet.space, list[Order]()
    for position, columns in enumerate(space.gene_columns):
        widths = [column for column in columns if space.genes[column].kind in WIDTHS]
        if all(before[column] == now[column] for column in widths):
            continue
        ops = [column for column in columns if space.genes[column].kind == "op"]
        for choices in product(*(range(len(space.genes[column].choices)) for column in ops)):
            arch = dict(enumerate(largest(space))) | dict(zip(ops, choices, strict=True))
            wide, narrow = (
                tuple((arch | {column: lowest[column] for column in widths}).values())
                for lowest in (before, now)
            )
            index = space.block_index(wide)[position]
            blocks = (space.decode(each)[position] for each in (wide, narrow))
            path = f"positions.{position}.{index}"
            orders += _orders_of(path, supernet.get_submodule(path), *map(_shapes, blocks))
    return orders


def _orders_of(
    path: str, stored: nn.Module, wide: dict[str, torch.Size], narrow: dict[str, torch.Size]
) -> Iterator[Order]:
    """The orders of one stored block's channels, by the shapes of a wider and a narrower one."""
    tensors = stored.state_dict()
    groups: dict[tuple[int, int], list[tuple[str, int]]] = {}  # dimensions with the same channels
    for name, shape in wide.items():
        for dim, (size, smaller) in enumerate(zip(shape, narrow[name], strict=True)):
            if smaller < size:
                groups.setdefault((size, smaller), []).append((name, dim))
    for (size, _), places in groups.items():
        readers = [tensors[name] for name, dim in places if dim == 1]
        if readers:
            norms = (weight[:, :size].abs().transpose(0, 1).flatten(1).sum(1) for weight in readers)
            order = torch.stack(list(norms)).sum(0).argsort(descending=True, stable=True)
            yield from ((f"{path}.{name}", dim, order) for name, dim in places)


def _shapes(block: Block | None) -> dict[str, torch.Size]:
    if block is None:
        return {}
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in block.build().state_dict().items()}


@torch.no_grad()
def _apply(orders: Sequence[Order], tensors: Mapping[str, Tensor]) -> None:
    for name, dim, order in orders:
        if name in tensors:
            part = tensors[name].narrow(dim, 0, len(order))
            part.copy_(part.index_select(dim, order))
