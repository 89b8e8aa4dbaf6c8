"""Every algorithm evaluates what it evaluated at the recorded commit, in the same order."""

import json
from pathlib import Path

from tests.recorded import compute

RECORDED = json.loads(Path(compute.__file__).with_name("histories.json").read_text())


def test_same_seed_same_history_as_recorded():
    found = compute.histories()
    assert found.keys() == RECORDED.keys()
    different = [name for name, value in found.items() if value != RECORDED[name]]
    assert not different
