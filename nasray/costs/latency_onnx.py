"""Networks and blocks as ONNX files to be timed, in fp32 or int8.

Their weights are initial ones, and what int8 is calibrated with is noise: neither changes what is
computed, only the numbers it is done with.
"""

import io
import re
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.onnx import symbolic_helper

from nasray.errors import UserError
from nasray.quantize import Quantiser

# The first version whose int8 convolutions stand weights of very different sizes per channel:
# their int32 biases overflowed before.
INT8_SINCE = (1, 20, 1)
CALIBRATION_BATCHES = 2


def require_int8() -> None:
    """Check that ONNX files can be quantised here.

    Raises:
        UserError: onnxruntime is too old.
    """
    import onnxruntime

    found = onnxruntime.__version__
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < INT8_SINCE:
        raise UserError(
            f"precision = 'int8' needs onnxruntime 1.20.1 or newer, this is {found}: pip install "
            "-U onnxruntime"
        )


def to_onnx(network: nn.Module, shape: tuple[int, ...], precision: str) -> bytes:
    """The ONNX file of `network`, in eval mode, for an input of `shape`, with BN folded."""
    content = io.BytesIO()
    torch.onnx.register_custom_op_symbolic("aten::channel_shuffle", _channel_shuffle, 9)
    with warnings.catch_warnings():
        # The old exporter: for blocks without branches it writes the same, 60 times as fast.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(shape),),
            content,  # type: ignore[arg-type]
            input_names=["input"],
            dynamo=False,
        )
    return content.getvalue() if precision == "fp32" else _to_int8(content.getvalue(), shape)


def _channel_shuffle(graph: Any, features: Any, groups: Any) -> Any:
    """What the old exporter lacks of ShuffleNet, with the operations that the new one writes."""
    n, channels, height, width = features.type().sizes()
    num = symbolic_helper._get_const(groups, "i", "groups")
    shapes = [n, num, channels // num, height, width], [n, channels, height, width]
    split, joined = (graph.op("Constant", value_t=torch.tensor(shape)) for shape in shapes)
    swapped = graph.op("Transpose", graph.op("Reshape", features, split), perm_i=[0, 2, 1, 3, 4])
    return graph.op("Reshape", swapped, joined).setType(features.type())


def _to_int8(content: bytes, shape: tuple[int, ...]) -> bytes:
    """Quantise an ONNX file as `nasray export` does."""
    size = (CALIBRATION_BATCHES * shape[0], *shape[1:])
    images = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return Quantiser(content, images).quantised()
