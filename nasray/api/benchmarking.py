"""Exported files side by side: size, accuracy as measured at their export, and speed here."""

import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nasray.api.prediction import AnyPath, onnx_session
from nasray.api.runs import RunDirectory
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import layout

logger = logging.getLogger(__name__)

ROUNDS = 5  # in each of which every file is timed
THROUGHPUT_BATCH = 32


def benchmark(
    models: AnyPath | Iterable[AnyPath],
    *,
    threads: int = 1,
    cpus: str = "",
    host: str = "",
    pythons: Mapping[str, str] | None = None,
) -> list[dict[str, Any]]:
    """Time exported networks: ONNX files in turn, then those of other runtimes one by one.

    A row for each file: "file", "format", "runtime", "precision", "bytes", "top1" (a fraction, None
    if the file does not say), "num_val_images", "drop" (of top-1 to the float32 file on the same
    images, points; None likewise), "ms" (of one image) and "images_per_s" (in batches of 32). The
    lower quartile over rounds, in which all ONNX files take turns, for other work on the machine
    slows some rounds down. What else a run exported is timed for one image, by one thread and here
    alone: its "images_per_s" is None, and "ms" is None where its runtime is missing, of which a
    warning tells.

    Args:
        models: .onnx files of `nasray export`, or run directories for all that they exported.
        threads: of each file.
        cpus: the cores to run on, e.g. "4-7"; empty for any.
        host: where to run, by ssh, e.g. "user@board"; empty for this machine.
        pythons: by format, the Python of an environment that has its runtime; otherwise this one.

    Raises:
        UserError: there is no such file, it cannot be run there, or onnxruntime is absent.
    """
    from nasray.costs.latency_timing import Setup, place_at, time_in_turn

    Setup(runtime="onnxruntime", threads=threads, cpus=cpus)  # checks that it can be measured
    from nasray.formats import FORMATS

    if unknown := [name for name in pythons or () if name not in FORMATS]:
        raise UserError(f"pythons.{unknown[0]}: there are {', '.join(FORMATS)}")
    given = [models] if isinstance(models, str | os.PathLike) else list(models)
    files = [file for model in given for file in _files(os.fspath(model))]
    contents = [storage.read(file) for file in files]
    found = [_said(file, content) for file, content in zip(files, contents, strict=True)]
    times = []
    for batch_size in (1, THROUGHPUT_BATCH):
        setup = Setup(runtime="onnxruntime", threads=threads, cpus=cpus, batch_size=batch_size)
        with place_at(host, setup) as place:
            times.append(time_in_turn(contents, setup, ROUNDS, place=place))
    one, many = (np.quantile(each, 0.25, axis=0) for each in times)
    rows = [
        said | {"ms": float(ms), "images_per_s": 1000 * THROUGHPUT_BATCH / float(batch_ms)}
        for said, ms, batch_ms in zip(found, one, many, strict=True)
    ]
    folders = [os.fspath(model) for model in given if not os.fspath(model).endswith(".onnx")]
    elsewhere = {name: python for each in folders for name, python in _pythons(each).items()}
    elsewhere.update(pythons or {})
    others = [each for folder in folders for each in _others(folder)]
    if others and (host or cpus or threads > 1):
        names = ", ".join(file for file, _ in others)
        logger.warning("host, cpus and threads are for ONNX files only; not timed: %s", names)
        return rows
    return rows + [_timed(file, said, elsewhere) for file, said in others]


def _others(run_dir: str) -> list[tuple[str, dict[str, Any]]]:
    """What the run exported in other formats that have a runtime: each file, and its check."""
    return [
        (each["file"], each)
        for each in RunDirectory(run_dir).exports()
        if "runtime" in each and "format" in each and storage.exists(each["file"])
    ]


def _pythons(run_dir: str) -> dict[str, str]:
    """export.pythons of the job of a run."""
    path = storage.join(run_dir, layout.JOB)
    job = storage.read_json(path) if storage.exists(path) else {}
    return job.get("job", {}).get("export", {}).get("pythons", {})


def _timed(file: str, said: dict[str, Any], pythons: Mapping[str, str]) -> dict[str, Any]:
    """The row of a file of another format, timed where its runtime is."""
    from nasray.formats import run_elsewhere

    name, side = said["format"], int(said["input"]["crop"])
    noise = np.random.default_rng(0).random((2, 3, side, side), dtype=np.float32)
    found: dict[str, Any] = {"runtime": said["runtime"], "ms": None}
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, os.path.basename(file))
        local.write_bytes(storage.read(file))
        try:
            found = run_elsewhere(name, local, noise, pythons.get(name, ""))
        except UserError as error:
            logger.warning("%s is not timed: %s", file, error)
    return {
        "file": file,
        "format": name,
        "runtime": found["runtime"],
        "precision": said["precision"],
        "bytes": said["bytes"],
        "top1": None,  # logits were compared, on a hundred images
        "num_val_images": 0,
        "drop": None,
        "ms": found["ms"],
        "images_per_s": None,
    }


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
    import onnxruntime

    if isinstance(session.get_inputs()[0].shape[0], int):
        raise UserError(f"{file}: takes batches of one size only; export it with a free first one")
    said = session.get_modelmeta().custom_metadata_map
    top1, whole = (said.get(key) for key in ("val_top1", "fp32_val_top1"))
    return {
        "file": file,
        "format": "onnx",
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "precision": said.get("precision", "fp32"),
        "bytes": len(content),
        "top1": None if top1 is None else float(top1),
        "num_val_images": int(said.get("num_val_images", 0)),
        "drop": None if whole is None or top1 is None else 100 * (float(whole) - float(top1)),
    }
