"""The training loop of a supernet or a subnet, and its optimiser and schedule. Plain torch.

Knows nothing of Ray: with torch.distributed initialised it is data-parallel, else not.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from nasray.data.transforms import normalize
from nasray.devices import amp_dtype


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, for a supernet and a subnet alike."""

    epochs: int
    learning_rate: float  # peak
    warmup_epochs: float
    momentum: float
    weight_decay: float
    label_smoothing: float


class SizedBatches(Protocol):
    """Batches of (uint8 images (n, 3, side, side), labels (n,)), and how many there are."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


FINITE_CHECK_STEPS = 100
BATCHES_AHEAD = 2  # on their way to a GPU


class LossNotFiniteError(RuntimeError):
    """The loss became NaN or infinite; trying again would end the same."""


def fit(
    network: nn.Module,
    forward: Callable[[Tensor, int, int], Tensor],
    recipe: Recipe,
    *,
    batches: Callable[[int], SizedBatches],
    validate: Callable[[int], dict[str, float | None]],
    report: Callable[[list[dict], Callable[[], dict]], None],
    resume: dict | None,
    device: str,
    seed: int,
) -> list[dict]:
    """Train `network` for `recipe.epochs` and return one dict of metrics per epoch.

    `forward(images, epoch, step)` gives logits, `batches(epoch)` the epoch's data. After
    each epoch `report(curves, state)` is told; `state()` is all that `resume` needs to go
    on as if nothing had happened: every choice is a function of the seed and the epoch.
    """
    optimizer, scaler = make_optimizer(network, recipe), make_scaler(device)
    curves: list[dict] = []
    if resume is not None:
        network.load_state_dict(resume["state"])
        optimizer.load_state_dict(resume["optimizer"])
        scaler.load_state_dict(resume["scaler"])
        curves = list(resume["curves"])

    def state() -> dict:
        return {
            "state": network.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "curves": curves,
        }

    for epoch in range(len(curves), recipe.epochs):
        started = time.monotonic()
        # Dropout takes torch's own generator and no other; this makes it a function of
        # the epoch, so that a resumed run draws what an uninterrupted one does.
        torch.manual_seed(seed * 1_000_003 + epoch)
        data = batches(epoch)
        network.train()
        metrics = train_epoch(
            lambda images, step, epoch=epoch: forward(images, epoch, step),
            data,
            optimizer,
            scaler,
            recipe,
            epoch=epoch,
            num_steps=len(data),
            device=device,
        )
        metrics |= validate(epoch)
        metrics |= {
            "epoch": epoch,
            "learning_rate": learning_rate(recipe, epoch),
            "seconds": time.monotonic() - started,
        }
        curves.append(metrics)
        report(curves, state)
    return curves


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.SGD:
    """Nesterov momentum; weight decay on convolutions and linear layers, none on BN and bias."""
    decayed, plain = [], []
    for module in network.modules():
        for name, param in module.named_parameters(recurse=False):
            is_norm = isinstance(module, nn.BatchNorm2d)
            (plain if is_norm or name == "bias" else decayed).append(param)
    optimizer = torch.optim.SGD(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ],
        lr=0.0,  # set before every step
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        fused=True,
    )
    if recipe.momentum > 0:
        # The fused step takes no mixture of weights with momentum and weights chosen for
        # the first time. Zeros are what the latter's momentum amounts to.
        for param in (*decayed, *plain):
            optimizer.state[param]["momentum_buffer"] = torch.zeros_like(param)
    return optimizer


def learning_rate(recipe: Recipe, epoch: float) -> float:
    """The rate at `epoch` (fractional): linear warm-up from 0, then cosine to 0."""
    if epoch < recipe.warmup_epochs:
        return recipe.learning_rate * epoch / recipe.warmup_epochs
    remaining = max(recipe.epochs - recipe.warmup_epochs, 1e-9)
    done = (epoch - recipe.warmup_epochs) / remaining
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def make_scaler(device: str) -> torch.amp.GradScaler:
    """Loss scaling, needed only where mixed precision means float16."""
    return torch.amp.GradScaler(device, enabled=amp_dtype(device) is torch.float16)


def train_epoch(
    forward: Callable[[Tensor, int], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    *,
    epoch: int,
    num_steps: int,
    device: str,
) -> dict[str, float]:
    """Train one epoch on `batches` of uint8 images; return its mean loss and top-1.

    `forward(images, step)` gives the logits. Workers average their gradients at every step.
    """
    dtype = amp_dtype(device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, correct, images
    check = FiniteCheck(epoch)
    for step, (images, labels) in enumerate(_on_device(batches, device)):
        rate = learning_rate(recipe, epoch + step / num_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        clear_gradients(optimizer)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            logits = forward(normalize(images), step)
            loss = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
        scaler.scale(loss).backward()
        average_gradients(optimizer)
        scaler.step(optimizer)
        scaler.update()
        correct = (logits.argmax(1) == labels).sum()
        sums[0] += loss.detach() * len(labels)
        sums[1] += correct
        sums[2] += len(labels)
        if step % FINITE_CHECK_STEPS == FINITE_CHECK_STEPS - 1:
            check.look(sums)
    loss_sum, num_correct, num_images = check.finish(sums)
    return {"loss": loss_sum / num_images, "train_top1": num_correct / num_images}


class FiniteCheck:
    """Totals over the workers, who stop together if the loss is not finite.

    What a look finds is read at the next one: by then a GPU has long computed it, and its
    host does not wait for the steps that are queued.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.before: tuple[Tensor, torch.cuda.Event | None] | None = None

    def look(self, sums: Tensor) -> None:
        before, self.before = self.before, _to_host(_over_workers(sums))
        if before is not None:
            totals, copied = before
            if copied is not None:
                copied.synchronize()
            self._check(totals)

    def finish(self, sums: Tensor) -> list[float]:
        """The totals at the end of the epoch."""
        totals = _over_workers(sums)
        self._check(totals)
        return totals.tolist()

    def _check(self, totals: Tensor) -> None:
        if not math.isfinite(loss := totals[0].item()):
            raise LossNotFiniteError(
                f"the loss became {loss} in epoch {self.epoch + 1}; the last good checkpoint "
                "is kept. Lower learning_rate or raise warmup_epochs, and use a new run directory"
            )


def _over_workers(sums: Tensor) -> Tensor:
    totals = sums.clone()
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals


def _to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """`tensor` on the host, and of a GPU's the event after which it is there."""
    if not tensor.is_cuda:
        return tensor, None
    there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    there.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return there, copied


def _on_device(
    batches: Iterable[tuple[Tensor, Tensor]], device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `batches` on the device; on a GPU, the next ones are on their way meanwhile.

    A thread fetches each batch, copies it into pinned memory and has it copied from there on
    a stream of its own, so that neither the GPU nor the launching of its kernels waits.
    """
    if device != "cuda":
        yield from batches
        return
    iterator, stream = iter(batches), torch.cuda.Stream()

    def fetch() -> tuple[Tensor, Tensor, torch.cuda.Event] | None:
        found = next(iterator, None)
        if found is None:
            return None
        with torch.cuda.stream(stream):
            images, labels = (each.pin_memory().to(device, non_blocking=True) for each in found)
            copied = torch.cuda.Event()
            copied.record()
        return images, labels, copied

    fetching = ThreadPoolExecutor(1, "fetch", torch.cuda.set_device, (stream.device,))
    try:
        coming = deque(fetching.submit(fetch) for _ in range(BATCHES_AHEAD))
        while (batch := coming.popleft().result()) is not None:
            coming.append(fetching.submit(fetch))
            images, labels, copied = batch
            computing = torch.cuda.current_stream()
            computing.wait_event(copied)
            images.record_stream(computing)
            labels.record_stream(computing)
            yield images, labels
    finally:
        fetching.shutdown(cancel_futures=True)


def clear_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Set gradients to None, so that weights outside a step's subnet get no momentum, no decay.

    The optimiser's own zero_grad takes ten times as long, about 1 % of a small step.
    """
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Average over the workers the gradients that exist, as one flat buffer.

    All workers trained the same subnet, so the same gradients exist everywhere; the wrapper
    torch offers for this would wait for those of the blocks not chosen.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    grads = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view_as(grad))
