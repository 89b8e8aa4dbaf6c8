"""The threads that predict: each computes alone, and torch's own number stays as it was."""

import threading

import torch

from nasray.predictors.predictor import single_threads

NUMBER = torch.get_num_threads()


def test_each_thread_computes_alone():
    together = threading.Barrier(NUMBER)

    def count(_):
        together.wait(timeout=30)
        return torch.get_num_threads()

    assert list(single_threads().map(count, range(NUMBER))) == [1] * NUMBER


def test_other_threads_compute_with_as_many_threads_as_before():
    single_threads()
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert found == [NUMBER] == [torch.get_num_threads()]
