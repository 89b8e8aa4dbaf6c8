"""Costs, latencies, predictions and extracted weights are those of the recorded commit."""

import json
from pathlib import Path

import pytest

from tests.recorded import compute

RECORDED = json.loads(Path(compute.__file__).with_name("numbers.json").read_text())
# What the last bits of a sum depend on differs between kinds of CPUs.
FLOATS = {"predicted": 1e-6, "predicted_exactly": 1e-6, "logits": 1e-12}


@pytest.fixture(scope="module")
def found():
    return compute.numbers()


@pytest.mark.parametrize("space", sorted(RECORDED.keys() - {"cpu"}))
def test_numbers_are_equal_to_the_last_bit(space, found):
    values, recorded = found[space], RECORDED[space]
    assert values.keys() == recorded.keys()
    same_cpu = found["cpu"] == RECORDED["cpu"]
    for name, value in values.items():
        if name not in FLOATS:
            assert value == recorded[name], name
        elif same_cpu and name != "logits":
            assert value == recorded[name], name
        else:
            scale = max(map(abs, recorded[name]))
            assert value == pytest.approx(recorded[name], rel=0, abs=FLOATS[name] * scale), name
