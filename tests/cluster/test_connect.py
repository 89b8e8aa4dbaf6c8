"""How a process connects to Ray: what an interrupt does meanwhile."""

import os
import signal

import pytest

from nasray.cluster.connect import _interrupts_deferred


def test_an_interrupt_while_ray_starts_is_raised_when_it_has_started():
    handler, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt), _interrupts_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("started")
    assert done == ["started"]
    assert signal.getsignal(signal.SIGINT) is handler
    with _interrupts_deferred():
        done.append("without one")
    assert done == ["started", "without one"]
