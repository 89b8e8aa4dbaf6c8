"""How a process connects to Ray: what an interrupt does meanwhile."""

import os
import signal
import subprocess
import sys

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


@pytest.mark.ray
def test_the_handler_of_sigterm_is_back_when_a_cluster_has_ended():
    """In a process of its own, whose handler is the default one: a number, not a function."""
    program = """
import signal
from nasray.cluster.connect import ray_cluster
from nasray.config import ComputeConfig

before = signal.getsignal(signal.SIGTERM)
with ray_cluster("local", ComputeConfig(device="cpu"), verbose=False):
    during = signal.getsignal(signal.SIGTERM)
print(before == signal.SIG_DFL, during == before, signal.getsignal(signal.SIGTERM) == before)
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert run.stdout.decode().split() == ["True", "False", "True"]
