"""A network without its head, which returns its feature maps: the backbone of a detector.

The conventions are those of timm's features_only=True.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nasray.errors import UserError

PROBE = 256  # side of the image by which reductions are found, pixels


@dataclass(frozen=True)
class FeatureInfo:
    """What a FeatureNetwork returns: one entry per feature map, as timm's class of this name."""

    info: tuple[dict[str, Any], ...]

    def channels(self) -> list[int]:
        """The channels of each feature map."""
        return [each["num_chs"] for each in self.info]

    def reduction(self) -> list[int]:
        """How many pixels of the input a pixel of each feature map stands for, along a side."""
        return [each["reduction"] for each in self.info]

    def module_name(self) -> list[str]:
        """The block of the network that returns each feature map."""
        return [each["module"] for each in self.info]

    def get_dicts(self) -> list[dict[str, Any]]:
        """All of it: num_chs, reduction, module, and the index among all levels."""
        return [dict(each) for each in self.info]


class FeatureNetwork(nn.Module):
    """The blocks of `network` under their names, up to the last level that `out_indices` names.

    A level is the output of the last block at one resolution; the head, the last child of
    `network`, is left out. Indices count levels from 0, the finest, negative ones from the
    coarsest; all levels unless told.

    Raises:
        UserError: an index is of no level.
    """

    def __init__(self, network: nn.Sequential, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        levels = _levels(network)
        chosen = [levels[index] for index in _chosen(out_indices, levels)]
        self.feature_info = FeatureInfo(tuple(chosen))
        for name, block in network.named_children():
            self.add_module(name, block)
            if name == chosen[-1]["module"]:
                break

    def forward(self, images: Tensor) -> list[Tensor]:
        """Map images (n, 3, height, width), normalised, to one feature map per chosen level.

        Each is (n, channels, height / reduction, width / reduction).
        """
        found, features = [], images
        ends = self.feature_info.module_name()
        for name, block in self.named_children():
            features = block(features)
            if name in ends:
                found.append(features)
        return found


def _levels(network: nn.Sequential) -> list[dict[str, Any]]:
    """All levels of `network`, finest first, in timm's keys; on tensors without content."""
    levels: list[dict[str, Any]] = []
    features = torch.empty(1, 3, PROBE, PROBE, device="meta")
    blocks = list(copy.deepcopy(network).to("meta").eval().named_children())
    for name, block in blocks[:-1]:
        features = block(features)
        reduction = PROBE // features.shape[-1]
        if levels and levels[-1]["reduction"] == reduction:
            levels.pop()
        levels.append(
            {
                "num_chs": features.shape[1],
                "reduction": reduction,
                "module": name,
                "index": len(levels),
            }
        )
    return levels


def _chosen(out_indices: Sequence[int] | None, levels: Sequence[dict[str, Any]]) -> list[int]:
    """The indices of the wanted levels, ascending, each once."""
    number = len(levels)
    if out_indices is None:
        return list(range(number))
    is_list = isinstance(out_indices, list | tuple) and len(out_indices) > 0
    if not is_list or not all(
        type(each) is int and -number <= each < number for each in out_indices
    ):
        raise UserError(
            f"out_indices = {out_indices!r} must be a list of indices from 0 to {number - 1}, of "
            f"the levels with reductions {[level['reduction'] for level in levels]}"
        )
    return sorted({index % number for index in out_indices})
