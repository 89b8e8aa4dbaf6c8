"""Start a supernet from weights in a file, nasray's own or published ones.

This is the one place that tells what a file is. Training continues from the supernet that
start_from() returns, as it is.
"""

import dataclasses
import logging
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasray import checkpoint
from nasray.errors import UserError
from nasray.pretrained import files
from nasray.spaces import describe
from nasray.spaces.space import Architecture, Space
from nasray.spaces.supernet import Supernet, build_subnet

Build = Callable[[Space], nn.Module]

# By space: what gives published tensors our supernet's names, called with the space and the
# tensors of the file by name. Its UserErrors go on after the name of the file. Imported when
# asked for.
PUBLISHED = {
    "mbconv": "nasray.pretrained.plain:plain_tensors",
    "ofa_mobilenetv3": "nasray.pretrained.ofa:ofa_tensors",
    "ofa_proxyless": "nasray.pretrained.ofa:ofa_tensors",
    "ofa_resnet50d": "nasray.pretrained.ofa:ofa_tensors",
}
# Options of a space that change no stored weight but the classifier's.
FREE_OPTIONS = ("num_classes", "resolution", "resolutions", "expand_shares")
# Looked at when shapes differ; published ones first.
WIDTHS = (1.0, 1.2, 1.3, 0.25, 0.35, 0.5, 0.75, 0.8, 1.4, 1.5, 2.0)

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Started:
    """A supernet with weights from a file."""

    supernet: Supernet  # in eval mode, on the CPU
    new_head: bool  # its classifier is not the file's, but drawn: without training, it guesses
    digest: str  # the file's SHA-256, in hexadecimal
    trained: dict[str, Any] | None  # the name and options of the file's space; None if published


def start_from(
    space: Space, path: str, *, sha256: str = "", seed: int | None, classes: Sequence[str] = ()
) -> Started:
    """Build the supernet of `space` with the weights in `path`.

    A file of another number of classes than `space`, or of other `classes`, gives all weights but
    the classifier's, which are drawn from `seed` as those of a supernet that is trained from the
    beginning; so does a file without a classifier.

    Args:
        space: its supernet is built.
        path: supernet.pt of nasray, or a published file; files.read_state() says from where.
        sha256: the digest that the file must have, in hexadecimal, if given.
        seed: of the classifier, if it is new; None refuses another number of classes.
        classes: the names wanted, in the order of the logits; a file may know others, or none.

    Raises:
        UserError: the file cannot be read, is of another space, has another digest, or holds
            weights that do not fit or are not finite.
    """
    content, digest = files.read_content(path, sha256)
    tensors, names, known = _tensors_of(space, content, path)
    supernet = space.supernet()
    head = _classifier(space)
    number = _num_classes(tensors, head, space)
    trained = describe(checkpoint.space_of(content, path)) if _is_ours(content) else None
    same_classes = not (known and classes) or list(known) == list(classes)
    if number == space.num_classes and same_classes:
        _load(supernet, tensors, path, names)
        return Started(supernet.eval(), new_head=False, digest=digest, trained=trained)
    if seed is None:
        raise UserError(
            f"{path} is of {number} classes, not {space.num_classes}; set num_classes = {number}"
            if number
            else f"{path} holds no classifier, {head[0]} of the supernet; give a file that does"
        )
    space.initialize(supernet, torch.Generator().manual_seed(seed))
    others = {name: tensor for name, tensor in tensors.items() if name not in head}
    _load(supernet, others, path, names, missing=head)
    wanted = f"not {space.num_classes}" if number != space.num_classes else "but other ones"
    held = f"is of {number} classes, {wanted}" if number else "holds no classifier"
    log.info("%s %s: the classifier starts anew", path, held)
    return Started(supernet.eval(), new_head=True, digest=digest, trained=trained)


def with_new_classifier(
    space: Space, arch: Architecture, subnet: nn.Module, num_classes: int, *, seed: int
) -> nn.Sequential:
    """Build the network of `arch` for `num_classes` classes, in eval mode.

    It has copies of all weights of `subnet`, the network of `arch` in `space`, but the
    classifier's, which are drawn from `seed` as those of a network that is trained from the
    beginning.
    """

    def build(changed: Space) -> nn.Sequential:
        return build_subnet(changed.decode(arch))

    changed = _changed(space, num_classes=num_classes)
    network = build(changed)
    changed.initialize(network, torch.Generator().manual_seed(seed))
    head = _classifier(space, build)
    kept = {name: value for name, value in subnet.state_dict().items() if name not in head}
    network.load_state_dict(network.state_dict() | kept)
    return network.eval()


def _tensors_of(
    space: Space, content: Any, path: str
) -> tuple[dict[str, Tensor], dict[int, str], Sequence[str]]:
    """The tensors in the content of `path` under our names, their own by ids, and its classes."""
    known: Sequence[str] = ()
    if _is_ours(content):
        _check_same(space, content, path)
        tensors = state = files.state_of(content["state"], path)
        _check_finite(state, path)
        known = content.get("classes", ())
    elif space.name in PUBLISHED:
        state = files.state_of(content, path)
        _check_finite(state, path)
        try:
            tensors = pkgutil.resolve_name(PUBLISHED[space.name])(space, state)
        except UserError as error:
            raise UserError(f"{path} {error}") from None
    else:
        raise UserError(
            f"{path} is no supernet.pt of nasray, and of {space.name} no published weights are "
            "known; give a supernet.pt"
        )
    return tensors, {id(tensor): name for name, tensor in state.items()}, known


def _is_ours(content: Any) -> bool:
    return isinstance(content, dict) and {"space", "state"} <= content.keys()


def _check_finite(state: Mapping[str, Tensor], path: str) -> None:
    for name, value in state.items():
        if not value.float().isfinite().all():
            raise UserError(f"{path}: {name} has values that are not finite; give another file")


def _check_same(space: Space, content: dict[str, Any], path: str) -> None:
    """Check that a checkpoint of nasray is a supernet with weights like those of `space`."""
    if "arch" in content:
        raise UserError(f"{path} holds one subnet; give the supernet.pt of a run directory")
    found, wanted = describe(checkpoint.space_of(content, path)), describe(space)
    if found["name"] != wanted["name"]:
        raise UserError(
            f"{path} is a supernet of {found['name']}, not of {wanted['name']}; set "
            f"space.name = {found['name']!r}, or give another file"
        )
    for key, value in found.items():
        if key not in FREE_OPTIONS and value != wanted[key]:
            raise UserError(
                f"{path} is a supernet with space.{key} = {value!r}, not {wanted[key]!r}; set "
                f"space.{key} to that, or give another file"
            )


def _changed(space: Any, **options: Any) -> Any:
    return dataclasses.replace(space, **options)


def _supernet(space: Space) -> nn.Module:
    return space.supernet()


def _shapes(space: Space, build: Build = _supernet) -> dict[str, torch.Size]:
    """The shapes of all tensors of the network of `space`, which is not allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build(space).state_dict().items()}


def _classifier(space: Space, build: Build = _supernet) -> list[str]:
    """The names of the tensors of which the first dimension is the number of classes."""
    shapes = _shapes(space, build)
    more = _shapes(_changed(space, num_classes=space.num_classes + 1), build)
    return [name for name, shape in shapes.items() if shape != more[name]]


def _num_classes(tensors: Mapping[str, Tensor], head: list[str], space: Space) -> int:
    """The number of classes of the classifier in `tensors`; that of `space` if it is unclear.

    0 if there is no classifier.
    """
    if not any(name in tensors for name in head):
        return 0
    numbers = {
        tensors[name].shape[0] if name in tensors and tensors[name].ndim else 0 for name in head
    }
    return numbers.pop() if len(numbers) == 1 and 0 not in numbers else space.num_classes


def _load(
    supernet: Supernet,
    tensors: Mapping[str, Tensor],
    path: str,
    names: Mapping[int, str],
    missing: Sequence[str] = (),
) -> None:
    """Copy `tensors` into `supernet`; it keeps its own where they are in `missing`.

    Counts of batches, which no computation uses, may be absent.
    """
    own = supernet.state_dict()
    for name, tensor in tensors.items():
        called = names.get(id(tensor), name)
        if name not in own:
            raise UserError(f"{path} holds {called}, which {supernet.space.name} does not have")
        if tensor.shape != own[name].shape:
            raise UserError(
                f"{path}: {called} is {tuple(tensor.shape)}, where {supernet.space.name} has "
                f"{tuple(own[name].shape)}; {_cause(supernet.space, tensors)}"
            )
        if own[name].is_floating_point() and not tensor.is_floating_point():
            raise UserError(
                f"{path}: {called} is of {tensor.dtype}; give weights in floating point"
            )
    for name in own:
        if name not in tensors and name not in missing and not name.endswith("num_batches_tracked"):
            raise UserError(f"{path} lacks {name}; a whole supernet of the space is needed")
    supernet.load_state_dict(own | dict(tensors))


def _cause(space: Any, tensors: Mapping[str, Tensor]) -> str:
    """Say how to mend a space of which the shapes are not those of `tensors`."""
    found = {name: tensor.shape for name, tensor in tensors.items()}
    for width in WIDTHS if hasattr(space, "width") else ():
        shapes = _shapes(_changed(space, width=width))
        if all(shapes.get(name) == shape for name, shape in found.items()):
            return f"the file has another width: set space.width = {width}"
    return "the file is of another space, or of other options of it"
