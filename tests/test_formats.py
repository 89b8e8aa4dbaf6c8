"""Exported networks of other formats, and all formats where there is nothing but their runtime."""

import importlib.metadata
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import nasray
from nasray import runtimes
from nasray.checkpoint import save_subnet
from nasray.errors import UserError
from nasray.evaluation.evaluate import recalibrate_bn
from nasray.export import ExportError, Normalised
from nasray.formats import FORMATS, describe_network, run_elsewhere, write_format
from nasray.pipeline.export_subnet import write_onnx
from nasray.quantize import quantise, to_float16
from nasray.spaces.population import as_architectures, random_population

SIDE, NUM_IMAGES = 32, 100
CLASSES = [f"class {number}" for number in range(10)]
# What each runtime is without anything else; numpy is how images get there.
RUNTIMES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino numpy",
    "torch": "torch numpy",
    "litert": "ai-edge-litert numpy",
    "executorch": "executorch torch",
}


def pictures(number: int = NUM_IMAGES) -> np.ndarray:
    """Smooth pictures, which tell the classes of an untrained network apart better than noise."""
    small = np.random.default_rng(0).integers(0, 256, (number, 3, 4, 4), dtype=np.uint8)
    return small.repeat(SIDE // 4, axis=2).repeat(SIDE // 4, axis=3)


def network_of(name: str) -> tuple[Any, Any, torch.nn.Module]:
    """A space, an architecture and its network, BN statistics included; weights are random."""
    options: dict[str, Any] = {"resolutions": [SIDE]} if name.startswith(("ofa", "mb")) else {}
    designed = nasray.space(name, num_classes=10, resolution=SIDE, **options)
    space = designed.space
    [arch] = as_architectures(random_population(space.genes, 1, np.random.default_rng(3)))
    subnet = designed.supernet().extract(arch)
    recalibrate_bn(subnet, pictures(), batch_size=50)
    return space, arch, subnet.eval()


@torch.inference_mode()
def classes_by_torch(network: torch.nn.Module, images: np.ndarray) -> np.ndarray:
    return Normalised(network).eval()(torch.from_numpy(images)).argmax(1).numpy()


def test_a_pt2_file_computes_what_the_network_does_in_batches_of_any_size(tmp_path: Path):
    space, arch, network = network_of("tiny")
    said = {"classes": CLASSES}
    content, check = write_format("pt2", Normalised(network).eval(), pictures(), "", b"", said)
    assert check["top1_agreement"] == 1 and check["ms"] > 0
    assert check["runtime"] == f"torch {importlib.metadata.version('torch')}"
    path = tmp_path / "model.pt2"
    path.write_bytes(content)
    extra = {"nasray.json": ""}
    module = torch.export.load(path, extra_files=extra).module()
    assert json.loads(extra["nasray.json"]) == said
    images = pictures(7).astype(np.float32) / 255
    with torch.inference_mode():
        found = module(torch.from_numpy(images)).argmax(1).numpy()
    np.testing.assert_array_equal(found, classes_by_torch(network, images))


def test_a_file_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch):
    _, _, network = network_of("tiny")

    def shifted(name: str, model: Path, images: np.ndarray, python: str) -> dict[str, Any]:
        found = run_elsewhere(name, model, images, python)
        return found | {"logits": found["logits"] + 0.01}

    monkeypatch.setattr("nasray.formats.run_elsewhere", shifted)
    with pytest.raises(ExportError, match="torch differs from torch by 0.01"):
        write_format("pt2", Normalised(network).eval(), pictures(), "", b"", {})


def test_a_missing_package_is_told_with_what_installs_it(tmp_path: Path):
    _, _, network = network_of("tiny")
    arguments = (Normalised(network).eval(), pictures())
    venv.create(tmp_path / "empty", with_pip=False)
    python = str(tmp_path / "empty/bin/python")
    with pytest.raises(UserError, match=f"{python} -m pip install openvino"):
        write_format("openvino", *arguments, python, b"", {})
    with pytest.raises(UserError, match=r"tflite: gone: No such file.*--python tflite=PYTHON"):
        write_format("tflite", *arguments, "gone", b"", {})


def test_weights_and_their_description_are_the_network(tmp_path: Path):
    space, arch, network = network_of("shufflenet")
    path = tmp_path / "0.pt"
    save_subnet(str(path), space, arch, network, classes=CLASSES)
    state = torch.load(path, weights_only=True)["state"]
    said = json.loads(json.dumps(describe_network(space, arch)))
    assert len(said["blocks"]) == len(list(network))
    assert {name.split(".")[0] for name in state} <= {each["name"] for each in said["blocks"]}
    options = {key: value for key, value in said["space"].items() if key != "name"}
    again = nasray.space(said["space"]["name"], **options)
    assert again.architecture(said["arch"]) == arch
    images = pictures().astype(np.float32) / 255
    with torch.inference_mode():
        found = nasray.load(path)(torch.from_numpy(images)).argmax(1).numpy()
    np.testing.assert_array_equal(found, classes_by_torch(network, images))


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """python_with(packages) -> the Python of a new environment that holds these, and no more."""
    made: dict[str, str] = {}

    def python_with(packages: str) -> str:
        if packages not in made:
            folder = tmp_path_factory.mktemp("environment")
            venv.create(folder, with_pip=True)
            python = f"{folder}/bin/python"
            install = [python, "-m", "pip", "install", "-q", *packages.split()]
            done = subprocess.run(install, capture_output=True, text=True)
            if "No matching distribution" in done.stderr:
                pytest.skip(f"pip finds no {packages} here")
            assert done.returncode == 0, done.stderr[-2000:]
            made[packages] = python
        return made[packages]

    return python_with


def logits_in(python: str, runtime: str, model: Path, images: np.ndarray) -> np.ndarray:
    """What `runtime` computes in an environment, from whose point of view there is no nasray."""
    source, target = model.with_suffix(".images.npy"), model.with_suffix(".logits.npy")
    np.save(source, images)
    command = [python, "-I", runtimes.__file__, "run", str(model), runtime, source, target]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return np.load(target)


@pytest.mark.slow
@pytest.mark.parametrize("space", ["shufflenet", "ofa_mobilenetv3", "mbconv"])
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_finds_the_same_classes_where_there_is_only_its_runtime(
    environments: Any, tmp_path: Path, space: str, name: str
):
    made_by, (design, arch, network) = FORMATS[name], network_of(space)
    file = tmp_path / "0.onnx"
    write_onnx(design, arch, network, str(file), classes=CLASSES, check_images=pictures())
    python = environments(made_by.packages) if made_by.packages else sys.executable
    content, _ = write_format(
        name, Normalised(network).eval(), pictures(), python, file.read_bytes(), {}
    )
    model = tmp_path / f"model.{made_by.suffix}"
    model.write_bytes(content)
    images = pictures().astype(np.float32) / 255
    found = logits_in(environments(RUNTIMES[made_by.runtime]), made_by.runtime, model, images)
    np.testing.assert_array_equal(found.argmax(1), classes_by_torch(network, images))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_each_onnx_file_finds_the_same_classes_where_there_is_only_onnxruntime(
    environments: Any, tmp_path: Path, precision: str
):
    space, arch, network = network_of("shufflenet")
    file, images = tmp_path / "0.onnx", pictures().astype(np.float32) / 255
    write_onnx(space, arch, network, str(file), classes=CLASSES, check_images=pictures())
    content, labels = file.read_bytes(), classes_by_torch(network, images)
    if precision == "fp16":
        content = to_float16(content)
    elif precision == "int8":
        content = quantise(content, pictures(), pictures(), labels, max_drop=1.0).content
    file.write_bytes(content)
    found = logits_in(environments(RUNTIMES["onnxruntime"]), "onnxruntime", file, images)
    here = onnxruntime.InferenceSession(content).run(["logits"], {"images": images})[0]
    np.testing.assert_array_equal(found.argmax(1), here.argmax(1))
    if precision != "int8":  # whose accuracy says something of trained networks only
        assert (found.argmax(1) == labels).mean() >= (1.0 if precision == "fp32" else 0.95)


@pytest.mark.slow
def test_weights_are_a_network_where_nasray_is_installed(environments: Any, tmp_path: Path):
    space, arch, network = network_of("shufflenet")
    images = pictures().astype(np.float32) / 255
    save_subnet(str(tmp_path / "0.pt"), space, arch, network, classes=CLASSES)
    np.save(tmp_path / "images.npy", images)
    program = (
        "import nasray, numpy, torch\n"
        "images = torch.from_numpy(numpy.load('images.npy'))\n"
        "with torch.inference_mode():\n"
        "    numpy.save('classes.npy', nasray.load('0.pt')(images).argmax(1).numpy())\n"
    )
    python = environments(str(Path(nasray.__file__).parents[1]))
    subprocess.run([python, "-I", "-c", program], check=True, cwd=tmp_path)
    np.testing.assert_array_equal(
        np.load(tmp_path / "classes.npy"), classes_by_torch(network, images)
    )
