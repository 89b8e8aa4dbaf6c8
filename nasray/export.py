"""Write a trained network as one ONNX file, and check that the file computes the same.

The file is complete: it holds the weights, the normalisation of the input, the class names and
how an image becomes an input, so that it reaches elsewhere the accuracy that was measured here.
Imports no Ray; the packages of the [export] extra are imported when they are needed.
"""

import copy
import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from nasray.data.crop import MEAN, STD, short_side
from nasray.data.decoding import DEFAULT_BACKGROUND
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.version import __version__

logger = logging.getLogger(__name__)

# Of ONNX 1.15, which onnxruntime reads from 1.17 on.
OPSET, IR_VERSION = 20, 9
# The largest allowed difference of a logit, relative to the largest logit. float32 rounds at 6e-8;
# another order of sums over some 100 layers makes that 1e-7 to 1e-5, while a layer that differs
# (in its epsilon, padding or activation) makes 1e-3 and more.
TOLERANCE = 1e-4
CHECK_BATCH_SIZE = 32


class ExportError(RuntimeError):
    """The exported file does not compute what the network computes."""


class Normalised(nn.Module):
    """A network with its input normalisation: takes RGB images of values in 0..1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1) / 255)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1) / 255)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network((images - self.mean) / self.std)


def export_onnx(
    model: nn.Module,
    path: str,
    *,
    resolution: int,
    classes: Sequence[str],
    metadata: dict[str, str],
    check_images: np.ndarray,  # uint8 (N, 3, resolution, resolution), RGB, N >= 2
    background: str = DEFAULT_BACKGROUND,
) -> dict[str, Any]:
    """Write `model` to `path` (a file or a URI) if onnxruntime computes the same.

    The ONNX input "images" is float32 (batch, 3, resolution, resolution), RGB in 0..1; the output
    "logits" is (batch, classes). The file's metadata are `metadata` and input_metadata(). Returns
    what export/<name>.json holds.

    Raises:
        ExportError: onnxruntime and torch disagree; then no file is at `path`.
        UserError: a package is missing, or `classes` are not as many as the model has.
    """
    assert check_images.dtype == np.uint8 and check_images.shape[1:] == (3, resolution, resolution)
    assert len(check_images) >= 2, "one image cannot show that batches work"
    require_packages(path)
    # A copy, because the caller's model must keep its mode, device and type.
    network = Normalised(copy.deepcopy(model).float().cpu()).eval()
    expected = _in_batches(_run_torch(network), check_images)
    if expected.shape[1] != len(classes):
        raise UserError(f"{path}: {len(classes)} classes, but the model has {expected.shape[1]}")
    properties = {"classes": json.dumps(list(classes)), "nasray": __version__}
    how_to_feed = input_metadata(resolution, background)
    content = _to_onnx(network, resolution, metadata | properties | how_to_feed)
    try:
        agreement = check_logits(expected, _run_onnx(content, check_images))
    except ExportError as error:
        storage.remove(path)  # lest an older export be taken for this one
        raise ExportError(f"{path}: {error}") from None
    storage.write(path, content)
    logger.info("%s: %.1f MB, %s", path, len(content) / 1e6, agreement)
    return {
        "file": path,
        "bytes": len(content),
        **agreement,
        "num_images": len(check_images),
        "opset": OPSET,
        "input": how_to_feed,
    }


def input_metadata(resolution: int, background: str = DEFAULT_BACKGROUND) -> dict[str, str]:
    """How an image becomes the input of an exported network; docs/deploy.md explains the keys."""
    short = short_side(resolution)
    return {
        "preprocessing": (
            f"Decode to upright RGB, transparent parts on {background}. Scale the short side to "
            f"{short} pixels, the long side in proportion and rounded down, with Pillow's BILINEAR "
            f"(antialiased). Cut {resolution} x {resolution} out of the center. Divide by 255. "
            "Order as batch, channel, row, column. The graph subtracts mean and divides by std."
        ),
        "resolution": str(resolution),
        "resize": str(short),
        "crop": str(resolution),
        "interpolation": "bilinear",
        "color_order": "RGB",
        "scale": "1/255",
        "normalization": "inside the graph",
        "mean": json.dumps([round(value / 255, 6) for value in MEAN]),
        "std": json.dumps([round(value / 255, 6) for value in STD]),
        "background": background,
    }


def check_logits(
    expected: np.ndarray, found: np.ndarray, runtime: str = "onnxruntime"
) -> dict[str, float]:
    """Compare logits (images, classes): the largest difference and the share of equal classes.

    Raises:
        ExportError: logits differ by more than TOLERANCE, or a class that is clear.
    """
    scale = float(np.abs(expected).max())
    tolerance = TOLERANCE * scale
    difference = float(np.abs(found - expected).max())
    if not difference <= tolerance:  # "not": a NaN is a difference too
        raise ExportError(
            f"{runtime} differs from torch by {difference:.3g} in logits of up to {scale:.3g} "
            f"(tolerance {tolerance:.3g}); nothing was exported"
        )
    same = found.argmax(axis=1) == expected.argmax(axis=1)
    second, first = np.sort(expected, axis=1)[:, -2:].T
    clear = first - second > tolerance
    if not same[clear].all():
        raise ExportError(
            f"{runtime} and torch disagree on the class of {np.sum(~same & clear)} of "
            f"{len(same)} images; nothing was exported"
        )
    return {"max_abs_diff": difference, "top1_agreement": float(same.mean())}


def require_packages(what: str) -> None:
    """Check that the packages for writing ONNX are installed, as `what` needs them.

    Raises:
        UserError: one is missing.
    """
    for name in ("onnx", "onnxruntime", "onnxscript"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{what} needs {name}: pip install '.[export]' in nasray's folder")


def _to_onnx(network: nn.Module, resolution: int, metadata: dict[str, str]) -> bytes:
    # Two images, because torch takes a traced dimension of 1 for a constant.
    example = torch.zeros(2, 3, resolution, resolution)
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.model.metadata_props.update(metadata)
    program.model.ir_version = IR_VERSION
    return program.model_proto.SerializeToString()


def _run_onnx(content: bytes, images: np.ndarray) -> np.ndarray:
    """Logits by onnxruntime, of the first image alone and the others in batches."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(batch: np.ndarray) -> np.ndarray:
        return session.run(["logits"], {"images": batch})[0]

    return np.concatenate([_in_batches(run, images[:1]), _in_batches(run, images[1:])])


def _run_torch(network: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    @torch.inference_mode()
    def run(batch: np.ndarray) -> np.ndarray:
        return network(torch.from_numpy(batch)).numpy()

    return run


def _in_batches(run: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
    starts = range(0, len(images), CHECK_BATCH_SIZE)
    batches = (images[start : start + CHECK_BATCH_SIZE] for start in starts)
    return np.concatenate([run(batch.astype(np.float32) / 255) for batch in batches])
