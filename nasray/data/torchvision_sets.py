"""Sources "cifar10" and "fashion_mnist", from the files torchvision downloads."""

import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from nasray.config import DataConfig
from nasray.data.source import SPLITS, Pictures, Record, shuffled
from nasray.errors import UserError


def cifar10(config: DataConfig, seed: int) -> Pictures:
    """Open CIFAR-10 (Krizhevsky, 2009) below `config.path`; a UserError if it is not there."""
    from torchvision.datasets import CIFAR10

    return _open(CIFAR10, config, seed)


def fashion_mnist(config: DataConfig, seed: int) -> Pictures:
    """Open Fashion-MNIST (Xiao et al., 2017) below `config.path`, likewise."""
    from torchvision.datasets import FashionMNIST

    return _open(FashionMNIST, config, seed)


def _open(kind: Callable[..., Any], config: DataConfig, seed: int) -> Pictures:
    name = kind.__name__
    try:
        sets = {
            split: kind(config.path, train=split == "train", download=False) for split in SPLITS
        }
    except RuntimeError:  # absent or damaged
        raise UserError(
            f"data.path = {config.path!r}: {name} is not there, or damaged; download it with: "
            f'python -c "from torchvision.datasets import {name}; '
            f'{name}({config.path!r}, download=True)"'
        ) from None
    labels = {split: np.asarray(found.targets) for split, found in sets.items()}

    def records() -> Iterator[Record]:
        for split in SPLITS:
            for position in shuffled(len(labels[split]), seed, split).tolist():
                load = partial(_encode, sets[split].data[position])
                yield Record(split, int(labels[split][position]), f"{split}/{position:05d}", load)

    return Pictures(tuple(sets["train"].classes), sum(map(len, labels.values())), records())


def _encode(pixels: Any) -> bytes:
    """Encode pixels (height, width[, 3]), array or tensor, without loss."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(buffer, "PNG")
    return buffer.getvalue()
