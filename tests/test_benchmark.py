"""`nasray benchmark`: the files that it finds, what they say of themselves, and that they ran."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import nasray
from nasray.cli.main import main
from nasray.errors import UserError
from nasray.export import export_onnx
from nasray.quantize import to_float16, with_metadata

SIDE = 16  # pixels


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """What exporting two networks leaves, the first of them in float16, too."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "export").mkdir()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    whole = folder / "export/0.onnx"
    export_onnx(
        network,
        str(whole),
        resolution=SIDE,
        classes=list("abcdefgh"),
        metadata={"val_top1": "0.92", "num_val_images": "250"},
        check_images=np.zeros((2, 3, SIDE, SIDE), np.uint8),
    )
    (folder / "export/0-scratch.onnx").write_bytes(whole.read_bytes())
    (folder / "export/1.onnx").write_bytes(whole.read_bytes())
    said = {"precision": "fp16", "val_top1": 0.908, "fp32_val_top1": 0.92}
    half = with_metadata(to_float16(whole.read_bytes()), said)
    (folder / "export/0-fp16.onnx").write_bytes(half)
    return folder


def test_every_file_of_a_run_has_a_row(run_dir: Path):
    rows = nasray.benchmark(run_dir)
    names = [Path(row["file"]).name for row in rows]
    assert names == ["0.onnx", "0-fp16.onnx", "1.onnx", "0-scratch.onnx"]
    whole, half, *_ = rows
    assert (whole["precision"], whole["top1"], whole["drop"]) == ("fp32", 0.92, None)
    assert (half["precision"], half["top1"], half["num_val_images"]) == ("fp16", 0.908, 250)
    assert half["drop"] == pytest.approx(1.2)
    for row in rows:
        assert row["bytes"] == Path(row["file"]).stat().st_size
        assert row["ms"] > 0 and row["images_per_s"] > 0


def test_what_cannot_be_timed_is_named(run_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="gone.onnx does not exist"):
        nasray.benchmark(tmp_path / "gone.onnx")
    with pytest.raises(UserError, match="nasray export"):
        nasray.benchmark([run_dir, tmp_path])
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no model")
    with pytest.raises(UserError, match="damaged.onnx"):
        nasray.benchmark(damaged)


def test_the_table_and_the_lines_of_json_hold_the_same(run_dir: Path):
    table = CliRunner().invoke(main, ["benchmark", str(run_dir)]).stdout.splitlines()
    assert table[0].split()[:4] == ["file", "precision", "MB", "top-1"]
    assert table[0].split()[4:] == ["drop", "ms", "images/s", "runtime"]
    cells = [line.split() for line in table[1:3]]
    assert [[row[1], *row[3:5]] for row in cells] == [
        ["fp32", "92.0%", "-"],
        ["fp16", "90.8%", "1.2"],
    ]
    lines = CliRunner().invoke(main, ["benchmark", str(run_dir), "--json"]).stdout.splitlines()
    assert [json.loads(line)["top1"] for line in lines] == [0.92, 0.908, 0.92, 0.92]
