"""The accuracy of one subnet: exact BN recalibration, then top-1. Plain torch.

BN statistics of a supernet are a mixture over many subnets and fit none of them, so a subnet's
accuracy means nothing before recalibration (Guo et al. 2019, section 3.3).
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nasray.data.transforms import normalize, resized
from nasray.devices import autocast
from nasray.evaluation.batches import UInt8Images, on_batches
from nasray.search.racing import StoppingRule

LOWEST = -10.0  # log-probability that an image counts with


def evaluate(
    subnet: nn.Module,
    calibration: UInt8Images | Literal["inherited", "batch"],
    images: UInt8Images,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
    rule: StoppingRule | None = None,
    graphs: bool = False,
    measure: Callable[..., np.ndarray] | None = None,
) -> np.ndarray:
    """Recalibrate `subnet` and return which images it classifies correctly.

    Args:
        subnet: an extracted one, on `device`; its BN layers are folded into its convolutions.
        calibration: images of which BN layers take the statistics; or "inherited" for those of
            the supernet, or "batch" for those of each batch that is evaluated.
        images: (n, 3, height, width).
        labels: (n,).
        batch_size: the most images of a batch.
        device: "cpu" or "cuda".
        resolution: to which images are scaled; None: as they are.
        rule: ends the evaluation early once the candidate is hopeless.
        graphs: on a GPU, replay CUDA graphs; their memory stays with the process.
        measure: what is returned instead of correct_mask(): outcomes(), without a rule.

    Returns:
        bool (n,); if `rule` ended it, of the images evaluated only, in the rule's order.
    """
    options: dict[str, Any] = {"batch_size": batch_size, "device": device}
    options |= {"resolution": resolution, "graphs": graphs}
    subnet.eval()
    if not isinstance(calibration, str):
        recalibrate_bn(subnet, calibration, **options)
    if isinstance(calibration, str) and calibration == "batch":
        for norm in bn_layers(subnet):
            norm.train()
    else:
        fold_bn(subnet)
    if rule is None:
        return (measure or correct_mask)(subnet, images, labels, **options)
    return rule.apply(lambda rows: correct_mask(subnet, images[rows], labels[rows], **options))


@torch.inference_mode()
def recalibrate_bn(
    subnet: nn.Module,
    images: UInt8Images,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
    graphs: bool = False,
) -> None:
    """Set each BN layer's statistics to the exact mean and variance over all `images`.

    Each batch is normalised by its own statistics, as in training. By the law of total
    variance, over batches b of n_b values each with mean m_b and variance v_b:
        mean = sum(n_b m_b) / n,   var = sum(n_b (v_b + m_b^2)) / n - mean^2
    with v_b and var the population variances (divided by n). Leaves `subnet` in eval mode.

    Raises:
        ValueError: a BN layer is in no path that images take.
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
    # The channels of all layers are concatenated: a few sums per batch instead of some per layer.
    widths = [norm.num_features for norm in norms]
    sums, squares, counts = torch.zeros(3, sum(widths), dtype=torch.float64, device=device)
    numbers: dict[torch.Size, Tensor] = {}  # of values per channel, by the shape of a batch

    def add_statistics(batch: Tensor) -> Tensor:
        with autocast(device):
            subnet(_prepared(batch, resolution))
        if batch.shape not in numbers:  # copied once, as the host waits for it
            numbers[batch.shape] = torch.tensor(
                np.repeat(values, widths), dtype=torch.float64, device=device
            )
        n = numbers[batch.shape]
        mean = torch.cat([norm.running_mean for norm in norms]).double()
        var = torch.cat([norm.running_var for norm in norms]).double()
        var *= (n - 1) / n  # torch stores the unbiased estimate
        sums.add_(n * mean)
        squares.add_(n * (var + mean.square()))
        return counts.add_(n)

    try:
        for norm in norms:
            norm.momentum = 1.0  # running statistics become those of the last batch
            norm.train()
        for _ in on_batches(add_statistics, images, batch_size, device, graphs=graphs):
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
    """All BN layers of `network`, in the order of its modules."""
    return [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]


def fold_bn(network: nn.Module) -> None:
    """Fold every BN layer that follows a convolution in an nn.Sequential into it, in place.

    The network then computes the same, but for rounding, in less time.

    Raises:
        ValueError: a BN layer is in training mode.
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
    """The fraction of the images that `subnet` (in eval mode) classifies correctly."""
    options = {"batch_size": batch_size, "device": device, "resolution": resolution}
    return float(correct_mask(subnet, images, labels, **options).mean())


@torch.inference_mode()
def correct_mask(
    subnet: nn.Module,
    images: UInt8Images,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
    graphs: bool = False,
) -> np.ndarray:
    """Which of the images `subnet` (in eval mode) classifies correctly: bool (n,).

    An image with outputs that are not finite counts as wrong: argmax would take one for a class.
    """

    def predict(batch: Tensor) -> Tensor:
        with autocast(device):
            return _answers(subnet(_prepared(batch, resolution)))

    # Kept on the device until the end, so that the host need not wait for each batch.
    guesses = list(on_batches(predict, images, batch_size, device, graphs=graphs))
    return torch.cat(guesses).cpu().numpy() == labels


@torch.inference_mode()
def outcomes(
    subnet: nn.Module,
    images: UInt8Images,
    labels: np.ndarray,
    *,
    batch_size: int,
    device: str = "cpu",
    resolution: int | None = None,
    graphs: bool = False,
) -> np.ndarray:
    """Whether `subnet` (in eval mode) classifies each image correctly, as correct_mask() does,
    and the natural logarithm of the probability that it gives to the right class.

    Returns:
        float32 (n, 2): 1 or 0, and LOWEST or more, so that single images do not decide.
    """

    def predict(batch: Tensor) -> Tensor:
        with autocast(device):
            outputs = subnet(_prepared(batch, resolution))
        answers = _answers(outputs)[:, None].float()
        return torch.cat([answers, outputs.float().log_softmax(1)], 1)

    found, done, right = [], 0, torch.from_numpy(labels).to(device)
    for said in on_batches(predict, images, batch_size, device, graphs=graphs):
        own = right[done : done + len(said), None]
        done += len(said)
        found.append(torch.cat([(said[:, :1] == own).float(), said[:, 1:].gather(1, own)], 1))
    whole = torch.cat(found).cpu().numpy()
    whole[:, 1] = np.nan_to_num(whole[:, 1], nan=LOWEST).clip(LOWEST)
    return whole


@torch.inference_mode()
def predictions(
    subnet: nn.Module, images: UInt8Images, *, batch_size: int, device: str = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """The class of each image by `subnet` (in eval mode), and its probability.

    Returns int64 (n,), as correct_mask() compares them with labels: -1 where an output is not
    finite; and float32 (n,).
    """

    def predict(batch: Tensor) -> Tensor:
        with autocast(device):
            outputs = subnet(_prepared(batch, None))
        best = outputs.argmax(1, keepdim=True)
        probability = outputs.float().softmax(1).gather(1, best)
        return torch.cat([_answers(outputs)[:, None].double(), probability.double()], 1)

    found = torch.cat(list(on_batches(predict, images, batch_size, device, graphs=False)))
    classes, probabilities = found.cpu().numpy().T
    return classes.astype(np.int64), probabilities.astype(np.float32)


def _answers(outputs: Tensor) -> Tensor:
    """The class of each image, int64 (n,): -1 where an output is not finite."""
    return outputs.argmax(1).where(outputs.isfinite().all(1), -1)


def _prepared(batch: Tensor, resolution: int | None) -> Tensor:
    batch = normalize(batch)
    return batch if resolution is None else resized(batch, resolution)


def _counter(values: list[int], index: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
    """A hook that writes the number of values per channel of its layer's input."""

    def hook(norm: nn.Module, inputs: tuple[Tensor]) -> None:
        values[index] = inputs[0].numel() // inputs[0].shape[1]

    return hook
