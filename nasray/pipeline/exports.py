"""The networks of a run as files: ONNX in float32, smaller precisions, and other formats."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import ValidationError

from nasray import checkpoint
from nasray.config import ExportConfig
from nasray.data.splits import JobImages
from nasray.errors import UserError
from nasray.pipeline.export_formats import Trained, export_formats, is_export_of
from nasray.pipeline.export_subnet import CHECKED_IMAGES, write_onnx
from nasray.pipeline.model_card import write_card
from nasray.pipeline.run import Run
from nasray.progress import progress
from nasray.quantize import logits, quantise, to_float16, with_metadata
from nasray.runtimes import milliseconds, open_onnxruntime
from nasray.search.scores import balanced_top1, top1
from nasray.storage import files as storage
from nasray.storage import layout

# What an exported file says of its accuracy, of result.json.
MEASURED = ("shipped", "val_top1", "val_balanced_top1", "num_val_images")
CALIBRATION_IMAGES = 300  # of training, for the ranges of int8


def export(run: Run, **given: Any) -> list[dict[str, Any]]:
    """Write each network of RUN/retrain/ as ONNX, checked against torch on validation images.

    In float32, and in the precisions and formats of the job's [export] or those `given` instead, a
    smaller precision measured on all validation images. The check of RUN/export/<k>.onnx is in
    <k>.json, that of <k>-int8.onnx in <k>-int8.json, and the model card in <k>.md; what is returned
    also says where each file lies. An export is made again if its network is another one by now, or
    `max_drop`, points of top-1.
    """
    run.dataset  # noqa: B018  opened to be checked
    config = _asked(run.job.export, given)
    wanted = [each for each in config.precisions if each != "fp32"]
    files = {}
    for name in storage.list_numbered(run.path(layout.RETRAIN)):
        if not storage.exists(run.path(layout.retrained(name, layout.RESULT))):
            continue  # still being trained
        files[name] = [_in_float32(run, name)]
        files[name] += _in_precisions(run, name, wanted, config.max_drop)
        write_card(run, name)
    if not files:
        raise UserError(f"{run.folder} has no retrained model; run `nasray retrain` first")
    # Last, for they need other packages, and each network has its ONNX file and its card by now.
    for name, made in files.items() if config.formats else ():
        made += export_formats(Trained(run, name), config.formats, config.pythons)
        write_card(run, name)
    return [file for made in files.values() for file in made]


def _asked(config: ExportConfig, given: Mapping[str, Any]) -> ExportConfig:
    """The job's [export] with what is given instead.

    Raises:
        UserError: a value is none of those that there are.
    """
    pythons = {**config.pythons, **given.get("pythons", {})}
    try:
        return ExportConfig.model_validate({**config.model_dump(), **given, "pythons": pythons})
    except ValidationError as error:
        wrong = error.errors()[0]
        key = ".".join(part for part in wrong["loc"] if isinstance(part, str))
        raise UserError(f"{key} = {wrong['input']!r}: {wrong['msg']}") from None


def _in_float32(run: Run, name: str) -> dict[str, Any]:
    done, model = (run.path(layout.exported(name, suffix)) for suffix in ("json", "onnx"))
    weights = run.path(layout.retrained(name, layout.MODEL))
    if not is_export_of(weights, done, model):
        space, arch, subnet, extra = checkpoint.load_subnet(weights)
        resolution = space.resolution_of(arch)
        images, _ = JobImages(run.job, run.data_path, resolution).first_validation(CHECKED_IMAGES)
        result = storage.read_json(run.path(layout.retrained(name, layout.RESULT)))
        measured = {key: result[key] for key in MEASURED if key in result}
        storage.remove(done)
        found = write_onnx(
            space,
            arch,
            subnet,
            model,
            classes=extra["classes"],
            check_images=images,
            background=run.job.data.background,
            measured=measured,
        )
        # No path of a run stands in its files, for a run may be moved.
        found |= measured | {"precision": "fp32", "file": layout.exported(name, "onnx")}
        found |= _speed(storage.read(model), images)
        storage.write_json(done, found | {"model": checkpoint.digest(weights)})
    return storage.read_object(done, "file", "bytes") | {"file": model}


def _in_precisions(
    run: Run, name: str, precisions: Sequence[str], max_drop: float
) -> list[dict[str, Any]]:
    """Write RUN/export/<name>.onnx in each of `precisions` in which it is not there yet."""
    whole = run.path(layout.exported(name, "onnx"))
    files = {}
    for precision in precisions:
        own = f"{name}-{precision}"
        files[precision] = (
            run.path(layout.exported(own, "json")),
            run.path(layout.exported(own, "onnx")),
        )
    asked = {each: {"max_drop": max_drop} if each == "int8" else {} for each in precisions}
    missing = [each for each in precisions if not is_export_of(whole, *files[each], asked[each])]
    if missing:
        content = storage.read(whole)
        fed = storage.read_json(run.path(layout.exported(name, "json")))["input"]
        images = JobImages(run.job, run.data_path, int(fed["crop"]))
        before = logits(content, images.validation[0])
    for precision in missing:
        done, made = files[precision]
        said: dict[str, Any] = {"precision": precision}
        if precision == "int8":
            calibration, holdout = images.calibration(CALIBRATION_IMAGES), images.holdout
            with progress(f"{name}, int8", 100) as show:
                found = quantise(content, calibration, *holdout, max_drop=max_drop / 100, show=show)
            changed = found.content
            said |= {"float_blocks": list(found.float_blocks), "holdout_drop": found.drop}
        else:
            changed = to_float16(content)
        said |= _difference(before, logits(changed, images.validation[0]), images.validation[1])
        changed = with_metadata(changed, said)
        storage.remove(done)  # lest it be taken for that of the file to come
        storage.write(made, changed)
        said |= {"file": layout.exported(f"{name}-{precision}", "onnx"), "bytes": len(changed)}
        said |= asked[precision] | _speed(changed, images.validation[0])
        storage.write_json(done, said | {"model": checkpoint.digest(whole)})
    return [
        storage.read_object(done, "file", "bytes") | {"file": made} for done, made in files.values()
    ]


def _difference(before: np.ndarray, after: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """How the logits (n, classes) of validation images differ after a change of precision."""
    correct = [found.argmax(axis=1) == labels for found in (before, after)]
    return {
        "max_abs_diff": float(np.abs(after - before).max()),
        "top1_agreement": float((after.argmax(axis=1) == before.argmax(axis=1)).mean()),
        "num_images": len(labels),
        "num_val_images": len(labels),
        "fp32_val_top1": top1(correct[0], labels),
        "val_top1": top1(correct[1], labels),
        "val_balanced_top1": balanced_top1(correct[1], labels),
    }


def _speed(content: bytes, images: np.ndarray) -> dict[str, Any]:
    """How long onnxruntime takes for one of `images`, uint8 (n, 3, side, side), with one thread."""
    import onnxruntime

    network = open_onnxruntime(content)
    ms = milliseconds(network, images[:1].astype(np.float32) / 255)
    return {"runtime": f"onnxruntime {onnxruntime.__version__}", "ms": ms}
