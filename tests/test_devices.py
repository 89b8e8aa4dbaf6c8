"""Whether a network is compiled: by what the job says, how long it trains, what is installed."""

import logging

import pytest

from nasray import devices


@pytest.mark.parametrize(
    ("wanted", "num_steps", "expected"),
    [
        ("off", 10**6, False),
        ("on", 1, True),
        ("auto", devices.COMPILE_STEPS, True),
        ("auto", devices.COMPILE_STEPS - 1, False),
    ],
)
def test_a_network_is_compiled_where_that_pays(monkeypatch, wanted, num_steps, expected):
    monkeypatch.setattr(devices, "find_spec", lambda name: object())
    monkeypatch.setattr(devices.os.path, "exists", lambda path: True)
    monkeypatch.setenv("CC", "cc")
    assert devices.should_compile(wanted, num_steps) is expected


def test_what_compilation_lacks_is_named_only_to_who_asked_for_it(monkeypatch, caplog):
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with caplog.at_level(logging.WARNING):
        assert not devices.should_compile("auto", 10**6)
        assert not caplog.messages
        assert not devices.should_compile("on", 10**6)
    assert 'retrain.compile = "on", but Triton' in caplog.text
