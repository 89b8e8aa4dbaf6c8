"""Published supernets for tests: their names and shapes, with weights that a formula makes.

The data set beside the repository has, for each network, its tensors' names and shapes, ten
architectures, and the logits that the original code computes with these weights in float64.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nasray.spaces import space_by_name

FOLDER = Path(__file__).parents[3] / "shared/data/ofa/supernets"
SPACES = {
    "mbv3_w1.0": ("ofa_mobilenetv3", 1.0),
    "mbv3_w1.2": ("ofa_mobilenetv3", 1.2),
    "proxyless_w1.3": ("ofa_proxyless", 1.3),
    "resnet50d": ("ofa_resnet50d", 1.0),
}


def space_of(net: str, **options: Any) -> Any:
    """The space that a published network is the supernet of."""
    name, width = SPACES[net]
    return space_by_name(name, **{"width": width} | options)


def published(net: str) -> dict[str, Any]:
    """The facts on a published network; the test is skipped where they are absent."""
    path = FOLDER / f"{net}.json"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return json.loads(path.read_text())


def expected_logits(net: str) -> np.ndarray:
    """What the original code computes for the ten architectures, float32 (10, 1000)."""
    return np.load(FOLDER / f"{net}_logits.npy")


def formula_state(net: str) -> dict[str, torch.Tensor]:
    """The state of a published network, its weights made by a formula; not to be changed."""
    return dict(_formula_state(net))


def respelled(state: dict[str, torch.Tensor], *, plain: bool, older: bool) -> Any:
    """The state with the names of static networks, or of the first versions, or both."""
    found = {}
    for name, tensor in state.items():
        if plain:
            name = re.sub(r"\b(bn|linear)\.\1\.", r"\1.", name)
            name = name.replace(".conv.conv.weight", ".conv.weight")
        if older:
            name = re.sub(r"^(blocks\.\d+)\.conv\.", r"\1.mobile_inverted_conv.", name)
        found[name] = tensor
    return found


def static_state(net: str) -> dict[str, torch.Tensor]:
    """The state of the largest network as a static one, which has no kernel matrices."""
    state = respelled(formula_state(net), plain=True, older=True)
    return {name: tensor for name, tensor in state.items() if not name.endswith("_matrix")}


@cache
def _formula_state(net: str) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(_weights(name, tuple(shape), number))
        for number, (name, shape) in enumerate(published(net)["keys"])
    }


def image_of(side: int) -> torch.Tensor:
    """The image that the logits are of, float32 (1, 3, side, side)."""
    drawn = np.random.RandomState(side).standard_normal((1, 3, side, side))
    return torch.from_numpy(drawn.astype(np.float32))


def _weights(name: str, shape: tuple[int, ...], number: int) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.array(7)
    drawn = np.random.RandomState(1000 + number).standard_normal(shape)
    if name.endswith("_matrix"):
        drawn = np.eye(len(drawn)) + 0.1 * drawn
    elif name.endswith("running_var"):
        drawn = np.exp(0.3 * drawn)
    elif name.endswith("running_mean"):
        drawn = 0.2 * drawn
    elif drawn.ndim == 4:
        drawn = drawn * np.sqrt(2 / np.prod(shape[1:]))
    elif drawn.ndim == 2:
        drawn = drawn / np.sqrt(shape[1])
    else:
        drawn = 0.3 * drawn + name.endswith("weight")
    return drawn.astype(np.float32)
