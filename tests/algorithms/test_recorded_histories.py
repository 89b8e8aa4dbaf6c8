"""Every algorithm of the recorded commit evaluates what it did there, in the same order."""

import json
from pathlib import Path

from tests.recorded import compute

RECORDED = json.loads(Path(compute.__file__).with_name("histories.json").read_text())


def test_same_seed_same_history_as_recorded():
    found = compute.histories()
    assert found.keys() >= RECORDED.keys()  # more: algorithms that are newer
    different = [name for name, value in RECORDED.items() if value != found[name]]
    assert not different
