"""A subnet is exported by hand with BN statistics of the images in a folder."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

import nasray
from nasray.data.transforms import normalize
from nasray.errors import UserError
from nasray.evaluation.evaluate import bn_layers
from nasray.pipeline import export_subnet

SPACE = nasray.space("tiny", num_classes=4, resolution=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images of one grey each, 0, 20, ... 120; beside them what is none."""
    folder = tmp_path / "photos"
    for number in range(7):
        path = folder / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number)
        pixels = np.uint8(20 * number) + rng.integers(0, 9, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "notes.txt").write_text("none")
    (folder / "class0" / "._0.png").write_text("of a file manager")
    return folder


def greys(folder: Path) -> list[int]:
    """The grey of each image that is read, divided by 20."""
    pixels = export_subnet._pixels(str(folder), 32)
    assert pixels.dtype == np.uint8 and pixels.shape[1:] == (3, 32, 32)
    return (pixels.mean(axis=(1, 2, 3)) / 20).astype(int).tolist()


def test_the_file_computes_with_the_statistics_of_the_images(folder: Path, tmp_path: Path):
    supernet = SPACE.supernet(seed=1).eval()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    path = tmp_path / "net.onnx"
    found = SPACE.export(supernet, "largest", path, images=folder, classes=list("abcd"))
    assert found["file"] == str(path) and found["top1_agreement"] == 1.0
    assert found["num_images"] == found["num_calibration_images"] == 7
    assert all(torch.equal(before[name], each) for name, each in supernet.state_dict().items())

    # All images are one batch, so its own statistics are those of all of them.
    pixels = export_subnet._pixels(str(folder), 32)
    subnet = SPACE.extract(supernet, "largest").eval()
    for layer in bn_layers(subnet):
        layer.train()
    with torch.no_grad():
        expected = subnet(normalize(torch.from_numpy(pixels))).numpy()
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": pixels.astype(np.float32) / 255})
    np.testing.assert_allclose(logits, expected, atol=1e-4 * np.abs(expected).max())
    with torch.no_grad():
        inherited = supernet(normalize(torch.from_numpy(pixels)), SPACE.architecture("largest"))
    assert np.abs(inherited.numpy() - expected).max() > 0.1 * np.abs(expected).max()

    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert json.loads(metadata["classes"]) == list("abcd")
    assert json.loads(metadata["arch"]) == SPACE.describe("largest")
    assert json.loads(metadata["costs"])["macs"] == SPACE.costs("largest")["macs"]
    options = {key: json.loads(metadata["space_options"])[key] for key in ("resolution",)}
    assert (metadata["space"], options) == ("tiny", {"resolution": 32})


def test_of_many_images_some_of_every_class_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    assert greys(folder) == [0, 2, 4, 6, 1, 3, 5]  # in the order of their paths
    monkeypatch.setattr(export_subnet, "MOST_IMAGES", 3)
    assert greys(folder) == [0, 6, 5]


def test_classes_have_numbers_without_names(folder: Path, tmp_path: Path):
    SPACE.export(SPACE.supernet(), "largest", tmp_path / "net.onnx", images=folder)
    metadata = {each.key: each.value for each in onnx.load(tmp_path / "net.onnx").metadata_props}
    assert json.loads(metadata["classes"]) == ["0", "1", "2", "3"]


def test_mistakes_are_one_line_and_write_nothing(folder: Path, tmp_path: Path):
    supernet, path = SPACE.supernet(), tmp_path / "net.onnx"

    def complaint(**options) -> str:
        with pytest.raises(UserError) as refused:
            SPACE.export(supernet, "largest", path, **{"images": folder} | options)
        assert not path.exists() and "\n" not in str(refused.value)
        return str(refused.value)

    assert "2 names, but the supernet has 4 classes" in complaint(classes=["a", "b"])
    assert "nothing': a folder with 0 images" in complaint(images=tmp_path / "nothing")
    damaged = folder / "class1" / "2.png"
    damaged.write_bytes(b"no image")
    assert complaint().startswith(f"{damaged} cannot be decoded (") and "remove it" in complaint()
