"""Averages the gradients of a step over data-parallel workers: of its subnets, nothing else.

torch's DistributedDataParallel waits for a gradient of every parameter, or sends zeros for those
that a step did not touch. Here all workers train the same subnets, so what is sent grows with
them: the leading slices that they use of the stored weights.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nasray.spaces.supernet import leading_slice

# What a step touches: parameters, and of each the shape of the leading slice that it uses.
Slices = Sequence[tuple[nn.Parameter, torch.Size]]


def union(passes: Iterable[Slices]) -> Slices:
    """What several passes touch together: of each parameter the smallest slice with all theirs."""
    found: dict[nn.Parameter, torch.Size] = {}
    for param, shape in chain.from_iterable(passes):
        found[param] = torch.Size(map(max, shape, found.get(param, shape)))
    return list(found.items())


BUCKET_BYTES = 1 << 20  # sent at once; the last buckets, of the first layers, cannot be hidden


class _Bucket:
    """Gradients that are sent as one flat tensor."""

    def __init__(self) -> None:
        self.slices: list[tuple[nn.Parameter, torch.Size]] = []
        self.num_bytes = 0
        self.missing = 0  # gradients that backward has not computed yet
        self.flat = torch.empty(0)
        self.work: dist.Work | None = None

    def views(self) -> list[Tensor]:
        """The gradients that exist, cut to their slices."""
        found = [(param.grad, shape) for param, shape in self.slices]
        return [leading_slice(grad, shape) for grad, shape in found if grad is not None]

    def send(self) -> None:
        views = self.views()
        if views:
            self.flat = torch.cat([view.reshape(-1) for view in views])
            self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self, world_size: int) -> None:
        if self.work is None:
            return
        self.work.wait()
        self.flat /= world_size
        views = self.views()
        for view, mean in zip(views, self.flat.split([v.numel() for v in views]), strict=True):
            view.copy_(mean.view_as(view))


class GradientAverager:
    """Averages gradients over the workers, in buckets; does nothing with one worker.

    begin() before the last backward pass of a step says what the step touches; finish() after it
    waits until every such gradient is the mean over the workers. On GPUs, a bucket is sent while
    the backward pass still computes the gradients of earlier layers; a CPU's cores are busy with
    those.
    """

    def __init__(self, network: nn.Module) -> None:
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.buckets: list[_Bucket] = []
        self.bucket_of: dict[nn.Parameter, _Bucket] = {}
        self.num_sent = 0  # buckets, in order: all workers must send the same one next
        self.whole = [(param, param.shape) for param in network.parameters()]
        overlaps = any(param.is_cuda for param in network.parameters())
        if self.world_size > 1 and overlaps:
            for param in network.parameters():
                param.register_post_accumulate_grad_hook(self._computed)

    def begin(self, slices: Callable[[], Slices | None] = lambda: None) -> None:
        """Expect gradients of slices(), in the order of the forward pass; None: of all weights.

        Called only if there are other workers.
        """
        self.buckets, self.bucket_of, self.num_sent = [], {}, 0
        if self.world_size == 1:
            return
        expected = slices()
        for param, shape in reversed(self.whole if expected is None else expected):
            if not self.buckets or self.buckets[-1].num_bytes >= BUCKET_BYTES:
                self.buckets.append(_Bucket())
            bucket = self.buckets[-1]
            bucket.slices.append((param, shape))
            bucket.num_bytes += shape.numel() * param.element_size()
            bucket.missing += 1
            self.bucket_of[param] = bucket

    def finish(self) -> None:
        """Send what is not yet sent, and wait for all."""
        for bucket in self.buckets[self.num_sent :]:
            bucket.send()
        for bucket in self.buckets:
            bucket.receive(self.world_size)
        self.buckets, self.bucket_of = [], {}

    def _computed(self, param: nn.Parameter) -> None:
        bucket = self.bucket_of.get(param)
        if bucket is None:
            return
        bucket.missing -= 1
        while self.num_sent < len(self.buckets) and not self.buckets[self.num_sent].missing:
            self.buckets[self.num_sent].send()
            self.num_sent += 1
