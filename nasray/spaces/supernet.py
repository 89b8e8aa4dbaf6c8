"""A supernet whose subnets are slices: the first channels of its largest blocks.

Every subnet weight is a leading slice of a weight of the largest block, in every dimension,
unless the block has a method transform() (kernels that go through a learned matrix first). So
one plain block class serves the supernet and the extracted subnet alike, and
supernet(images, arch) is extract(arch)(images) by construction. The original multiplies by a
0/1 mask before BN instead, which BN's shift undoes (docs/spec.md, OneShot 1.7).
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from nasray.spaces.space import Architecture, Block, Space

T = TypeVar("T")
Places = dict[str, tuple[dict[str, Tensor | None], str]]


class SlicedSpace(Space, Protocol):
    """A space in which every block is a slice of one of its position's largest blocks."""

    def max_blocks(self) -> tuple[tuple[Block, ...], ...]:
        """Return, for each position of decode(), the largest blocks that the supernet stores.

        A decoded block may have a method transform(stored), from the stored tensors by name to
        those of which leading slices are taken, and transform_names, the parameters it uses.
        """

    def block_index(self, arch: Architecture) -> tuple[int, ...]:
        """Return, for each position, which of its max_blocks() that of `arch` is a slice of."""


class Supernet(nn.Module):
    """All blocks of a space at full width; runs one subnet at a time, at its true width.

    The architecture is an argument, never state. Only the chosen blocks take part in a
    step, so the others' gradients stay None and the optimiser leaves them alone.
    """

    def __init__(self, space: SlicedSpace) -> None:
        super().__init__()
        self.space = space
        self.positions = nn.ModuleList(
            nn.ModuleList(block.build() for block in blocks) for blocks in space.max_blocks()
        )
        # Looked up once: walking over the modules at every step takes longer than slicing.
        self.places = [[_places(block) for block in blocks] for blocks in self.positions]

    def forward(self, images: Tensor, arch: Architecture) -> Tensor:
        """Map images (n, 3, height, width) to logits (n, num_classes) by the subnet `arch`."""
        features = images
        for block, whole in self._blocks_of(arch, self.places):
            shell = _shell(block, self.training)
            features = shell.call(_sliced(block, whole, shell.shapes), features)
        return features

    def extract(self, arch: Architecture) -> nn.Sequential:
        """Cut out the subnet `arch`: a plain module of standard layers with its own weights."""
        blocks = OrderedDict()
        for block, whole in self._blocks_of(arch, self.places):
            shell = _shell(block, self.training)
            blocks[block.name] = _copied(shell.module, _sliced(block, whole, shell.shapes))
        return nn.Sequential(blocks).train(self.training)

    def slices_of(self, arch: Architecture) -> list[tuple[nn.Parameter, torch.Size]]:
        """The parameters that a step on `arch` touches, and of each the leading slice's shape.

        In the order of the forward pass. Where more than a leading slice of a stored tensor
        gets a gradient, more: whole kernels that go through a matrix, and the matrices.
        """
        found = []
        for block, whole in self.whole_blocks(arch):
            shapes = _shell(block, self.training).shapes
            transforms = getattr(block, "transform_names", ())
            for name, param in whole.named_parameters():
                if name in transforms:
                    found.append((param, param.shape))
                elif name in shapes:
                    kernel = param.shape[2:] if transforms else shapes[name][2:]
                    found.append((param, shapes[name][:2] + kernel))
        return found

    def weights(self, arch: Architecture) -> dict[str, dict[str, Tensor]]:
        """Return the weights of the subnet `arch` by block and name, as views where possible."""
        return {
            block.name: _sliced(block, whole, _shell(block, self.training).shapes)
            for block, whole in self._blocks_of(arch, self.places)
        }

    def whole_blocks(self, arch: Architecture) -> list[tuple[Block, nn.Module]]:
        """Return each block of `arch` with the stored module that it is a slice of."""
        return self._blocks_of(arch, self.positions)

    def _blocks_of(
        self, arch: Architecture, positions: Sequence[Sequence[T]]
    ) -> list[tuple[Block, T]]:
        return [
            (block, wholes[index])
            for block, wholes, index in zip(
                self.space.decode(arch), positions, self.space.block_index(arch), strict=True
            )
            if block is not None
        ]


def embed(target: Tensor, source: Tensor) -> None:
    """Copy `source` into `target`, a smaller kernel into the centre of a larger one of zeros."""
    margin = (target.shape[-1] - source.shape[-1]) // 2 if target.dim() == 4 else 0
    target.zero_()
    (target[..., margin:-margin, margin:-margin] if margin else target).copy_(source)


def build_subnet(blocks: Sequence[Block | None]) -> nn.Sequential:
    """Build the stand-alone network of decoded `blocks`, its weights not yet drawn."""
    return nn.Sequential(
        OrderedDict((block.name, block.build()) for block in blocks if block is not None)
    )


class _Shell:
    """A block's module without storage, to be called with slices as its weights.

    torch.func.functional_call does the same, with checks that took 5 % of a small step.
    Not for two threads at once.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
        self.places = _places(module)
        self.empty = [(tensors, key, tensors[key]) for tensors, key in self.places.values()]

    def call(self, weights: dict[str, Tensor], features: Tensor) -> Tensor:
        """Return the block's output on `features`, computed with `weights`."""
        try:
            for name, (tensors, key) in self.places.items():
                tensors[key] = weights[name]
            return self.module(features)
        finally:
            for tensors, key, tensor in self.empty:
                tensors[key] = tensor


@lru_cache(maxsize=8192)
def _shell(block: Block, training: bool) -> _Shell:
    with torch.device("meta"):
        return _Shell(block.build().train(training))


def _places(module: nn.Module) -> Places:
    """Where `module` keeps each of its parameters and buffers, by full name."""
    return {
        f"{path}.{key}".lstrip("."): (tensors, key)
        for path, part in module.named_modules()
        for tensors in (part._parameters, part._buffers)
        for key in tensors
        if tensors[key] is not None
    }


def _copied(module: nn.Module, weights: dict[str, Tensor], path: str = "") -> nn.Module:
    """`module` with copies of `weights` as its own, and with children and hooks of its own.

    copy.deepcopy and load_state_dict, which copy all that a module consists of, took as long as
    evaluating thirty small images.
    """
    copied = module.__new__(type(module))
    copied.__dict__ = {
        name: value.copy() if isinstance(value, dict | set) else value
        for name, value in module.__dict__.items()
    }
    for tensors in (copied._parameters, copied._buffers):
        for key, empty in tensors.items():
            if empty is not None:
                own = weights[path + key].detach().clone(memory_format=torch.contiguous_format)
                tensors[key] = nn.Parameter(own) if isinstance(empty, nn.Parameter) else own
    for key, child in copied._modules.items():
        copied._modules[key] = _copied(child, weights, f"{path}{key}.")
    return copied


def _sliced(block: Block, whole: Places, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """The weights of `block`, by name: leading slices of the stored tensors."""
    if not hasattr(block, "transform"):
        return {
            name: leading_slice(tensors[key], shapes[name])
            for name, (tensors, key) in whole.items()
        }
    stored = {name: tensors[key] for name, (tensors, key) in whole.items()}
    return {
        name: leading_slice(tensor, shapes[name])
        for name, tensor in block.transform(stored).items()
    }


def leading_slice(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The first entries of `tensor` in every dimension, as a view of `shape`."""
    if tensor.shape == shape:
        return tensor
    for dim, length in enumerate(shape):
        if tensor.shape[dim] != length:  # each slice is a node of the graph
            tensor = tensor.narrow(dim, 0, length)
    return tensor
