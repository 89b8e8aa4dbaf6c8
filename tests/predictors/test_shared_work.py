"""Work shared among threads: each computes alone, and the one that waits for it helps."""

import threading

import pytest
import torch

from nasray.predictors.shared_work import SharedWork, lone_threads

HELPERS = max(1, torch.get_num_threads() - 1)
CALLS = HELPERS + 5


def test_each_lone_thread_computes_alone():
    together = threading.Barrier(HELPERS)

    def count(_):
        together.wait(timeout=30)
        return torch.get_num_threads()

    assert set(lone_threads().map(count, range(HELPERS))) == {1}


def test_the_thread_that_waits_computes_what_no_other_has_begun():
    """Every lone thread is held until the waiting one has done all the rest."""
    before = torch.get_num_threads()
    work, rest = SharedWork(), threading.Event()
    held = threading.Barrier(HELPERS + 1)

    def hold(number):
        held.wait(timeout=30)
        assert rest.wait(timeout=30)
        return number, threading.get_ident()

    def own(number):
        if number == CALLS - 1:
            rest.set()
        assert torch.get_num_threads() == 1
        return number, threading.get_ident()

    futures = [work.submit(hold, number) for number in range(HELPERS)]
    held.wait(timeout=30)
    futures += [work.submit(own, number) for number in range(HELPERS, CALLS)]
    found = work.finish(futures)
    assert [number for number, _ in found] == list(range(CALLS))
    assert {thread for _, thread in found[HELPERS:]} == {threading.get_ident()}
    assert threading.get_ident() not in {thread for _, thread in found[:HELPERS]}
    assert torch.get_num_threads() == before


def test_a_call_that_fails_says_so_where_it_is_waited_for():
    work = SharedWork()
    good, bad = work.submit(lambda _: 1, None), work.submit(lambda _: 1 / 0, None)
    assert isinstance(bad.exception(timeout=30), ZeroDivisionError)  # a lone thread met it
    assert work.finish([good]) == [1]
    with pytest.raises(ZeroDivisionError):
        work.finish([bad])


def test_a_stop_while_the_waiting_thread_computes_leaves_nobody_waiting():
    work, rest = SharedWork(), threading.Event()
    held = threading.Barrier(HELPERS + 1)

    def hold(_):
        held.wait(timeout=30)
        assert rest.wait(timeout=30)

    def stop(_):
        raise KeyboardInterrupt

    holding = [work.submit(hold, None) for _ in range(HELPERS)]
    held.wait(timeout=30)
    stopped = work.submit(stop, None)
    with pytest.raises(KeyboardInterrupt):
        work.finish([stopped])
    rest.set()
    assert work.finish(holding) == [None] * HELPERS
    assert isinstance(stopped.exception(timeout=30), KeyboardInterrupt)
