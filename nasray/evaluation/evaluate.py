"""The accuracy of one subnet: exact BN recalibration, then top-1. Plain torch.

Weights shared by many subnets leave BN statistics that fit none of them, so a subnet's
accuracy means nothing before recalibration (Guo et al. 2019, section 3.3).
"""

import itertools
import logging
from collections import Counter
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

logger = logging.getLogger(__name__)

# What is evaluated on: an array of the host, copied batch by batch, or a tensor of the GPU.
UInt8Images = np.ndarray | Tensor

# A CUDA graph is captured for batches of at most so many pixels, of which at least so many
# follow: larger ones keep the GPU busy without it, and the capture takes as long as a batch.
GRAPH_PIXELS = 16 << 20
GRAPH_BATCHES = 3


def evaluate(
    subnet: nn.Module,
    calibration: UInt8Images | Literal["inherited", "batch"],
    images: UInt8Images,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
    race: Race | None = None,
) -> np.ndarray:
    """Recalibrate `subnet` on `calibration`; return which `images` it has right: bool (n,).

    If it loses the `race`, those of the first slices only, in the race's order. Images are
    uint8 (n, 3, any, any), scaled to `resolution` if one is given. `subnet` should be an extracted
    one: it is left without its BN layers, folded into the convolutions. Instead of images to
    recalibrate on, "inherited" keeps the statistics of the supernet, and "batch" takes each
    batch's own.
    """
    options = {"batch_size": batch_size, "device": device, "resolution": resolution}
    subnet.eval()
    if not isinstance(calibration, str):
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
    images: UInt8Images,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
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
    numbers: dict[torch.Size, Tensor] = {}  # values of a batch, by the shape of the batch

    def add_statistics(batch: Tensor) -> Tensor:
        with _autocast(device):
            subnet(_prepared(batch, resolution))
        if batch.shape not in numbers:  # the host waits for this copy to a GPU
            numbers[batch.shape] = torch.tensor(
                np.repeat(values, widths), dtype=torch.float64, device=device
            )
        n = numbers[batch.shape]
        mean = torch.cat([norm.running_mean for norm in norms]).double()
        var = torch.cat([norm.running_var for norm in norms]).double()
        var *= (n - 1) / n  # torch stores n/(n-1) of it
        sums.add_(n * mean)
        squares.add_(n * (var + mean.square()))
        return counts.add_(n)

    try:
        for norm in norms:
            norm.momentum = 1.0  # running statistics become those of the last batch
            norm.train()
        for _ in _on_batches(add_statistics, images, batch_size, device):
            pass
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
    images: UInt8Images,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
) -> float:
    """The fraction of exactly these images that `subnet` (in eval mode) classifies right."""
    options = {"batch_size": batch_size, "device": device, "resolution": resolution}
    return float(judge(subnet, images, labels, **options).mean())


@torch.inference_mode()
def judge(
    subnet: nn.Module,
    images: UInt8Images,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
) -> np.ndarray:
    """Which of exactly these images `subnet` (in eval mode) classifies right: bool (n,).

    None of those for which its outputs are not finite: argmax would take them for a class.
    """

    def predict(batch: Tensor) -> Tensor:
        with _autocast(device):
            outputs = subnet(_prepared(batch, resolution))
        return outputs.argmax(1).where(outputs.isfinite().all(1), -1)

    # Kept on the device until the end: the host need not wait for each batch.
    guesses = list(_on_batches(predict, images, batch_size, device))
    return torch.cat(guesses).cpu().numpy() == labels


def _on_batches(
    step: Callable[[Tensor], Tensor], images: UInt8Images, batch_size: int, device: str
) -> Iterator[Tensor]:
    """Yield `step(batch)` for all batches of `images`; as a CUDA graph where that pays.

    Small networks keep a GPU waiting for the host, which launches hundreds of kernels a
    batch; a captured graph is one launch. The first batch of each shape runs eagerly.
    """
    met: Counter[torch.Size] = Counter()
    graphs: dict[torch.Size, _Graph | None] = {}
    rows = _split(len(images), batch_size)
    sizes = Counter(end - start for start, end in rows)
    for batch in _batches(images, rows, device):
        shape = batch.shape
        met[shape] += 1
        small = shape[0] * shape[-1] * shape[-2] <= GRAPH_PIXELS
        if batch.is_cuda and small and met[shape] == 2 and sizes[shape[0]] > GRAPH_BATCHES:
            graphs[shape] = _capture(step, batch)
        graph = graphs.get(shape)
        yield step(batch) if graph is None else graph(batch)


class _Graph:
    """A captured `step`, replayed on other batches of the same shape."""

    def __init__(self, step: Callable[[Tensor], Tensor], batch: Tensor) -> None:
        self.input = torch.empty_like(batch)
        self.graph = torch.cuda.CUDAGraph()
        stream = _capturing()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads, which copy images, may go on calling CUDA.
            self.graph.capture_begin(pool=_graph_memory(), capture_error_mode="thread_local")
            try:
                self.output = step(self.input)
            finally:
                self.graph.capture_end()

    def __call__(self, batch: Tensor) -> Tensor:
        self.input.copy_(batch)
        self.graph.replay()
        return self.output.clone()


def _capture(step: Callable[[Tensor], Tensor], batch: Tensor) -> _Graph | None:
    """Capture `step`; None if that is not possible, so that every batch runs eagerly."""
    try:
        return _Graph(step, batch)
    except RuntimeError as error:  # also where memory is too small for a second copy of all
        logger.warning("no CUDA graph (%s); batches run one by one", str(error).splitlines()[0])
        return None


@lru_cache
def _capturing() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _graph_memory() -> tuple[int, int]:
    """The memory that all graphs of this process share, one after the other."""
    return _first_graph().pool()


@lru_cache
def _first_graph() -> torch.cuda.CUDAGraph:
    """An empty graph, which keeps the shared memory alive while no other graph exists."""
    graph, number = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.stream(_capturing()):
        graph.capture_begin(capture_error_mode="thread_local")
        number += 1
        graph.capture_end()
    return graph


def _split(number: int, batch_size: int) -> list[tuple[int, int]]:
    """Nearly equal batches, as (first, end): a batch of one image has no variance."""
    parts = np.array_split(np.arange(number), -(-number // batch_size))
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _batches(images: UInt8Images, rows: list[tuple[int, int]], device: str) -> Iterator[Tensor]:
    """The uint8 batches images[start:end] on the device."""
    for start, end in rows:
        part = images[start:end]
        if isinstance(part, Tensor):
            yield part
            continue
        # A copy: the source may be a read-only map that all evaluators share.
        batch = torch.empty(part.shape, dtype=torch.uint8, pin_memory=device == "cuda")
        batch.numpy()[:] = part
        yield _to_gpu(batch) if device == "cuda" else batch


def _prepared(batch: Tensor, resolution: int | None) -> Tensor:
    batch = normalize(batch)
    return batch if resolution is None else resized(batch, resolution)


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
