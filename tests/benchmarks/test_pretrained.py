"""benchmarks/pretrained.py shows its figures with their aims, after hours of measuring."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHOW = """
import json, sys
sys.path.insert(0, "benchmarks")
from pretrained import AIMS, rows_of
rows = rows_of([dict.fromkeys(AIMS, 1.0) | {"pruned: minutes": 2.0}])
print(json.dumps([[row.name, row.value, row.unit, row.aim] for row in rows]))
"""


def test_every_aim_is_shown_with_its_figure():
    found = subprocess.run(
        [sys.executable, "-c", SHOW], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = json.loads(found.stdout)
    assert rows == [
        ["nasray: supernet, <= 33 M", 1.0, "top-1", ">= 0.836"],
        ["nasray: supernet, <= 17 M", 1.0, "top-1", ">= 0.81"],
        ["nasray: supernet, <= 11 M", 1.0, "top-1", ">= 0.79"],
        ["nasray: minutes to networks for all budgets", 1.0, "min", "<= 60"],
        ["pruned: minutes", 2.0, "min", None],
    ]
