"""Work shared among threads that torch computes with."""

import functools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import torch

from nasray.devices import computing_with


class SharedWork:
    """Calls that lone threads compute, and the thread that waits for them as well.

    No more threads compute than torch would use, but for one helper where that is one: two
    that share a core hold up each other.
    """

    def __init__(self) -> None:
        self.helpers = lone_threads()
        self.waiting: SimpleQueue[tuple[Future, Callable[[Any], Any], Any]] = SimpleQueue()

    def submit(self, function: Callable[[Any], Any], argument: Any) -> Future:
        """Have `function(argument)` computed after what was submitted before."""
        future: Future = Future()
        self.waiting.put((future, function, argument))
        self.helpers.submit(self._compute_next)
        return future

    def finish(self, futures: Sequence[Future]) -> list[Any]:
        """Help until all of `futures` are computed, and return their results."""
        with computing_with(1):
            while not all(future.done() for future in futures) and self._compute_next():
                pass
        return [future.result() for future in futures]

    def _compute_next(self) -> bool:
        """Compute the call that has waited longest; False if none waits."""
        try:
            future, function, argument = self.waiting.get_nowait()
        except Empty:
            return False
        try:
            future.set_result(function(argument))
        except BaseException as error:  # Ctrl-C, too: whoever waits must not wait forever
            future.set_exception(error)
            if not isinstance(error, Exception):
                raise
        return True


@functools.cache
def lone_threads() -> ThreadPoolExecutor:
    """Threads that compute alone: with the one that asks, as many as torch computes with here.

    One at least. Their number is that of the first call.
    For small products side by side: one that is split among cores waits for the slowest.
    """
    before = torch.get_num_threads()
    number = max(1, before - 1)
    threads = ThreadPoolExecutor(number, initializer=_compute_alone)
    for _ in threads.map(time.sleep, [0.01] * number):  # all have started
        pass
    torch.set_num_threads(before)  # threads that start from now on take what was set last
    return threads


def _compute_alone() -> None:
    """Keep what this thread computes to itself."""
    torch.get_num_threads()  # a thread's first call takes over the number that was set last
    torch.set_num_threads(1)
