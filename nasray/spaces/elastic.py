"""A supernet whose subnets are slices: the first channels of its widest blocks.

Every subnet weight is a leading slice of a weight of the widest block, in every dimension.
So one plain block class serves the supernet and the extracted subnet alike, and
supernet(images, arch) is extract(arch)(images) by construction. The original multiplies
by a 0/1 mask before BN instead, which BN's shift undoes (spec 1.7).
"""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nasray.spaces.space import Architecture, Block, Space


class SlicedSpace(Space, Protocol):
    """A space whose every row is a slice of one of a few widest blocks."""

    def widest(self) -> tuple[tuple[Block, ...], ...]:
        """For each row of decode(): the blocks at full width that it may be a slice of."""

    def chosen(self, arch: Architecture) -> tuple[int, ...]:
        """For each row of decode(): which of widest()'s blocks it is a slice of."""


class Supernet(nn.Module):
    """All blocks of a space at full width; runs one subnet at a time, at its true width.

    The architecture is an argument, never state. Only the chosen blocks take part in a
    step, so the others' gradients stay None and the optimiser leaves them alone.
    """

    def __init__(self, space: SlicedSpace) -> None:
        super().__init__()
        self.space = space
        self.positions = nn.ModuleList(
            nn.ModuleList(block.build() for block in blocks) for blocks in space.widest()
        )

    def forward(self, images: Tensor, arch: Architecture) -> Tensor:
        """Map images (n, 3, side, side) to logits (n, classes) by the subnet `arch`."""
        features = images
        for block, whole in self._chosen(arch):
            shell, shapes = _shell(block, self.training)
            features = functional_call(shell, _sliced(whole, shapes), (features,))
        return features

    def extract(self, arch: Architecture) -> nn.Sequential:
        """Cut out the subnet `arch`: a plain module of standard layers with its own weights."""
        blocks = OrderedDict()
        for block, whole in self._chosen(arch):
            shell, shapes = _shell(block, self.training)
            module = copy.deepcopy(shell).to_empty(device=next(whole.parameters()).device)
            module.load_state_dict(_sliced(whole, shapes))
            blocks[block.name] = module
        return nn.Sequential(blocks).train(self.training)

    def parameters_of(self, arch: Architecture) -> list[nn.Parameter]:
        """The parameters that a step on `arch` touches, in a fixed order."""
        return [param for _, whole in self._chosen(arch) for param in whole.parameters()]

    def _chosen(self, arch: Architecture) -> list[tuple[Block, nn.Module]]:
        return [
            (block, wholes[index])
            for block, wholes, index in zip(
                self.space.decode(arch), self.positions, self.space.chosen(arch), strict=True
            )
        ]


def embed(target: Tensor, source: Tensor) -> None:
    """Copy weights; a smaller kernel goes into the middle of a larger one, zeros around it."""
    margin = (target.shape[-1] - source.shape[-1]) // 2 if target.dim() == 4 else 0
    target.zero_()
    (target[..., margin:-margin, margin:-margin] if margin else target).copy_(source)


def build_subnet(blocks: Sequence[Block]) -> nn.Sequential:
    """Build the stand-alone network of decoded `blocks`, its weights not yet drawn."""
    return nn.Sequential(OrderedDict((block.name, block.build()) for block in blocks))


@lru_cache(maxsize=8192)
def _shell(block: Block, training: bool) -> tuple[nn.Module, dict[str, torch.Size]]:
    """The block's module without storage, and the shapes its weights and buffers must have.

    Its forward is called with slices as weights. Never altered, so it may be shared.
    """
    with torch.device("meta"):
        module = block.build().train(training)
    return module, {name: tensor.shape for name, tensor in module.state_dict().items()}


def _sliced(whole: nn.Module, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The leading slices of `whole`'s weights and buffers that have `shapes`, by name."""
    return {
        name: tensor
        if tensor.shape == shapes[name]
        else tensor[tuple(slice(length) for length in shapes[name])]
        for name, tensor in (*whole.named_parameters(), *whole.named_buffers())
    }
