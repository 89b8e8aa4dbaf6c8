"""Names of the tensors of published Once-for-All supernets.

The same tensor is spelled in several ways: elastic layers have one more wrapper than plain ones
(`.conv.conv.weight`, `.bn.bn.weight`, `.linear.linear.weight`), blocks one of two wrappers
(`blocks.1.conv.`, once `blocks.1.mobile_inverted_conv.`), and files mix them. All are brought to
the shortest spelling, without wrappers. Tensors are neither reordered nor transposed.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nasray.errors import UserError
from nasray.spaces.ofa import OfaSpace

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Names:
    """The shortest published spelling of a space's tensors."""

    places: Mapping[str, str]  # of the blocks at both ends, by our block's name
    layers: Mapping[str, str]  # within a block
    first_block: int  # the number of our block0


MBCONV_LAYERS = {
    "transform_5to3": "depth_conv.conv.5to3_matrix",
    "transform_7to5": "depth_conv.conv.7to5_matrix",
    "expand": "inverted_bottleneck",
    "depthwise": "depth_conv",
    "se.reduce": "depth_conv.se.fc.reduce",
    "se.restore": "depth_conv.se.fc.expand",
    "project": "point_linear",
    "output": "classifier.linear",
}
MBCONV_PLACES = {"stem": "first_conv", "fixed": "blocks.0", "head": ""}
NAMES = {
    "ofa_mobilenetv3": Names(
        places=MBCONV_PLACES,
        layers=MBCONV_LAYERS | {"mix": "final_expand_layer", "features": "feature_mix_layer.conv"},
        first_block=1,
    ),
    "ofa_proxyless": Names(
        places=MBCONV_PLACES,
        layers=MBCONV_LAYERS | {"mix": "feature_mix_layer"},
        first_block=1,
    ),
    "ofa_resnet50d": Names(
        places={
            "stem": "input_stem.0",
            "stem_residual": "input_stem.1",
            "stem_end": "input_stem.2",
            "head": "",
        },
        layers={
            "inner": "conv1",
            "middle": "conv2",
            "outer": "conv3",
            "shortcut": "downsample",
            "main": "",
            "output": "classifier.linear",
        },
        first_block=0,
    ),
}
# The beginning of a name that only one of the networks has; the first that is found decides.
MARKS = {
    "input_stem.": "ofa_resnet50d",
    "final_expand_layer.": "ofa_mobilenetv3",
    "feature_mix_layer.bn.": "ofa_proxyless",
}


def ofa_tensors(space: OfaSpace, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a published file under their names in the supernet of `space`.

    A static network of the largest size has no kernel matrices; they are identities then. Shapes
    are left to the caller.

    Raises:
        UserError: the file is of another space, or lacks tensors or has others; the message says
            nothing of the file, which the caller knows.
    """
    with torch.device("meta"):
        own = space.supernet().state_dict()
    blocks = [position[0].name for position in space.max_blocks()]
    names = {_published(space.name, blocks, name): name for name in own}
    found: dict[str, Tensor] = {}
    given: dict[str, str] = {}
    for name, tensor in state.items():
        short = shortest(name)
        if short in given:
            raise UserError(f"holds {name} and {given[short]}, which are one tensor; drop one")
        given[short] = name
        found[short] = tensor
    _check_space(space, found)
    for short, name in given.items():
        if short not in names:
            raise UserError(f"holds {name}, which no tensor of {space.name} corresponds to")
    if not any(short.endswith("_matrix") for short in found):
        log.info("the weights are those of a static network: kernel matrices are identities")
        for short, name in names.items():
            if short.endswith("_matrix"):
                found[short] = torch.eye(len(own[name]))
    for short in names:
        if short not in found and not short.endswith("num_batches_tracked"):
            raise UserError(
                f"lacks {short}; a whole supernet is needed, one subnet of it does not do"
            )
    return {names[short]: tensor for short, tensor in found.items()}


def shortest(name: str) -> str:
    """Return the shortest spelling of a published name."""
    name = name.removeprefix("module.")
    name = re.sub(r"(?<=\.)(conv|bn|linear)(\.\1)+(?=\.)", r"\1", name)
    name = re.sub(r"^(blocks\.\d+)\.(mobile_inverted_conv|conv)\.", r"\1.", name)
    return re.sub(r"^(input_stem\.\d+)\.conv\.bn\.", r"\1.bn.", name)


def _published(space_name: str, blocks: list[str], own: str) -> str:
    """The published name of our supernet's tensor positions.<position>.0.<layer>...."""
    names = NAMES[space_name]
    _, position, _, rest = own.split(".", 3)
    block = blocks[int(position)]
    if block in names.places:
        place = names.places[block]
    else:
        place = f"blocks.{int(block.removeprefix('block')) + names.first_block}"
    for layer, published in names.layers.items():
        if rest == layer or rest.startswith(f"{layer}."):
            rest = f"{published}{rest.removeprefix(layer)}".lstrip(".")
            break
    return f"{place}.{rest}".lstrip(".")


def _check_space(space: OfaSpace, found: Mapping[str, Tensor]) -> None:
    for mark, name in MARKS.items():
        if any(short.startswith(mark) for short in found):
            if name != space.name:
                raise UserError(f"is of {name}, not of {space.name}; set space.name = {name!r}")
            return
    first = next(iter(found), "nothing")
    raise UserError(f"is no supernet that Once-for-All published: it holds {first}")
