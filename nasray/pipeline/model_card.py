"""The model card of an exported network: what it is, and what its files were measured to do."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nasray.pipeline.run import Run
from nasray.storage import files as storage
from nasray.storage import layout

MOST_CLASSES = 50  # that are named
HEADER = ("file", "precision", "runtime", "MB", "top-1", "ms", "largest difference of a logit")
SHIPPED = {  # where the weights are from, by what result.json says
    "supernet": "The weights are the supernet's, its BN statistics recalibrated.",
    "scratch": "The weights were trained from scratch.",
    "fine-tuned": "The weights are the supernet's, trained further.",
}


def write_card(run: Run, name: str) -> str:
    """Write RUN/export/<name>.md, of the network `name` and all its files; return its path."""
    folder = run.path(layout.EXPORT)
    checks = [each for each in storage.list_numbered(folder) if each.endswith(".json")]
    said = [storage.read_object(storage.join(folder, each), "file", "bytes") for each in checks]
    files = [each for each in said if layout.network_of(each["file"]) == name]
    result = storage.read_json(run.path(layout.retrained(name, layout.RESULT)))
    path = run.path(layout.exported(name, "md"))
    storage.write(path, "\n".join(_lines(run, name, result, files)).encode())
    return path


def _lines(
    run: Run, name: str, result: Mapping[str, Any], files: Sequence[Mapping[str, Any]]
) -> list[str]:
    data, classes = run.job.data, run.dataset.classes
    more = f" and {len(classes) - MOST_CLASSES} more" if len(classes) > MOST_CLASSES else ""
    place = f", {data.path.rstrip('/').rsplit('/', 1)[-1]}" if data.path else ""
    alone = [each["file"] for each in files if each["file"].endswith((".tflite", ".pte"))]
    weights = SHIPPED.get(result.get("shipped", ""))
    images, top1 = result["num_val_images"], result["val_top1"]
    error = 100 * math.sqrt(top1 * (1 - top1) / images)
    described = next(each for each in files if "input" in each)["input"]
    return [
        f"# Network {name} of {run.folder.rstrip('/').rsplit('/', 1)[-1]}",
        "",
        "An image classifier, found by nasray.",
        "",
        f"- Architecture: `{run.job.space.name}`, `{json.dumps(result['arch'])}`",
        f"- Costs: {_costs(result['costs'])}",
        f"- Classes, {len(classes)}: {', '.join(classes[:MOST_CLASSES])}{more}",
        f"- Data: {data.source}{place}",
        f"- Top-1: {top1:.1%} of {images:,} validation images, standard error {error:.1f} points",
        *([f"- {weights}"] if weights else []),
        f"- Input: float32 (batch, 3, {described['crop']}, {described['crop']}), RGB from 0 to 1"
        f"{', of .tflite and .pte one image at a time' if alone else ''}",
        f"- How an image becomes it: {described['preprocessing']}",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + "---|" * len(HEADER),
        *("| " + " | ".join(_row(each, top1)) + " |" for each in files),
        "",
        "ms: of one image with one thread, when the file was made; `nasray benchmark RUN_DIR` "
        "times the files in turn.",
        "Written by `nasray export RUN_DIR`; top-1 is of the ONNX files, and the others compute "
        "what the float32 network does.",
        "",
    ]


def _costs(costs: Mapping[str, float]) -> str:
    return (
        f"{costs['params'] / 1e6:.3f} M parameters, {costs['macs'] / 1e6:.1f} M "
        f"multiply-accumulates, MicroNet score {costs['micronet_score']:.4f} at float32"
    )


def _row(file: Mapping[str, Any], top1: float) -> list[str]:
    """A row of the table of files; `top1` is the network's in float32.

    Older files do not say how fast they were.
    """
    left = ", ".join(file.get("float_blocks", ()))
    return [
        f"`{file['file'].rsplit('/', 1)[-1]}`",
        file.get("precision", "fp32") + (f", but {left}" if left else ""),
        file.get("runtime", "torch, by nasray" if file.get("format") == "weights" else "-"),
        f"{file['bytes'] / 1e6:.2f}",
        "-" if "format" in file else f"{file.get('val_top1', top1):.1%}",
        f"{file['ms']:.3f}" if "ms" in file else "-",
        f"{file['max_abs_diff']:.2g}" if "max_abs_diff" in file else "-",
    ]
