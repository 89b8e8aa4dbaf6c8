"""`nasray predict`: the pixels of training's evaluation, without torch."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import nasray
from nasray import checkpoint
from nasray.cli.main import main
from nasray.data.decoding import decode
from nasray.data.transforms import eval_transform
from nasray.errors import UserError
from nasray.evaluation.evaluate import recalibrate_bn
from nasray.pipeline.export_subnet import write_onnx

SPACE = nasray.space("tiny", num_classes=4, resolution=32)
CLASSES = ["ant", "bee", "câtfish", 'dog, "big"']
GROUND = "teal"  # under transparent pixels
PAGE = (Path(__file__).parents[1] / "docs/deploy.md").read_text()
[SNIPPET] = re.findall(r"```python\n(.+?)```", PAGE, re.S)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine pictures of all kinds of shapes, modes and files, in two folders."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    rng = np.random.default_rng(0)
    shapes = [(40, 57), (61, 33), (32, 32), (20, 90), (300, 301)]
    for number, shape in enumerate(shapes):
        pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{('png', 'jpg')[number % 2]}")
    grey = Image.fromarray(rng.integers(0, 256, (50, 44), dtype=np.uint8))
    grey.save(folder / "more/grey.png")
    clear = Image.fromarray(rng.integers(0, 256, (33, 50, 4), dtype=np.uint8))
    clear.save(folder / "more/clear.png")
    clear.convert("RGB").quantize(16).save(folder / "more/palette.png", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(
        folder / "more/turned.jpg", exif=exif
    )
    return folder


@pytest.fixture(scope="module")
def run_dir(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that a run has of its network: retrain/0/model.pt and export/0.onnx."""
    folder = tmp_path_factory.mktemp("run")
    supernet = SPACE.supernet(seed=1).eval()
    subnet, arch = SPACE.extract(supernet, "largest").eval(), SPACE.architecture("largest")
    crops = np.stack([cropped(path) for path in pictures(photos)])
    recalibrate_bn(subnet, crops, batch_size=8)
    model, exported = str(folder / "retrain/0/model.pt"), str(folder / "export/0.onnx")
    checkpoint.save_subnet(model, SPACE.space, arch, subnet, classes=CLASSES, background=GROUND)
    write_onnx(
        SPACE.space, arch, subnet, exported, classes=CLASSES, check_images=crops, background=GROUND
    )
    return folder


def cropped(path: Path) -> np.ndarray:
    """The pixels that training evaluates: uint8 (3, 32, 32)."""
    return eval_transform(32)(decode(path.read_bytes(), GROUND)).numpy()


def expected(run_dir: Path, paths: list[Path]) -> np.ndarray:
    """The logits of training's own crops."""
    pixels = np.stack([cropped(path) for path in paths]).astype(np.float32) / 255
    session = onnxruntime.InferenceSession(run_dir / "export/0.onnx")
    (logits,) = session.run(["logits"], {"images": pixels})
    return logits


def pictures(photos: Path) -> list[Path]:
    return sorted(path for path in photos.rglob("*.*g"))


def invoke(*arguments: Any, **options: Any) -> Any:
    return CliRunner().invoke(main, ["predict", *map(str, arguments)], **options)


def test_the_pixels_are_those_of_the_evaluation_and_torch_is_not_loaded(
    run_dir: Path, photos: Path
):
    program = (
        "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None\n"
        "from nasray.cli.main import main; main()"
    )
    command = [sys.executable, "-c", program, "predict", str(run_dir), str(photos)]
    ended = subprocess.run([*command, "--top", "4", "--json"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [each["image"] for each in found] == list(map(str, pictures(photos)))
    probabilities = torch.tensor(expected(run_dir, pictures(photos))).double().softmax(1).numpy()
    for each, row in zip(found, probabilities, strict=True):
        by_name = {one["class"]: one["probability"] for one in each["classes"]}
        assert [by_name[name] for name in CLASSES] == pytest.approx(row.tolist(), abs=1e-6)
        assert list(by_name.values()) == sorted(by_name.values(), reverse=True)
    assert probabilities.max(axis=1).std() > 0.01


def test_a_model_pt_and_its_export_agree(run_dir: Path, photos: Path):
    by_torch, by_onnxruntime = (
        list(nasray.predict(run_dir / path, photos, batch_size=3))
        for path in ("retrain/0/model.pt", "export/0.onnx")
    )
    assert len(by_torch) == len(by_onnxruntime) == 9
    for one, other in zip(by_torch, by_onnxruntime, strict=True):
        assert one["image"] == other["image"]
        assert one["classes"][0]["class"] == other["classes"][0]["class"]
        assert one["classes"][0]["probability"] == pytest.approx(
            other["classes"][0]["probability"], abs=1e-4
        )


def test_the_snippet_of_the_docs_computes_the_same(
    run_dir: Path, photos: Path, capsys: pytest.CaptureFixture[str]
):
    for path, logits in zip(pictures(photos), expected(run_dir, pictures(photos)), strict=True):
        names: dict[str, Any] = {}
        exec(SNIPPET.replace("RUN_DIR", str(run_dir)).replace("PHOTO", str(path)), names)
        np.testing.assert_allclose(names["logits"][0], logits, rtol=1e-5, atol=1e-6)
        assert np.array_equal(names["crop"](path), cropped(path))
        assert capsys.readouterr().out.strip() == CLASSES[logits.argmax()]


def test_what_cannot_be_read_is_named_with_its_reason_and_counted(
    run_dir: Path, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "cut.jpg").write_bytes((photos / "1.jpg").read_bytes()[:500])
    (tmp_path / "text.png").write_text("none")
    (tmp_path / "notes.txt").write_text("none")
    (tmp_path / "link").symlink_to("nowhere.jpg")
    (tmp_path / "round").symlink_to(tmp_path)
    (tmp_path / "no_suffix").write_bytes((photos / "2.png").read_bytes())
    given = [tmp_path, photos / "0.png", tmp_path / "absent.jpg"]
    result = invoke(run_dir, *given, "--csv")
    assert result.exit_code == 1
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [Path(row["image"]).name for row in rows] == [
        *("cut.jpg", "link", "no_suffix", "text.png", "0.png", "absent.jpg")
    ]
    assert [bool(row["error"]) for row in rows] == [True, True, False, True, False, True]
    assert rows[4]["class"] in CLASSES and 0.25 <= float(rows[4]["probability"]) <= 1
    assert f"{tmp_path}/absent.jpg: No such file or directory" in result.stderr
    assert "text.png: no image that Pillow reads" in result.stderr
    assert f"{tmp_path}/link: behind a broken link -> nowhere.jpg" in result.stderr
    assert "4 of 6 images cannot be read" in result.stderr
    assert f"No images: {tmp_path}/notes.txt, {tmp_path}/round\n" in caplog.text


def test_the_list_of_standard_input_may_hold_names_in_any_bytes(
    run_dir: Path, photos: Path, tmp_path: Path
):
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    with open(odd, "wb") as file:
        file.write((photos / "0.png").read_bytes())
    result = invoke(run_dir, "-", input=odd + b"\n\n" + os.fsencode(photos / "2.png") + b"\n")
    assert (result.exit_code, result.stderr) == (0, "")
    assert [line.split(b"  ")[0] for line in result.stdout_bytes.splitlines()] == [
        *(odd, os.fsencode(photos / "2.png"))
    ]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("absent.onnx", "absent.onnx does not exist; give an .onnx file, a model.pt or a run"),
        ("damaged.onnx", "damaged.onnx: not a readable ONNX file"),
        ("empty", "empty holds no trained network"),
        ("damaged.pt", "damaged.pt is not a readable checkpoint"),
        ("files", "files is no run directory; name the file, such as "),
    ],
)
def test_a_model_that_is_none_is_one_line(name: str, complaint: str, tmp_path: Path, photos: Path):
    for folder in ("empty", "files"):
        (tmp_path / folder).mkdir()
    (tmp_path / "files/model.pt").write_bytes(b"")
    for damaged in ("damaged.onnx", "damaged.pt"):
        (tmp_path / damaged).write_bytes(b"damaged")
    with pytest.raises(UserError, match=re.escape(complaint)):
        nasray.predict(tmp_path / name, photos)


def test_no_images_and_no_number_are_refused(run_dir: Path, tmp_path: Path):
    with pytest.raises(UserError, match="no images: name files, or folders"):
        nasray.predict(run_dir, tmp_path)
    with pytest.raises(UserError, match="top = 0"):
        nasray.predict(run_dir, tmp_path, top=0)
    result = invoke(run_dir, tmp_path, "--json", "--csv")
    assert result.exit_code == 1 and "give one of the two" in result.stderr
