"""How a process connects to Ray: what an interrupt does meanwhile."""

import os
import signal
import subprocess
import sys

import pytest

from nasray.cluster.connect import _interrupts_deferred, ray_cluster
from nasray.config import ComputeConfig
from nasray.errors import UserError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_while_ray_starts_is_raised_when_it_has_started(number):
    handler, done = signal.getsignal(number), []
    with pytest.raises(KeyboardInterrupt), _interrupts_deferred():
        os.kill(os.getpid(), number)
        done.append("started")
    assert done == ["started"]
    assert signal.getsignal(number) is handler
    with pytest.raises(KeyboardInterrupt), _interrupts_deferred():
        sys.exit(15)  # by the handler that Ray installs
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


@pytest.mark.parametrize(
    ("variable", "value", "address", "complaint"),
    [
        ("RAY_ADDRESS", "http://127.0.0.1:8265", "http://127.0.0.1:8265", "is a dashboard, where"),
        ("RAY_ADDRESS", "127.0.0.1:1", "127.0.0.1:1", ": no Ray cluster answers there"),
        ("--address", "127.0.0.1:1", "127.0.0.1:1", ": no Ray cluster answers there"),
        ("TMPDIR", f"/tmp/{90 * 'x'}", None, " is 95 bytes long, too long for the names"),
        ("RAY_TMPDIR", f"/tmp/{90 * 'x'}", "local", ": set RAY_TMPDIR to a shorter folder"),
        ("RAY_TMPDIR", "/proc/none", None, ": Ray cannot keep its session there (No such file"),
    ],
)
def test_what_was_given_is_named(monkeypatch, variable, value, address, complaint):
    for each in ("TMPDIR", "RAY_TMPDIR"):
        monkeypatch.delenv(each, raising=False)
    if variable != "--address":
        monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        with ray_cluster(address, ComputeConfig(), verbose=False):
            raise AssertionError("connected")
    sign = " " if variable == "--address" else " = "
    assert str(caught.value).startswith(f"{variable}{sign}{value}")
    assert complaint in str(caught.value)
