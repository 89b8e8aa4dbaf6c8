"""The accuracy of one subnet: exact BN recalibration, then top-1. Plain torch.

Weights shared by many subnets leave BN statistics that fit none of them, so a subnet's
accuracy means nothing before recalibration (Guo et al. 2019, section 3.3).
"""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nasray.data.transforms import normalize, resized
from nasray.devices import amp_dtype
from nasray.search.racing import Race, slice_ends


def evaluate(
    subnet: nn.Module,
    calibration: np.ndarray | Literal["inherited", "batch"],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    side: int | None = None,
    race: Race | None = None,
) -> np.ndarray:
    """Recalibrate `subnet` on `calibration`; return which `images` it has right: bool (n,).

    If it loses the `race`, those of the first slices only, in the race's order. Images are
    uint8 (n, 3, any, any), scaled to `side` if one is given. `subnet` should be an extracted
    one: it is left without its BN layers, folded into the convolutions. Instead of images to
    recalibrate on, "inherited" keeps the statistics of the supernet, and "batch" takes each
    batch's own.
    """
    options = {"batch_size": batch_size, "device": device, "side": side}
    subnet.eval()
    if isinstance(calibration, np.ndarray):
        recalibrate_bn(subnet, calibration, **options)
    if isinstance(calibration, str) and calibration == "batch":
        for norm in bn_layers(subnet):
            norm.train()
    else:
        fold_bn(subnet)
    if race is None:
        return judge(subnet, images, labels, **options)
    correct = np.empty(0, dtype=bool)
    for end in slice_ends(len(images)):
        part = race.order[len(correct) : end]
        correct = np.append(correct, judge(subnet, images[part], labels[part], **options))
        if race.is_lost(correct):
            return correct
    return correct[np.argsort(race.order)]


@torch.inference_mode()
def recalibrate_bn(
    subnet: nn.Module,
    images: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    side: int | None = None,
) -> None:
    """Set each BN layer's statistics to the exact mean and variance over all `images`.

    Each batch is normalised by its own statistics on the way, as in training. By the law
    of total variance, over batches b of n_b values each with mean m_b and variance v_b:
        mean = sum(n_b m_b) / n,   var = sum(n_b (v_b + m_b^2)) / n - mean^2
    with v_b and var the population variances (divided by n). Leaves `subnet` in eval mode.
    """
    norms = bn_layers(subnet)
    subnet.eval()  # dropout stays off
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    values = [0] * len(norms)  # per channel, in the last batch
    handles = [
        norm.register_forward_pre_hook(_counter(values, index)) for index, norm in enumerate(norms)
    ]
    # Of all layers' channels, one after the other: a few sums a batch instead of some per layer.
    widths = [norm.num_features for norm in norms]
    sums, squares, counts = torch.zeros(3, sum(widths), dtype=torch.float64, device=device)
    before: list[int] = []  # values of the last batch
    try:
        for norm in norms:
            norm.momentum = 1.0  # running statistics become those of the last batch
            norm.train()
        for batch in _batches(images, batch_size, device, side):
            with _autocast(device):
                subnet(batch)
            if values != before:  # a GPU is waited for, so not with every batch
                before = values.copy()
                n = torch.tensor(np.repeat(values, widths), dtype=torch.float64, device=device)
            mean = torch.cat([norm.running_mean for norm in norms]).double()
            var = torch.cat([norm.running_var for norm in norms]).double()
            var *= (n - 1) / n  # torch stores n/(n-1) of it
            sums += n * mean
            squares += n * (var + mean.square())
            counts += n
    finally:
        for handle in handles:
            handle.remove()
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
    if not all(values):
        raise ValueError("a BN layer of the subnet saw no images: it has no statistics")
    means = sums / counts
    variances = (squares / counts - means.square()).clamp_(min=0)
    for norm, mean, var in zip(norms, means.split(widths), variances.split(widths), strict=True):
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)


def bn_layers(network: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def fold_bn(network: nn.Module) -> None:
    """Fold every BN layer that follows a convolution in an nn.Sequential into it, in place.

    The network (in eval mode) computes the same to the rounding of its weights' type, in
    less time.
    """
    for parent in list(network.modules()):
        if not isinstance(parent, nn.Sequential):
            continue
        children = list(parent.named_children())
        for (_, conv), (norm_name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                if norm.training:
                    raise ValueError("only BN layers in eval mode can be folded")
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight,
                    conv.bias,
                    norm.running_mean,
                    norm.running_var,
                    norm.eps,
                    norm.weight,
                    norm.bias,
                )
                setattr(parent, norm_name, nn.Identity())


def top1(
    subnet: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    side: int | None = None,
) -> float:
    """The fraction of exactly these images that `subnet` (in eval mode) classifies right."""
    options = {"batch_size": batch_size, "device": device, "side": side}
    return float(judge(subnet, images, labels, **options).mean())


@torch.inference_mode()
def judge(
    subnet: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    side: int | None = None,
) -> np.ndarray:
    """Which of exactly these images `subnet` (in eval mode) classifies right: bool (n,).

    None of those for which its outputs are not finite: argmax would take them for a class.
    """
    guesses = []  # kept on the device: the host need not wait for each batch
    for batch in _batches(images, batch_size, device, side):
        with _autocast(device):
            outputs = subnet(batch)
        guesses.append(outputs.argmax(1).where(outputs.isfinite().all(1), -1))
    return torch.cat(guesses).cpu().numpy() == labels


def _batches(
    images: np.ndarray, batch_size: int, device: str, side: int | None
) -> Iterator[Tensor]:
    """All images once, in nearly equal batches: a batch of one image has no variance."""
    on_gpu = device == "cuda"
    for part in np.array_split(np.arange(len(images)), -(-len(images) // batch_size)):
        # A copy: the source may be a read-only map that all evaluators share.
        rows = images[part[0] : part[-1] + 1]
        batch = torch.empty(rows.shape, dtype=torch.uint8, pin_memory=on_gpu)
        batch.numpy()[:] = rows
        batch = normalize(_to_gpu(batch) if on_gpu else batch)
        yield batch if side is None else resized(batch, side)


def _to_gpu(batch: Tensor) -> Tensor:
    """Copy a pinned `batch` while the GPU still computes with those before it."""
    computing = torch.cuda.current_stream()
    with torch.cuda.stream(_copying()):
        there = batch.to("cuda", non_blocking=True)
    computing.wait_stream(_copying())
    there.record_stream(computing)
    return there


@lru_cache
def _copying() -> torch.cuda.Stream:
    """One of each process, for each stream keeps the memory that it once had."""
    return torch.cuda.Stream()


def _autocast(device: str) -> torch.autocast:
    dtype = amp_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=dtype is not None)


def _counter(values: list[int], index: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
    def hook(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        values[index] = inputs[0].numel() // inputs[0].shape[1]

    return hook
