"""Files of weights: a space, an architecture if it is one subnet, and the state.

They hold tensors and plain values only, so that torch.load(weights_only=True) reads them.
"""

import hashlib
import io
from pickle import UnpicklingError  # the error only: no pickle is ever read
from struct import error as StructError
from typing import Any

import torch
from torch import nn

from nasray.errors import UserError, first_line
from nasray.spaces import describe, space_by_name
from nasray.spaces.space import Architecture, Space
from nasray.spaces.supernet import Supernet, build_subnet
from nasray.storage import files as storage


def save_supernet(path: str, supernet: Supernet, **extra: Any) -> None:
    """Write `supernet` to `path`, with `extra` values under their names."""
    _save(path, {"space": describe(supernet.space), "state": supernet.state_dict(), **extra})


def load_supernet(
    path: str, space: Space | None = None, device: str = "cpu", *, digest: str = ""
) -> Supernet:
    """Load a supernet in eval mode.

    Raises:
        UserError: there is no such file, it is damaged, is of another space than `space` or has
            another digest than `digest` (if given), or holds weights that are not finite.
    """
    return supernet_of(load(path, device, digest=digest), path, space, device)


def supernet_of(
    content: dict[str, Any], path: str, space: Space | None = None, device: str = "cpu"
) -> Supernet:
    """Return the supernet in the content of the file `path`; the rest as in load_supernet()."""
    found = space_of(content, path)
    if space is not None and found != space:
        raise UserError(
            f"{path} is a supernet of {describe(found)}, but the job's [space] is "
            f"{describe(space)}; use the run directory it was trained in, or train again"
        )
    supernet = found.supernet().to(device)
    _load_state(supernet, content, path)
    if not all(value.isfinite().all() for value in supernet.state_dict().values()):
        raise UserError(
            f"{path} holds weights that are not finite numbers; train again, with a lower "
            "supernet.learning_rate"
        )
    return supernet.eval()


def save_subnet(
    path: str, space: Space, arch: Architecture, subnet: nn.Module, **extra: Any
) -> None:
    """Write the stand-alone `subnet` of `arch` to `path`, with `extra` values."""
    state = subnet.state_dict()
    _save(path, {"space": describe(space), "arch": list(arch), "state": state, **extra})


def load_subnet(path: str) -> tuple[Space, Architecture, nn.Sequential, dict[str, Any]]:
    """Load a stand-alone subnet in eval mode: (space, arch, subnet, the extra values).

    Raises:
        UserError: there is no such file, it is damaged, or it holds a supernet.
    """
    return subnet_of(load(path), path)


def subnet_of(
    content: dict[str, Any], path: str
) -> tuple[Space, Architecture, nn.Sequential, dict[str, Any]]:
    """Return the subnet in the content of the file `path`, as load_subnet() does."""
    space = space_of(content, path)
    if "arch" not in content:
        raise UserError(f"{path} holds a supernet, not one subnet")
    arch = tuple(content["arch"])
    subnet = build_subnet(space.decode(arch))
    _load_state(subnet, content, path)
    extra = {key: content[key] for key in content.keys() - {"space", "arch", "state"}}
    return space, arch, subnet.eval(), extra


def digest(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(storage.read(path)).hexdigest()


def load(path: str, device: str = "cpu", *, digest: str = "") -> dict[str, Any]:
    """Read a checkpoint file with tensors on `device`; nothing in it is ever executed.

    Raises:
        UserError: there is no such file, it is damaged, or its digest is not `digest` (if given).
    """
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; train first, or check the run directory")
    content = storage.read(path)
    if digest and hashlib.sha256(content).hexdigest() != digest:
        raise UserError(
            f"{path} is not the file that it was when this began; restore it, or run the same "
            "command again"
        )
    try:
        return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    except (RuntimeError, EOFError, ValueError, KeyError, StructError, UnpicklingError) as error:
        raise UserError(
            f"{path} is not a readable checkpoint ({first_line(error)[:200]})"
        ) from None


def _save(path: str, content: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    storage.write(path, buffer.getvalue())


def space_of(content: dict[str, Any], path: str) -> Space:
    """Return the space that the content of the file `path` is of.

    Raises:
        UserError: it is no checkpoint of nasray.
    """
    if not isinstance(content, dict) or not {"space", "state"} <= content.keys():
        raise UserError(
            f"{path} is not a nasray checkpoint: it names no space; `nasray import-weights` makes "
            "one of published weights"
        )
    try:
        return space_by_name(**content["space"])
    except TypeError:
        raise UserError(f"{path} is not a nasray checkpoint: its space is no table") from None


def _load_state(network: nn.Module, content: dict[str, Any], path: str) -> None:
    try:
        network.load_state_dict(content["state"])
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: weights do not fit the space ({first_line(error)[:200]})"
        ) from None
