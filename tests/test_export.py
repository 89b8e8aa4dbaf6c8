"""The exported file computes what the network computes, and stands alone."""

import json
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torchvision.models import mobilenet_v3_small, shufflenet_v2_x0_5

from nasray import __version__
from nasray.errors import UserError
from nasray.export import ExportError, check_logits, export_onnx
from nasray.storage import files as storage

CLASSES = ("ant", "bee", "cat", "dog", "emu", "fox", "gnu")
SIDE = 64  # pixels


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 4, 1)
        self.excite = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        return x * nn.functional.hardsigmoid(self.excite(hidden))


class ShuffleNet(nn.Module):
    """The operations of the ShuffleNet space in one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.shuffle = nn.ChannelShuffle(2)
        self.branch = nn.Sequential(
            nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            SqueezeExcite(8),
        )
        self.head = nn.Linear(16, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, changed = self.shuffle(self.stem(x)).chunk(2, dim=1)
        return self.head(torch.cat([kept, self.branch(changed)], dim=1).mean((2, 3)))


class OtherWhenExported(nn.Module):
    """A network whose exported graph is not the one it runs."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.network, self.offset = ShuffleNet(), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.network(x)
        return logits + self.offset if torch.compiler.is_exporting() else logits


def settle(network: nn.Module) -> nn.Module:
    """Give BN layers statistics of real activations, and leave the network training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _ in range(3):
            network.train()(torch.randn(8, 3, SIDE, SIDE, generator=generator))
    return network


def export(network: nn.Module, path: str, **changes) -> dict:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, SIDE, SIDE), dtype=np.uint8)
    arguments = {
        "resolution": SIDE,
        "classes": CLASSES,
        "metadata": {"space": "shufflenet", "arch": "0-8-0-7"},
        "check_images": images,
    }
    return export_onnx(network, path, **(arguments | changes))


@pytest.mark.parametrize("build", [ShuffleNet, shufflenet_v2_x0_5, mobilenet_v3_small])
def test_onnxruntime_computes_the_logits_of_torch_from_unnormalised_images(build, tmp_path):
    torch.manual_seed(0)
    network = settle(build() if build is ShuffleNet else build(num_classes=len(CLASSES)))
    path = str(tmp_path / "net.onnx")
    result = export(network, path)

    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, SIDE, SIDE)).astype(np.float32)
    mean = np.array([123.68, 116.779, 103.939], np.float32).reshape(3, 1, 1)
    std = np.array([58.393, 57.12, 57.375], np.float32).reshape(3, 1, 1)
    with torch.no_grad():
        expected = network.eval()(torch.from_numpy((pixels - mean) / std)).numpy()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {"images": pixels / 255})
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())

    assert result["max_abs_diff"] <= 1e-4 * np.abs(expected).max()
    assert (result["num_images"], result["top1_agreement"]) == (5, 1.0)


def test_the_file_stands_alone_and_says_what_it_is(tmp_path):
    path = str(tmp_path / "net.onnx")
    result = export(ShuffleNet(), path)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert (result["file"], result["bytes"]) == (path, len(storage.read(path)))

    file = onnx.load(path)
    onnx.checker.check_model(file)
    found = {entry.key: entry.value for entry in file.metadata_props}
    assert "to 74 pixels" in found["preprocessing"] and "64 x 64" in found["preprocessing"]
    assert {key: value for key, value in found.items() if key != "preprocessing"} == {
        "space": "shufflenet",
        "arch": "0-8-0-7",
        "classes": json.dumps(CLASSES),
        "nasray": __version__,
        "resolution": str(SIDE),
        "resize": "74",
        "crop": str(SIDE),
        "interpolation": "bilinear",
        "color_order": "RGB",
        "scale": "1/255",
        "normalization": "inside the graph",
        "mean": "[0.48502, 0.457957, 0.407604]",
        "std": "[0.228992, 0.224, 0.225]",
        "background": "white",
    }
    assert result["input"].items() <= found.items()
    assert (file.ir_version, result["opset"]) <= (9, 20)  # onnxruntime 1.17 reads no later ones
    assert [(opset.domain, opset.version) for opset in file.opset_import] == [("", result["opset"])]
    (images,), (logits,) = file.graph.input, file.graph.output
    sizes = [size.dim_param or size.dim_value for size in images.type.tensor_type.shape.dim]
    assert (images.name, sizes) == ("images", ["batch", 3, SIDE, SIDE])
    sizes = [size.dim_param or size.dim_value for size in logits.type.tensor_type.shape.dim]
    assert (logits.name, sizes) == ("logits", ["batch", len(CLASSES)])


def test_the_callers_model_is_left_as_it_was(tmp_path):
    network = settle(ShuffleNet())
    before = {name: value.clone() for name, value in network.state_dict().items()}
    export(network, str(tmp_path / "net.onnx"))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_an_export_goes_to_a_uri(tmp_path):
    uri = (tmp_path / "export" / "0.onnx").as_uri()
    assert export(ShuffleNet(), uri)["file"] == uri
    assert (tmp_path / "export" / "0.onnx").exists()


def test_a_file_that_computes_something_else_is_refused_and_removed(tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"an older export")
    with pytest.raises(ExportError, match=r"net\.onnx: onnxruntime differs from torch by 0\.01"):
        export(OtherWhenExported(0.01), str(path))
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_not_numbers_are_refused():
    logits = np.array([[1.0, 2.0], [3.0, 4.0]])
    with pytest.raises(ExportError, match="differs"):
        check_logits(logits, np.array([[1.0, np.nan], [3.0, 4.0]]))


def test_another_class_is_refused_where_the_margin_is_clear_only():
    # Largest logit 10,000: a tolerance of 1.
    expected = np.array([[1e4, 0.0], [5.0, 6.5]])
    with pytest.raises(ExportError, match="class of 1 of 2 images"):
        check_logits(expected, np.array([[1e4, 0.0], [5.9, 5.6]]))
    expected[1] = 5.5, 5.9
    agreement = check_logits(expected, np.array([[1e4, 0.0], [5.9, 5.6]]))
    assert agreement["top1_agreement"] == 0.5


def test_a_wrong_number_of_classes_is_refused(tmp_path):
    with pytest.raises(UserError, match="2 classes, but the model has 7"):
        export(ShuffleNet(), str(tmp_path / "net.onnx"), classes=("ant", "bee"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs {package}: pip install '\.\[export\]'"):
        export(ShuffleNet(), str(tmp_path / "net.onnx"))
