"""The networks of a run for other runtimes than onnxruntime: pt2, weights, OpenVINO and so on."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from nasray import checkpoint
from nasray.data.splits import JobImages
from nasray.export import Normalised, input_metadata
from nasray.formats import FORMATS, describe_network, write_format
from nasray.pipeline.run import Run
from nasray.progress import progress
from nasray.storage import files as storage
from nasray.storage import layout

WEIGHTS = "weights"  # a checkpoint of nasray's, with a description as JSON beside it
CHECKED_IMAGES = 100  # of validation, on which each file must find the same classes


class Trained:
    """One network of a run, loaded when something is to be made of it."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name = run, name
        self.weights = run.path(layout.retrained(name, layout.MODEL))
        self.onnx = run.path(layout.exported(name, "onnx"))

    @cached_property
    def loaded(self) -> tuple[Any, Any, nn.Module, dict[str, Any]]:
        """The space, the architecture, the network and the extra values of its file."""
        return checkpoint.load_subnet(self.weights)

    @property
    def resolution(self) -> int:
        """The side of the network's input, pixels."""
        space, arch, *_ = self.loaded
        return space.resolution_of(arch)

    @cached_property
    def images(self) -> np.ndarray:
        """The validation images on which files are checked: uint8 (n, 3, side, side)."""
        images = JobImages(self.run.job, self.run.data_path, self.resolution)
        return images.first_validation(CHECKED_IMAGES)[0]

    def says(self) -> dict[str, Any]:
        """What a file says of itself: its network, how an image becomes its input, its classes."""
        space, arch, _, extra = self.loaded
        background = self.run.job.data.background
        return describe_network(space, arch) | {
            "classes": list(extra["classes"]),
            "input": input_metadata(self.resolution, background),
        }


def export_formats(
    trained: Trained, formats: Sequence[str], pythons: Mapping[Any, str]
) -> list[dict[str, Any]]:
    """Write a network in each of `formats` in which it is not there yet; return their checks.

    The check of RUN/export/<k>.<suffix> is in <k>-<format>.json. `pythons` are those of the
    environments that have a format's packages, by format.
    """
    found = []
    for name in dict.fromkeys(formats):
        suffix = "pt" if name == WEIGHTS else FORMATS[name].suffix
        done = trained.run.path(layout.exported(f"{trained.name}-{name}", "json"))
        file = layout.exported(trained.name, suffix)
        source = trained.onnx if name == "openvino" else trained.weights
        if not is_export_of(source, done, trained.run.path(file)):
            storage.remove(done)
            with progress(f"{trained.name}, {name}", 1) as show:
                said = _write(trained, name, file, pythons.get(name, ""))
                show(1, "")
            digest = checkpoint.digest(source)
            storage.write_json(done, {"file": file, "format": name, "model": digest, **said})
        entry = storage.read_object(done, "file", "bytes")
        found.append(entry | {"file": trained.run.path(file)})
    return found


def _write(trained: Trained, name: str, file: str, python: str) -> dict[str, Any]:
    """Write one file; return what its JSON says."""
    says = trained.says()
    if name == WEIGHTS:
        content = storage.read(trained.weights)
        said: dict[str, Any] = says
    else:
        network = Normalised(trained.loaded[2]).eval()
        content, said = write_format(
            name, network, trained.images, python, storage.read(trained.onnx), says
        )
        said |= {"num_images": len(trained.images), "precision": "fp32", "input": says["input"]}
        said |= {"classes": says["classes"]}
    if name != "openvino":  # which reads the file that is there
        storage.write(trained.run.path(file), content)
    return {"bytes": len(content), **said}


def is_export_of(source: str, done: str, model: str, asked: dict[str, Any] | None = None) -> bool:
    """Whether `model` with its check `done` was made of the file `source` as it is, as `asked`."""
    if not (storage.exists(done) and storage.exists(model)):
        return False
    found = storage.read_object(done)
    if asked and any(found.get(key) != value for key, value in asked.items()):
        return False
    return not storage.exists(source) or found.get("model") == checkpoint.digest(source)
