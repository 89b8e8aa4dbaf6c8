"""benchmarks/rank.py ranks networks by every way of training, and goes on from what it has done."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from nasray.costs.table import CostTable
from nasray.spaces.nasbench_macro import NasBenchMacro
from nasray.spaces.population import as_architectures, random_population

ROOT = Path(__file__).parents[2]


def jpeg(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG")
    return content.getvalue()


def write_inputs(folder: Path) -> None:
    """Sixty pictures of two classes, and a table in which more parameters are always better."""
    rng = np.random.default_rng(0)
    pictures = [jpeg(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(60)]
    labels = pa.array([row % 2 for row in range(60)], pa.int32())
    pq.write_table(pa.table({"image": pictures, "label": labels}), folder / "train.parquet")
    space = NasBenchMacro()
    drawn = np.unique(space.canonical(random_population(space.genes, 40, rng)), axis=0)
    costs = CostTable(space)(drawn)
    with open(folder / "truth.csv", "w") as file:
        table = csv.writer(file)
        table.writerow(["arch", "mean_acc", "params", "macs"])
        for arch, params, macs in zip(
            as_architectures(drawn), costs["params"], costs["macs"], strict=True
        ):
            table.writerow(["".join(map(str, arch)), params / 1e5, int(params), int(macs)])


def test_it_prints_a_row_for_each_way_of_training_and_resumes(tmp_path):
    write_inputs(tmp_path)
    command = [sys.executable, "benchmarks/rank.py", "--truth", tmp_path / "truth.csv"]
    command += ["--cifar10", tmp_path, "--folder", tmp_path / "kept", "--json", tmp_path / "json"]
    command += ["--passes", "12", "--checkpoints", "1", "--images", "30", "--holdout", "20"]
    command += ["--calibration", "10", "--batch-size", "2", "--networks", "6"]
    command += ["--strategies", "uniform", "fair"]

    def run() -> tuple[str, dict[str, float]]:
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        rows = json.loads((tmp_path / "json").read_text())["rows"]
        return ended.stdout, {row["name"]: row["value"] for row in rows}

    said, rows = run()
    assert said.count("1 of 1: loss") == 2 and "12 forward passes of 2" in said
    assert rows["ranked by parameters: tau-b"] == 1
    assert rows["ranked by parameters: regret of the best ranked"] == 0
    for name in ("ranked by MACs", "uniform", "fair"):
        low, high = (
            rows[f"{name}: tau-b, {end}"] for end in ("low end of the 95 % interval", "high end")
        )
        assert -1 <= low <= rows[f"{name}: tau-b"] <= high <= 1
    again, same = run()
    assert "of 1: loss" not in again and same == rows
