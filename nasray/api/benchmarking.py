"""ONNX files side by side: size, accuracy as measured at their export, and speed here."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from nasray.api.prediction import AnyPath, onnx_session
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import layout

ROUNDS = 5  # in each of which every file is timed
THROUGHPUT_BATCH = 32


def benchmark(
    models: AnyPath | Iterable[AnyPath], *, threads: int = 1, cpus: str = "", host: str = ""
) -> list[dict[str, Any]]:
    """Time exported networks in turn, with onnxruntime.

    A row for each file: "file", "precision", "bytes", "top1" (a fraction, None if the file does not
    say), "num_val_images", "drop" (of top-1 to the float32 file on the same images, points; None
    likewise), "ms" (of one image) and "images_per_s" (in batches of 32). The lower quartile over
    rounds, in which all files take turns, for other work on the machine slows some rounds down.

    Args:
        models: .onnx files of `nasray export`, or run directories for all that they exported.
        threads: of each file.
        cpus: the cores to run on, e.g. "4-7"; empty for any.
        host: where to run, by ssh, e.g. "user@board"; empty for this machine.

    Raises:
        UserError: there is no such file, it cannot be run there, or onnxruntime is absent.
    """
    from nasray.costs.latency_timing import Setup, place_at, time_in_turn

    Setup(runtime="onnxruntime", threads=threads, cpus=cpus)  # checks that it can be measured
    given = [models] if isinstance(models, str | os.PathLike) else models
    files = [file for model in given for file in _files(os.fspath(model))]
    contents = [storage.read(file) for file in files]
    found = [_said(file, content) for file, content in zip(files, contents, strict=True)]
    times = []
    for batch_size in (1, THROUGHPUT_BATCH):
        setup = Setup(runtime="onnxruntime", threads=threads, cpus=cpus, batch_size=batch_size)
        with place_at(host, setup) as place:
            times.append(time_in_turn(contents, setup, ROUNDS, place=place))
    one, many = (np.quantile(each, 0.25, axis=0) for each in times)
    return [
        said | {"ms": float(ms), "images_per_s": 1000 * THROUGHPUT_BATCH / float(batch_ms)}
        for said, ms, batch_ms in zip(found, one, many, strict=True)
    ]


def _files(model: str) -> Sequence[str]:
    """The ONNX file `model`, or those that the run directory `model` exported.

    Raises:
        UserError: there is none.
    """
    if model.endswith(".onnx"):
        if not storage.exists(model):
            raise UserError(f"{model} does not exist")
        return [model]
    folder = storage.join(model, layout.EXPORT)
    names = [name for name in storage.list_numbered(folder) if name.endswith(".onnx")]
    if not names:
        raise UserError(
            f"{model} is no .onnx file and has none in {layout.EXPORT}/; `nasray export` of a run "
            "directory writes them"
        )
    networks = list(dict.fromkeys(map(layout.network_of, names)))  # shorter names are first
    ordered = sorted(names, key=lambda name: networks.index(layout.network_of(name)))
    return [storage.join(folder, name) for name in ordered]


def _said(file: str, content: bytes) -> dict[str, Any]:
    """What an ONNX file says of itself.

    Raises:
        UserError: it is damaged.
    """
    session = onnx_session(file, content)
    if isinstance(session.get_inputs()[0].shape[0], int):
        raise UserError(f"{file}: takes batches of one size only; export it with a free first one")
    said = session.get_modelmeta().custom_metadata_map
    top1, whole = (said.get(key) for key in ("val_top1", "fp32_val_top1"))
    return {
        "file": file,
        "precision": said.get("precision", "fp32"),
        "bytes": len(content),
        "top1": None if top1 is None else float(top1),
        "num_val_images": int(said.get("num_val_images", 0)),
        "drop": None if whole is None or top1 is None else 100 * (float(whole) - float(top1)),
    }
