"""The threads that predict: each computes alone, and torch's own number stays as it was."""

import threading

import pytest
import torch

from nasray.devices import computing_with
from nasray.predictors.predictor import single_threads

NUMBER = 3


@pytest.fixture
def threads():
    """Made anew, for the number of the first call is kept: here torch computes with three."""
    with computing_with(NUMBER), single_threads.__wrapped__() as threads:
        yield threads


def test_each_thread_computes_alone(threads):
    together = threading.Barrier(NUMBER)

    def count(_):
        together.wait(timeout=30)
        return torch.get_num_threads()

    assert list(threads.map(count, range(NUMBER))) == [1] * NUMBER


def test_other_threads_compute_with_as_many_threads_as_before(threads):
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [NUMBER] == [torch.get_num_threads()]
