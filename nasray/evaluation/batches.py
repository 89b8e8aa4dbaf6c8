"""Runs a step on all batches of the images to evaluate: copies ahead of it, CUDA graphs.

Small networks keep a GPU waiting for the host, which launches hundreds of kernels per batch. A
captured CUDA graph is launched as a whole.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Images of uint8 (n, 3, height, width): an array on the host, which is copied batch by batch, or
# a tensor on the GPU.
UInt8Images = np.ndarray | Tensor

# A CUDA graph is captured for batches of at most GRAPH_PIXELS pixels, if more than GRAPH_BATCHES
# have that shape: larger ones keep the GPU busy without it, and capturing takes as long as a batch.
GRAPH_PIXELS = 16 << 20
GRAPH_BATCHES = 3
BATCHES_AHEAD = 3  # queued for a GPU; more would only take memory


def on_batches(
    step: Callable[[Tensor], Tensor],
    images: UInt8Images,
    batch_size: int,
    device: str,
    *,
    graphs: bool,
) -> Iterator[Tensor]:
    """Yield `step(batch)` for all batches of `images`, in order.

    `step` takes uint8 images (n, 3, height, width) on the device; with `graphs`, it is run as a
    CUDA graph where that pays, but for the first batch of each shape. Batches have at most
    `batch_size` images and are nearly equal. None has one image, which has no variance: of an odd
    number in twos, one batch has three.
    """
    seen: Counter[torch.Size] = Counter()
    captured: dict[torch.Size, _Graph | None] = {}
    queued: deque[torch.cuda.Event] = deque()
    rows = _split(len(images), batch_size)
    sizes = Counter(end - start for start, end in rows)
    for batch in _batches(images, rows, device):
        shape = batch.shape
        seen[shape] += 1
        small = shape[0] * shape[-1] * shape[-2] <= GRAPH_PIXELS
        pays = graphs and batch.is_cuda and small and sizes[shape[0]] > GRAPH_BATCHES
        if pays and seen[shape] == 2:
            captured[shape] = _capture(step, batch)
        graph = captured.get(shape)
        yield step(batch) if graph is None else graph(batch)
        if batch.is_cuda:
            queued.append(torch.cuda.Event())
            queued[-1].record()
            if len(queued) > BATCHES_AHEAD:
                queued.popleft().synchronize()


class _Graph:
    """A captured `step`, which is replayed on other batches of the same shape."""

    possible = True  # in this process, until a capture fails

    def __init__(self, step: Callable[[Tensor], Tensor], batch: Tensor) -> None:
        self.input = torch.empty_like(batch)
        self.graph = torch.cuda.CUDAGraph()
        stream = _capture_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Other threads, which copy images, may call CUDA meanwhile.
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
    """Capture `step`; None if that fails, so that every batch runs eagerly from then on."""
    if not _Graph.possible:
        return None
    try:
        return _Graph(step, batch)
    except RuntimeError as error:  # or memory is too small for a second set of activations
        # torch does not clean up after a capture that failed: its CUDA generator still counts as
        # being captured and refuses to draw in this process. An evaluator draws nothing.
        _Graph.possible = False
        logger.warning("no CUDA graphs (%s); batches run eagerly", str(error).splitlines()[0])
        return None


def release_graph_memory() -> None:
    """Free the memory that graphs of this process have shared; none may be in use."""
    _first_graph.cache_clear()
    torch.cuda.empty_cache()


@lru_cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _graph_memory() -> tuple[int, int]:
    """The memory pool that all graphs of this process share: one runs at a time."""
    return _first_graph().pool()


@lru_cache
def _first_graph() -> torch.cuda.CUDAGraph:
    """A graph of one small kernel, which keeps the shared pool alive when no other graph exists."""
    graph, number = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.stream(_capture_stream()):
        graph.capture_begin(capture_error_mode="thread_local")
        number += 1
        graph.capture_end()
    return graph


def _split(number: int, batch_size: int) -> list[tuple[int, int]]:
    """Nearly equal batches as (start, end), none of one image unless all are."""
    fewest = 2 if min(number, batch_size) > 1 else 1
    parts = np.array_split(np.arange(number), min(-(-number // batch_size), number // fewest))
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


def _batches(images: UInt8Images, rows: list[tuple[int, int]], device: str) -> Iterator[Tensor]:
    """Yield images[start:end] on the device for all `rows`."""
    for start, end in rows:
        part = images[start:end]
        if isinstance(part, Tensor):
            yield part
            continue
        # Copied, because the source may be a read-only memory map that all evaluators share.
        batch = torch.empty(part.shape, dtype=torch.uint8, pin_memory=device == "cuda")
        batch.numpy()[:] = part
        yield _to_gpu(batch) if device == "cuda" else batch


def _to_gpu(batch: Tensor) -> Tensor:
    """Copy a pinned `batch` while the GPU still computes on earlier ones."""
    computing = torch.cuda.current_stream()
    with torch.cuda.stream(_copy_stream()):
        copied = batch.to("cuda", non_blocking=True)
    computing.wait_stream(_copy_stream())
    copied.record_stream(computing)
    return copied


@lru_cache
def _copy_stream() -> torch.cuda.Stream:
    """One stream per process: each stream keeps the memory that was allocated on it."""
    return torch.cuda.Stream()
