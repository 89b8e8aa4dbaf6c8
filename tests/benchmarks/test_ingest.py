"""benchmarks/ingest.py runs to the end on a few images."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]


def test_the_ingest_benchmark_ends_with_rows_of_each_feed_and_decoder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(16):
        path = tmp_path / "images" / f"class{number % 2}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    found = tmp_path / "ingest.json"
    command = [sys.executable, "benchmarks/ingest.py", "--images", tmp_path / "images"]
    options = ["--cores", "1", "2000", "--batch", "4", "--copies", "1", "--repeats", "1"]
    ended = subprocess.run(
        [*command, *options, "--json", found], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2000 cores: left out" in ended.stdout
    rows = {row["name"]: row["value"] for row in json.loads(found.read_text())["rows"]}
    skipped = "torchcodec: left out" in ended.stdout
    for decoder in ("pillow", *(() if skipped else ("torchcodec",))):
        assert 0 < rows[f"{decoder}: decode"] and 0 < rows[f"{decoder}: augment"]
        assert math.isfinite(rows[f"1 core: nasray, {decoder} / torchvision"])
    assert skipped == ("torchcodec: decode" not in rows)
