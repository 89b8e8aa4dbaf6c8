"""Count the operations of a network by one walk over it, leaf module by leaf module.

The rules are those of the published profile (docs/spec.md, OneShot 4.1). Knows no space.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# Names that group modules and are no part of a published operation's name.
_CONTAINERS = {"stem", "head", "main", "projection"}

# Not run while counting: without storage they take three quarters of the time.
_SHAPE_KEEPING = (
    nn.BatchNorm2d,
    nn.ReLU,
    nn.ReLU6,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.SiLU,
    nn.Sigmoid,
)


@dataclass(frozen=True, kw_only=True)
class OpCount:
    """One row of the profile. Sides in pixels; kernel_size -1 where there is none.

    `kind` is the class of torch.nn, e.g. "Conv2d", or "add" and "mul" between layers.
    """

    op_name: str
    kind: str
    block: str = ""  # of the network, e.g. "SNB10": the first part of the module's path
    inp_size: int
    kernel_size: int = -1
    cin: int
    cout: int  # 1 for depthwise convolutions and pooling, as published
    params: int = 0
    macs: int = 0
    micronet_params: float = 0.0
    mults: int = 0
    adds: int = 0
    listed: bool = True  # BN, sums and products have no row in the published table


def build_on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    """Build without storage: shapes are all that counting needs."""
    with torch.device("meta"):
        return build().eval()


def count_ops(
    network: nn.Module, shape: tuple[int, ...], *, between_layers: bool = False
) -> list[OpCount]:
    """Run `network` once on a storage-less input and count every leaf module it calls.

    With `between_layers` sums and products of their outputs have a row, too, which slows the walk
    down. It counts nothing, as the published table forgets them; micronet.strict() counts them.
    """
    ops: list[OpCount] = []

    def counted(path: str, count: Callable[..., list[OpCount]]) -> Callable[..., None]:
        block, *_ = parts = path.split(".")
        name = "_".join(part for part in parts if part not in _CONTAINERS)

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            counts = count(name, module, inputs[0], output)
            ops.extend(replace(op, block=block) for op in counts)

        return hook

    handles = []
    for path, module in network.named_modules():
        if not list(module.children()):
            if type(module) not in COUNTERS:
                raise TypeError(
                    f"{path}: no rule to count a {type(module).__name__}; see costs/operations.py"
                )
            handles.append(module.register_forward_hook(counted(path, COUNTERS[type(module)])))
            if type(module) in _SHAPE_KEEPING:
                module.forward = _unchanged
    try:
        with _BetweenLayers(ops) if between_layers else nullcontext():
            network(torch.empty(shape, device="meta"))
    finally:
        for handle in handles:
            handle.remove()
        for module in network.modules():
            vars(module).pop("forward", None)
    return ops


def _unchanged(features: Tensor) -> Tensor:
    return features


class _BetweenLayers(TorchFunctionMode):
    """Appends a row to `ops` for every sum and product that a module writes as an expression."""

    def __init__(self, ops: list[OpCount]) -> None:
        super().__init__()
        self.ops = ops

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        kind = func.__name__
        if kind in ("add", "mul"):
            channels, side = output.shape[1], output.shape[-1]
            self.ops.append(
                OpCount(
                    op_name=kind,
                    kind=kind,
                    inp_size=side,
                    cin=channels,
                    cout=channels,
                    listed=False,
                )
            )
        return output


def _count_conv(name: str, conv: nn.Conv2d, inputs: Tensor, output: Tensor) -> list[OpCount]:
    taps = conv.weight[0].numel()  # k * k * Cin / groups
    outputs = output[0].numel()
    biases = 0 if conv.bias is None else output.shape[1]
    params = conv.weight.numel() + biases
    return [
        OpCount(
            op_name=name if name.endswith("output") else f"{name}_fwd",
            kind=type(conv).__name__,
            inp_size=inputs.shape[-1],
            kernel_size=conv.kernel_size[0],
            cin=inputs.shape[1],
            cout=1 if conv.groups > 1 else output.shape[1],
            params=params,
            macs=taps * outputs + (outputs if biases else 0),
            micronet_params=params,
            mults=taps * outputs,
            adds=(taps - 1) * outputs + (outputs if biases else 0),
        )
    ]


def _count_linear(name: str, linear: nn.Linear, inputs: Tensor, output: Tensor) -> list[OpCount]:
    taps, outputs = linear.in_features, output[0].numel()
    biases = 0 if linear.bias is None else outputs
    params = linear.weight.numel() + biases
    return [
        OpCount(
            op_name=name,
            kind=type(linear).__name__,
            inp_size=1,
            kernel_size=1,
            cin=taps,
            cout=outputs,
            params=params,
            macs=taps * outputs + biases,
            micronet_params=params,
            mults=taps * outputs,
            adds=(taps - 1) * outputs + biases,
        )
    ]


def _count_bn(name: str, norm: nn.BatchNorm2d, inputs: Tensor, output: Tensor) -> list[OpCount]:
    # Folded into the convolution before it. The published table forgets the biases that
    # folding leaves behind; so does this, to reproduce it. micronet.strict() counts them.
    channels = inputs.shape[1]
    return [
        OpCount(
            op_name=name,
            kind=type(norm).__name__,
            inp_size=inputs.shape[-1],
            cin=channels,
            cout=channels,
            params=2 * channels,
            listed=False,
        )
    ]


def _count_pool(
    name: str, pool: nn.AdaptiveAvgPool2d, inputs: Tensor, output: Tensor
) -> list[OpCount]:
    channels, pixels = inputs.shape[1], inputs.shape[-1] * inputs.shape[-2]
    return [
        OpCount(
            op_name=f"{name}_fwd",
            kind=type(pool).__name__,
            inp_size=inputs.shape[-1],
            cin=channels,
            cout=1,
            macs=channels * pixels,
            mults=channels,
            adds=(pixels - 1) * channels,
        )
    ]


def _count_local_pool(
    name: str, pool: nn.AvgPool2d | nn.MaxPool2d, inputs: Tensor, output: Tensor
) -> list[OpCount]:
    # Papers leave it out. A maximum of two counts as an addition; windows of an average
    # do not overlap.
    outputs, kernel = output[0].numel(), pool.kernel_size
    assert isinstance(kernel, int), name
    average = isinstance(pool, nn.AvgPool2d)
    return [
        OpCount(
            op_name=f"{name}_fwd",
            kind=type(pool).__name__,
            inp_size=inputs.shape[-1],
            kernel_size=kernel,
            cin=inputs.shape[1],
            cout=1,
            mults=outputs if average else 0,
            adds=inputs[0].numel() - outputs if average else (kernel**2 - 1) * outputs,
        )
    ]


def _count_shuffle(
    name: str, shuffle: nn.ChannelShuffle, inputs: Tensor, output: Tensor
) -> list[OpCount]:
    # A C x C permutation matrix: C 16-bit values and a C * C bit mask, in 16-bit words.
    channels, pixels = inputs.shape[1], inputs.shape[-1] * inputs.shape[-2]
    return [
        OpCount(
            op_name=name,
            kind=type(shuffle).__name__,
            inp_size=inputs.shape[-1],
            kernel_size=1,
            cin=channels,
            cout=channels,
            micronet_params=(16 * channels + channels**2) / 16,
            mults=pixels * channels,
        )
    ]


def _elementwise(suffixes: tuple[tuple[str, int, int], ...]) -> Callable[..., list[OpCount]]:
    """Count an activation as rows of (suffix, mults per element, adds per element)."""

    def count(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> list[OpCount]:
        channels, elements = inputs.shape[1], inputs[0].numel()
        side = inputs.shape[-1] if inputs.dim() == 4 else 1
        return [
            OpCount(
                op_name=f"{name}{suffix}",
                kind=type(module).__name__,
                inp_size=side,
                cin=channels,
                cout=channels,
                mults=mults * elements,
                adds=adds * elements,
            )
            for suffix, mults, adds in suffixes
        ]

    return count


def _count_nothing(name: str, module: nn.Module, inputs: Tensor, output: Tensor) -> list[OpCount]:
    return []


# Leaf module -> how to count it. A module that is not here is an error, never zero.
COUNTERS: dict[type[nn.Module], Callable[..., list[OpCount]]] = {
    nn.Conv2d: _count_conv,
    nn.Linear: _count_linear,
    nn.BatchNorm2d: _count_bn,
    nn.AdaptiveAvgPool2d: _count_pool,
    nn.AvgPool2d: _count_local_pool,
    nn.MaxPool2d: _count_local_pool,
    nn.ChannelShuffle: _count_shuffle,
    nn.ReLU: _elementwise((("_fwd", 1, 0),)),
    nn.ReLU6: _elementwise((("_fwd", 1, 0),)),
    nn.Hardswish: _elementwise(
        (("__plusscalar0", 0, 1), ("__clip", 1, 0), ("__divscalar0", 1, 0), ("__mul0", 1, 0))
    ),
    nn.Hardsigmoid: _elementwise(
        (("__plusscalar0", 0, 1), ("__clip", 1, 0), ("__divscalar0", 1, 0))
    ),
    # Mobile papers leave exponentials out; a swish is counted as its hard form is, in one row.
    nn.SiLU: _elementwise((("__sigmoid", 2, 1), ("__mul0", 1, 0))),
    nn.Sigmoid: _elementwise((("__sigmoid", 2, 1),)),
    nn.Dropout: _count_nothing,
    nn.ZeroPad2d: _count_nothing,
    nn.Flatten: _count_nothing,
    nn.Identity: _count_nothing,
}
