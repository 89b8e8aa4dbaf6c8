"""Read the accuracy predictors that Once-for-All published (docs/spec.md, OFA 3).

Their layers take one-hot inputs in an order of their own and leave out genes that only
switch others off; here each input column moves to its gene, and those genes get zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nasray.errors import UserError
from nasray.spaces.space import Space

RESNET_KEYS = {"base_acc", "layers.3.weight"} | {
    f"layers.{index}.0.{kind}" for index in range(3) for kind in ("weight", "bias")
}


@dataclass(frozen=True)
class Layout:
    """A published input: the first column of each kind of genes, or of one gene by its name.

    Genes of one kind follow each other.
    """

    starts: dict[str, int]
    resolutions: tuple[int, ...]  # that it has a column for, pixels


# The tutorial's for MobileNetV3, and the library's for ResNet50D.
MOBILENETV3 = Layout({"kernel": 0, "expand": 60, "resolution": 120}, tuple(range(112, 225, 16)))
RESNET50D = Layout(
    {"resolution": 0, "stem.depth": 8, "width": 10, "expand": 28},
    (128, 144, 160, 176, 192, 224, 240, 256),
)


def published_layers(content: Any, space: Space, path: str) -> list[tuple[Tensor, Tensor]]:
    """Turn a published file's state into layers over the one-hot genes of `space`.

    Returns weight (out, in) and bias (out,) of each layer; the first has an input column per
    choice of each gene.

    Raises:
        UserError: `content` is no such state, damaged, or of another space.
    """
    keys = set(content) if isinstance(content, dict) else set()
    if {f"{index}.{kind}" for index in (0, 2, 4, 6) for kind in ("weight", "bias")} == keys:
        _check(space, "ofa_mobilenetv3", 1.2, path)
        layers = [(content[f"{index}.weight"], content[f"{index}.bias"]) for index in (0, 2, 4, 6)]
        columns = _columns(space, MOBILENETV3, path)
    elif RESNET_KEYS <= keys:
        _check(space, "ofa_resnet50d", 1.0, path)
        layers = [
            (content[f"layers.{index}.0.weight"], content[f"layers.{index}.0.bias"])
            for index in range(3)
        ]
        layers.append((content["layers.3.weight"], content["base_acc"]))
        columns = _columns(space, RESNET50D, path)
    else:
        raise UserError(
            f"{path} holds no accuracy predictor; it must be one that nasray or OFA wrote"
        )
    first, bias = layers[0]
    most = max(column for column in columns if column is not None)
    if not isinstance(first, Tensor) or first.ndim != 2 or first.shape[1] <= most:
        raise UserError(f"{path} is a damaged predictor; fit or fetch it again")
    moved = torch.zeros(len(first), len(columns))
    for place, column in enumerate(columns):
        if column is not None:
            moved[:, place] = first[:, column]
    return [(moved, bias), *layers[1:]]


def _columns(space: Space, layout: Layout, path: str) -> list[int | None]:
    """The column of each choice of each gene in a published input; None where it has none."""
    nexts = dict(layout.starts)
    columns: list[int | None] = []
    for gene in space.genes:
        key = gene.name if gene.name in nexts else gene.kind
        if key == "resolution":
            columns += [
                nexts[key] + place for place in _places(gene.choices, layout.resolutions, path)
            ]
        elif key in nexts:
            columns += range(nexts[key], nexts[key] + len(gene.choices))
            nexts[key] += len(gene.choices)
        else:
            columns += [None] * len(gene.choices)
    return columns


def _places(resolutions: Sequence[int], known: tuple[int, ...], path: str) -> list[int]:
    unknown = sorted(set(resolutions) - set(known))
    if unknown:
        raise UserError(
            f"{path} knows no resolutions {unknown}; set space.resolutions to some of {known}"
        )
    return [known.index(resolution) for resolution in resolutions]


def _check(space: Space, name: str, width: float, path: str) -> None:
    """Check that `space` is the one that the predictor at `path` was fitted to."""
    if space.name != name or getattr(space, "width", None) != width:
        raise UserError(
            f"{path} is a predictor of the space {name} of width {width}, not of {space.name} of "
            f"width {getattr(space, 'width', 1.0)}"
        )
