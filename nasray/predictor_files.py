"""The accuracy predictors that Once-for-All published, in the order of our genes (spec 3).

Their layers take one-hot inputs in an order of their own and leave out genes that only
switch others off; here each input column moves to its gene, and those genes get zeros.
"""

from typing import Any

import torch
from torch import Tensor

from nasray.errors import UserError
from nasray.spaces.space import Gene, Space

# The tutorial's MobileNetV3 predictor: kernels, expand ratios, then eight input sides.
MOBILENETV3_KERNELS, MOBILENETV3_EXPANDS, MOBILENETV3_SIDES = 0, 60, 120
MOBILENETV3_SIZES = tuple(range(112, 225, 16))
# The library's ResNet50D predictor: eight input sides, stem, widths, expand ratios.
RESNET_SIDES, RESNET_STEM, RESNET_WIDTHS, RESNET_EXPANDS = 0, 8, 10, 28
RESNET_KEYS = {"base_acc", "layers.3.weight"} | {
    f"layers.{index}.0.{kind}" for index in range(3) for kind in ("weight", "bias")
}
RESNET_SIZES = (128, 144, 160, 176, 192, 224, 240, 256)


def published_layers(content: Any, space: Space, path: str) -> list[tuple[Tensor, Tensor]]:
    """Turn a published file's state into layers over the one-hot genes of `space`."""
    keys = set(content) if isinstance(content, dict) else set()
    if {f"{index}.{kind}" for index in (0, 2, 4, 6) for kind in ("weight", "bias")} == keys:
        _check(space, "ofa_mobilenetv3", 1.2, path)
        layers = [(content[f"{index}.weight"], content[f"{index}.bias"]) for index in (0, 2, 4, 6)]
        columns = _mobilenetv3_columns(space, path)
    elif RESNET_KEYS <= keys:
        _check(space, "ofa_resnet50d", 1.0, path)
        layers = [
            (content[f"layers.{index}.0.weight"], content[f"layers.{index}.0.bias"])
            for index in range(3)
        ]
        layers.append((content["layers.3.weight"], content["base_acc"]))
        columns = _resnet_columns(space, path)
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


def _mobilenetv3_columns(space: Space, path: str) -> list[int | None]:
    """Where each choice of each gene is in the published input; None: nowhere."""
    starts = {"kernel": MOBILENETV3_KERNELS, "expand": MOBILENETV3_EXPANDS}
    columns: list[int | None] = []
    for gene in space.genes:
        if gene.kind == "resolution":
            columns += _sides(gene, MOBILENETV3_SIZES, MOBILENETV3_SIDES, path)
        elif gene.kind in starts:
            columns += range(starts[gene.kind], starts[gene.kind] + len(gene.choices))
            starts[gene.kind] += len(gene.choices)
        else:
            columns += [None] * len(gene.choices)
    return columns


def _resnet_columns(space: Space, path: str) -> list[int | None]:
    starts = {"width": RESNET_WIDTHS, "expand": RESNET_EXPANDS}
    depths = [gene for gene in space.genes if gene.kind == "depth"]
    columns: list[int | None] = []
    for gene in space.genes:
        if gene.kind == "resolution":
            columns += _sides(gene, RESNET_SIZES, RESNET_SIDES, path)
        elif gene.kind in starts:
            columns += range(starts[gene.kind], starts[gene.kind] + len(gene.choices))
            starts[gene.kind] += len(gene.choices)
        elif gene is depths[0]:  # the stem's
            columns += [RESNET_STEM, RESNET_STEM + 1]
        else:
            columns += [None] * len(gene.choices)
    return columns


def _sides(gene: Gene, known: tuple[int, ...], start: int, path: str) -> list[int]:
    unknown = sorted(set(gene.choices) - set(known))
    if unknown:
        raise UserError(
            f"{path} knows no resolutions {unknown}; set space.resolutions to some of {known}"
        )
    return [start + known.index(side) for side in gene.choices]


def _check(space: Space, name: str, width: float, path: str) -> None:
    if space.name != name or getattr(space, "width", None) != width:
        raise UserError(
            f"{path} is a predictor of the space {name} of width {width}, not of {space.name} of "
            f"width {getattr(space, 'width', 1.0)}"
        )
