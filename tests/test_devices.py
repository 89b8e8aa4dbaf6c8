"""Whether a network is compiled: by the GPU, by what is installed, by whether it works."""

import logging

import pytest
import torch

from nasray import devices

NEEDS = ["a GPU of compute capability 7.0", "Triton", "a C compiler", "Python.h"]


@pytest.mark.parametrize("lacking", [None, *NEEDS])
def test_what_compilation_lacks_is_named(monkeypatch, caplog, lacking):
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: lacking != NEEDS[0])
    monkeypatch.setattr(devices.torch.cuda, "get_device_capability", lambda: (7, 5))
    monkeypatch.setattr(devices, "find_spec", lambda name: None if lacking == NEEDS[1] else name)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.setenv("CC", "" if lacking == NEEDS[2] else "cc")
    monkeypatch.setattr(devices.os.path, "exists", lambda path: lacking != NEEDS[3])
    with caplog.at_level(logging.WARNING):
        assert devices.can_compile() is (lacking is None)
    expected = [f"retrain.compile = true, but {lacking} is missing here: off"] if lacking else []
    assert caplog.messages == expected


def test_training_goes_on_where_compilation_fails(monkeypatch, caplog):
    def fails(graph, inputs):
        raise OSError("no compiler after all")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile(network, backend=fails))
    network = torch.nn.Linear(2, 2)
    images = torch.ones(1, 2)
    compiled = devices.Compiled(network)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(compiled(images), network(images))
    [message] = caplog.messages
    assert message.startswith("torch.compile failed (") and "goes on without it" in message


def test_the_precision_of_a_process_can_be_chosen(monkeypatch):
    monkeypatch.setattr(devices, "_used", {})
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert devices.precisions("cpu") == ["float32"] and devices.amp_dtype("cpu") is None
    assert devices.precisions("cuda") == ["bfloat16", "float16", "float32"]
    assert devices.amp_dtype("cuda") is torch.bfloat16
    devices.use_precision("float16", "cuda")
    assert devices.amp_dtype("cuda") is torch.float16
    devices.use_precision("float32", "cuda")
    assert devices.amp_dtype("cuda") is None
