"""benchmarks/on_gpu.py runs to the end without a GPU, so that it does when there is one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALL = ("tests", "run", "training", "evaluation", "evaluators", "compile", "input", "determinism")


def run_parts(folder: Path, *options: str) -> dict[str, dict[str, float]]:
    """Run parts on the CPU, small; the values of their rows by part and name."""
    command = [sys.executable, "benchmarks/on_gpu.py", "--device", "cpu", "--quick"]
    ended = subprocess.run(
        [*command, "--out", folder, *options], cwd=ROOT, capture_output=True, text=True
    )
    logs = "\n".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log")))
    assert ended.returncode == 0, ended.stdout + ended.stderr + logs
    parts = json.loads((folder / "on_gpu.json").read_text())["parts"]
    assert {part["verdict"] for part in parts} == {"done"}
    assert "".join(f"{part['part']}: done\n" for part in parts) == ended.stdout
    return {part["part"]: {row["name"]: row["value"] for row in part["rows"]} for part in parts}


def test_the_evaluation_part_ends_with_its_rows(tmp_path):
    [rows] = run_parts(tmp_path, "--parts", "evaluation").values()
    for space in ("shufflenet", "ofa_mobilenetv3"):
        for measured in ("recalibration", "top-1", "bare folded passes"):
            assert rows[f"{space}, 64 px, batch 8: {measured}"] > 0


@pytest.mark.slow
@pytest.mark.ray
def test_every_part_ends_with_rows(tmp_path):
    found = run_parts(tmp_path, "--minutes", "20")
    assert tuple(found) == ALL
    assert all(found.values())
    assert found["tests"]["tests failed"] == 0 < found["tests"]["tests passed"]
