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
import torch
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


def command(folder: Path, kept: str, *options: str) -> list[str]:
    inputs = ["--truth", folder / "truth.csv", "--cifar10", folder]
    outputs = ["--folder", folder / kept, "--json", folder / f"{kept}.json"]
    small = ["--images", "30", "--holdout", "20", "--calibration", "10", "--batch-size", "2"]
    every = [sys.executable, "benchmarks/rank.py", *inputs, *outputs, *small, *options]
    return list(map(str, every))


def values(folder: Path, kept: str) -> dict[str, float]:
    rows = json.loads((folder / f"{kept}.json").read_text())["rows"]
    return {row["name"]: row["value"] for row in rows}


def test_it_prints_a_row_for_each_way_of_training_and_resumes(tmp_path):
    write_inputs(tmp_path)
    options = ["--passes", "12", "--checkpoints", "1", "--networks", "10"]
    options += ["--strategies", "uniform", "fair"]

    def run() -> tuple[str, dict[str, float]]:
        asked = command(tmp_path, "kept", *options)
        ended = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout, values(tmp_path, "kept")

    said, rows = run()
    assert said.count("1 of 1: loss") == 2 and "12 forward passes of 2" in said
    assert rows["ranked by parameters: tau-b"] == 1
    assert rows["ranked by parameters: regret of the best ranked"] == 0
    for name in ("ranked by MACs", "uniform", "fair"):
        for figure in ("tau-b", "tau-b minus that of MACs"):
            ends = ("low end of the 95 % interval", "high end")
            low, high = (rows[f"{name}: {figure}, {end}"] for end in ends)
            assert -2 <= low <= rows[f"{name}: {figure}"] <= high <= 2
    macs = rows["ranked by MACs: tau-b"]
    assert rows["ranked by MACs: tau-b minus that of MACs"] == 0
    assert rows["uniform: tau-b minus that of MACs"] == rows["uniform: tau-b"] - macs
    again, same = run()
    assert "of 1: loss" not in again and same == rows


def test_a_training_that_was_stopped_goes_on_from_its_checkpoint(tmp_path):
    write_inputs(tmp_path)
    options = ["--passes", "24", "--checkpoints", "2", "--networks", "3"]
    options += ["--strategies", "uniform"]
    stopped = command(tmp_path, "stopped", *options)
    with subprocess.Popen(stopped, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert any("1 of 2: loss" in line for line in process.stdout)
        process.kill()
    [checkpoint] = (tmp_path / "stopped").glob("*.pt")
    assert not list((tmp_path / "stopped").glob("*.json"))
    again = subprocess.run(stopped, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "1 of 2: loss" not in again and "networks known" in again
    whole = command(tmp_path, "whole", *options)
    said = subprocess.run(whole, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "1 of 2: loss" in said
    [uninterrupted] = (tmp_path / "whole").glob("*.json")
    resumed = tmp_path / "stopped" / uninterrupted.name
    assert json.loads(resumed.read_text()) == json.loads(uninterrupted.read_text())
    assert values(tmp_path, "stopped") == values(tmp_path, "whole")
    weights = [torch.load(tmp_path / kept / checkpoint.name) for kept in ("stopped", "whole")]
    for name, weight in weights[1]["state"].items():
        assert torch.equal(weights[0]["state"][name], weight), name
