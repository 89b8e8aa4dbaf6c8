"""Networks and blocks as ONNX files to be timed, in fp32 or int8.

Their weights are initial ones, and what int8 is calibrated with is noise: neither changes what is
computed, only the numbers it is done with.
"""

import io
import os
import re
import tempfile
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.onnx import symbolic_helper

from nasray.errors import UserError

# The first version whose int8 convolutions stand weights of very different sizes per channel:
# their int32 biases overflowed before.
INT8_SINCE = (1, 20, 1)
CALIBRATION_IMAGES = 2


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
    """Quantise an ONNX file: weights int8 and symmetric, by channel; activations uint8."""
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    rng = np.random.default_rng(0)
    images = [{"input": rng.random(shape, dtype=np.float32)} for _ in range(CALIBRATION_IMAGES)]
    with tempfile.TemporaryDirectory() as folder:
        exported, prepared, quantised = (
            os.path.join(folder, f"{name}.onnx") for name in ("exported", "prepared", "quantised")
        )
        with open(exported, "wb") as file:
            file.write(content)
        # Equal tensors, as all biases of an initial network are, are exported once and copied by
        # nodes. Without this step the quantiser does not take those for biases, and leaves a
        # float convolution that unpacks its weights in every run: 10 times as slow.
        quant_pre_process(exported, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared,
            quantised,
            SimpleNamespace(get_next=partial(next, iter(images), None)),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        with open(quantised, "rb") as file:
            return file.read()
