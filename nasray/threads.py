"""Threads that torch computes with: another number for a while, and threads that compute alone."""

import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def computing_with(number: int) -> Iterator[None]:
    """Let torch compute with `number` threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def lone_threads() -> ThreadPoolExecutor:
    """As many threads as torch computes with here, each of which computes alone.

    For small products side by side: one that is split among cores waits for the slowest.
    """
    number = torch.get_num_threads()
    threads = ThreadPoolExecutor(number, initializer=_compute_alone)
    for _ in threads.map(time.sleep, [0.01] * number):  # all have started
        pass
    torch.set_num_threads(number)  # threads that start from now on take what was set last
    return threads


def _compute_alone() -> None:
    """Keep what this thread computes to itself."""
    torch.get_num_threads()  # a thread's first call takes over the number that was set last
    torch.set_num_threads(1)
