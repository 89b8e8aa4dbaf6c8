"""A trained network for other runtimes than onnxruntime, each file checked by its own runtime.

Runtimes and converters exclude one another, so that each may be in an environment of its own:
runtimes.py is started there. All are made of the torch.export program: converters of ONNX to
TFLite guess the order of dimensions, and fail where there are as many channels as pixels.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nasray import runtimes
from nasray.errors import UserError
from nasray.export import check_logits
from nasray.spaces import describe
from nasray.spaces.space import Architecture, Space


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file: its suffix, what runs it, and what installs all that makes and runs it."""

    suffix: str
    runtime: str  # of runtimes.RUNTIMES
    packages: str  # pip's; empty: nasray has them
    converted: bool = False  # by a package of the other environment


FORMATS = {
    "pt2": Format("pt2", "torch", ""),
    "openvino": Format("onnx", "openvino", "openvino"),  # which reads the ONNX file
    "tflite": Format("tflite", "litert", "litert-torch", converted=True),
    "executorch": Format("pte", "executorch", "executorch torch", converted=True),
}


def write_format(
    name: str, network: nn.Module, images: np.ndarray, python: str, onnx: bytes, said: Any
) -> tuple[bytes, dict[str, Any]]:
    """Return `network` as a file of the format `name`, and its check against torch.

    Args:
        name: of FORMATS.
        network: takes images of values in 0..1; on the CPU, in eval mode.
        images: uint8 (n, 3, side, side), n >= 2, on which the classes must be the same.
        python: of the environment that has the format's packages; empty: this one.
        onnx: the network's ONNX file, which OpenVINO reads.
        said: what a .pt2 file holds of itself, as JSON.

    Raises:
        ExportError: the file does not compute what the network computes.
        UserError: the environment lacks a package.
    """
    wanted = FORMATS[name]
    pixels = images.astype(np.float32) / 255
    with torch.inference_mode():
        expected = network(torch.from_numpy(pixels)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        program, target = Path(folder, "program.pt2"), Path(folder, f"model.{wanted.suffix}")
        if name == "openvino":
            target.write_bytes(onnx)
        else:
            _export_program(network, images.shape[-1], program, said)
        if wanted.converted:
            _start(name, python, "convert", program, wanted.runtime, images.shape[-1], target)
        elif name == "pt2":
            program.rename(target)
        found = run_elsewhere(name, target, pixels, python)
        check = check_logits(expected, found.pop("logits"), wanted.runtime)
        return target.read_bytes(), check | found


def require_formats(formats: Iterable[str], pythons: Mapping[Any, str]) -> None:
    """Check that what a job asks for can be made, before hours of work.

    Raises:
        UserError: a format's packages are missing in its environment.
    """
    for name in formats:
        if name in FORMATS and (FORMATS[name].packages or name in pythons):  # else nasray's own
            _start(name, pythons.get(name, ""), "check", FORMATS[name].runtime)


def run_elsewhere(name: str, model: Path, images: np.ndarray, python: str) -> dict[str, Any]:
    """The "logits" of float32 `images` by the runtime of format `name`, its "version" and "ms"."""
    runtime = FORMATS[name].runtime
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "images.npy"), Path(folder, "logits.npy")
        np.save(source, images)
        printed = _start(name, python, "run", model, runtime, source, target)
        logits = np.load(target)
    said = json.loads(printed.splitlines()[-1])
    return {"logits": logits, "runtime": f"{runtime} {said['version']}", "ms": said["ms"]}


def _start(name: str, python: str, *arguments: object) -> str:
    """Run runtimes.py by `python`; return what it printed.

    Raises:
        UserError: there is no such Python, or it lacks a package.
    """
    # Isolated, for what nasray finds by PYTHONPATH is not of the other environment.
    interpreter = [python, "-I"] if python else [sys.executable]
    command = [*interpreter, runtimes.__file__, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise UserError(
            f"{name}: {python}: {error.strerror}; name a python3 by export.pythons.{name} of the "
            f"job or by `nasray export RUN_DIR --python {name}=PYTHON`"
        ) from None
    if done.returncode < 0:
        raise UserError(f"{name}: {command[0]} was ended by signal {-done.returncode}")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise UserError(f"{name}: {lines[-1]}{_how_to_install(name, python, lines[-1])}")
    return done.stdout


def _how_to_install(name: str, python: str, said: str) -> str:
    packages = FORMATS[name].packages or "torch"
    if "No module named" not in said:
        return ""
    if python:
        return f"; {python} -m pip install {packages}"
    return (
        f"; python3 -m venv {name}-env && {name}-env/bin/pip install {packages}, then "
        f"`nasray export RUN_DIR --python {name}={name}-env/bin/python`, or the same in "
        "export.pythons of the job"
    )


def _export_program(network: nn.Module, side: int, path: Path, said: Any) -> None:
    """Write the torch.export program of `network`, for batches of any size."""
    # Two images, because torch takes a traced dimension of 1 for a constant.
    example = (torch.zeros(2, 3, side, side),)
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(network, example, dynamic_shapes=shapes)
    torch.export.save(program, path, extra_files={"nasray.json": json.dumps(said)})


def describe_network(space: Space, arch: Architecture) -> dict[str, Any]:
    """What the network of `arch` is, for JSON: its space, the architecture, and each block."""
    blocks = [
        {"kind": type(block).__name__, **dataclasses.asdict(block)}  # type: ignore[call-overload]
        for block in space.decode(arch)
        if block is not None
    ]
    return {"space": describe(space), "arch": space.to_json(arch), "blocks": blocks}
