"""An exported network in integers of 8 bits or in float16, for onnxruntime.

onnxruntime computes an operation in integers only if every tensor around it is quantised and it
has a kernel for that operation, and converts to float and back wherever one lacks. So the graph
is written first in operations that have such kernels (with_integer_kernels), then quantised
statically by onnxruntime.quantization: activations as uint8, weights as int8 per output channel.
Biases stay 32 bits, as sums do. The whole network but the normalisation of its input is then
computed in integers, which NNCF's placement of the same quantisers does not reach: convolutions
stay float where an activation function follows them.
"""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

# What is computed in integers. What a network of nasray has besides stays float.
OPERATIONS = (
    *("Add", "AveragePool", "Clip", "Concat", "Conv", "Gemm", "GlobalAveragePool", "MatMul"),
    *("MaxPool", "Mul", "Relu", "Reshape", "Split", "Transpose"),
)
# Quantiles of a tensor's values: the few beyond are clipped, for they would coarsen all steps.
OUTERMOST = (0.0001, 0.9999)
BATCH_SIZE = 32
SENSITIVITY_IMAGES = 128  # on which one block alone in integers is compared with float


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A network in integers, and what it costs in accuracy."""

    content: bytes  # the ONNX file
    float_blocks: tuple[str, ...]  # computed in float32, lest the accuracy fall further
    drop: float  # of top-1, a fraction, on the images given to quantise()


def quantise(
    content: bytes,
    calibration: np.ndarray,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    max_drop: float,
    show: Callable[[int, str], None] = lambda done, text: None,
) -> Quantised:
    """The ONNX file `content` in integers of 8 bits, its top-1 at most `max_drop` lower.

    If it falls further, blocks stay float: a number that suffices, found by bisection, of those
    first which, alone in integers, change the probabilities of the classes most.

    Args:
        calibration: training images that the ranges of tensors are taken from, uint8
            (n, 3, side, side).
        images: labelled images on which the drop is measured, uint8 (m, 3, side, side); not the
            validation images, if blocks are chosen by them.
        labels: their classes, int64 (m,).
        max_drop: a fraction of 1.
        show: called with what is done, of 100, and a text.
    """
    show(0, "ranges")
    quantizer = Quantiser(content, calibration)
    expected = logits(content, images)
    top1 = _top1(expected, labels)

    def attempt(float_blocks: Sequence[str]) -> Quantised:
        made = quantizer.quantised(float_blocks=float_blocks)
        drop = top1 - _top1(logits(made, images), labels)
        return Quantised(content=made, float_blocks=tuple(float_blocks), drop=drop)

    show(30, "all blocks")
    best = attempt(())
    if best.drop <= max_drop:
        return best
    few = images[:SENSITIVITY_IMAGES]
    change = {}
    for index, block in enumerate(quantizer.blocks):
        show(40 + 50 * index // len(quantizer.blocks), block)
        others = [other for other in quantizer.blocks if other != block]
        found = logits(quantizer.quantised(float_blocks=others), few)
        change[block] = _divergence(expected[: len(few)], found)
    ordered = sorted(change, key=lambda block: -change[block])
    low, high = 0, len(ordered)  # so many float blocks: too few, enough
    best = attempt(ordered)
    while high - low > 1:
        middle = (low + high) // 2
        tried = attempt(ordered[:middle])
        if tried.drop <= max_drop:
            high, best = middle, tried
        else:
            low = middle
        show(100 - 10 * (high - low) // len(ordered), f"{high} of {len(ordered)} blocks float")
    return best


def logits(content: bytes, images: np.ndarray) -> np.ndarray:
    """The logits of images, uint8 (n, 3, side, side), by an ONNX file: float32 (n, classes)."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    starts = range(0, len(images), BATCH_SIZE)
    batches = (images[start : start + BATCH_SIZE].astype(np.float32) / 255 for start in starts)
    return np.concatenate([session.run(["logits"], {"images": batch})[0] for batch in batches])


def _top1(found: np.ndarray, labels: np.ndarray) -> float:
    return float((found.argmax(axis=1) == labels).mean())


def _divergence(expected: np.ndarray, found: np.ndarray) -> float:
    """The mean Kullback-Leibler divergence of the probabilities of two sets of logits."""
    first, second = (_log_probabilities(each.astype(np.float64)) for each in (expected, found))
    return float((np.exp(first) * (first - second)).sum(axis=1).mean())


def _log_probabilities(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def to_float16(content: bytes) -> bytes:
    """The ONNX file `content` with float16 weights and operations; its input and output stay."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16

    converted = convert_float_to_float16(onnx.load_from_string(content), keep_io_types=True)
    return converted.SerializeToString()


def with_metadata(content: bytes, said: Mapping[str, Any]) -> bytes:
    """The ONNX file `content`, which also says `said`: texts, and other values as JSON."""
    import onnx

    model = onnx.load_from_string(content)
    texts = {key: v if isinstance(v, str) else json.dumps(v) for key, v in said.items()}
    onnx.helper.set_model_props(
        model, {each.key: each.value for each in model.metadata_props} | texts
    )
    return model.SerializeToString()


class Quantiser:
    """Quantises one ONNX file, calibrated once.

    `content` has one input, of which float32 images of values in 0..1 are expected. `images`,
    uint8 (n, channels, side, side), are of training: the ranges of all tensors are taken from
    them. If the file has a batch of one size, n is a multiple of it.
    """

    def __init__(self, content: bytes, images: np.ndarray) -> None:
        import onnx
        from onnxruntime.quantization.shape_inference import quant_pre_process

        model = with_integer_kernels(onnx.load_from_string(content))
        with tempfile.TemporaryDirectory() as folder:
            given, prepared = (os.path.join(folder, name) for name in ("given", "prepared"))
            onnx.save(model, given)
            # Folds what is constant, and names the shapes of tensors.
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            self.model = onnx.load(prepared)
            self.ranges = _ranges(prepared, images, folder)
        self.blocks = _blocks(self.model)

    def quantised(self, *, float_blocks: Collection[str] = ()) -> bytes:
        """The file in integers, but for the blocks `float_blocks`, names of `blocks`."""
        import onnx
        from onnxruntime.quantization import QDQQuantizer, QuantType

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        excluded = [name for block in float_blocks for name in self.blocks[block]]
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=False,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=self.ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=excluded,
            op_types_to_quantize=sorted(OPERATIONS),
            extra_options={},
        )
        quantizer.quantize_model()
        quantizer.model.topological_sort()
        return without_constant_factors(quantizer.model.model).SerializeToString()


def with_integer_kernels(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """`model` in operations that onnxruntime has integer kernels for; it computes the same.

    - HardSigmoid(x) becomes Clip(x / 6 + 1/2, 0, 1), HardSwish(x) the product of x and that: the
      addition saturates where its result is quantised to 0..1, so that the Clip goes; x / 6 is
      another scale of the same integers, see without_constant_factors().
    - The mean over height and width becomes GlobalAveragePool.
    - The channel shuffle transposes the last axis, for integer convolutions work with channels
      last, and onnxruntime lets the other transpositions cancel each other.
    """
    from onnx import checker, helper, numpy_helper

    for node in [node for node in model.graph.node if node.op_type == "Constant"]:
        # So that the constants below are all there are, whichever exporter wrote the file.
        [tensor] = [a for a in node.attribute if a.name == "value"] or [None]
        if tensor is not None:
            value = helper.get_attribute_value(tensor)
            value.name = node.output[0]
            model.graph.initializer.append(value)
            model.graph.node.remove(node)
    constants = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    graph = _Graph(model)
    nodes = list(model.graph.node)
    while nodes:
        node = nodes.pop(0)
        parameters = constants.get(node.input[1]) if len(node.input) > 1 else None
        if _is_hard_sigmoid(node):
            graph.add_hard_sigmoid(node)
        elif _is_spatial_mean(node, parameters):
            graph.add("GlobalAveragePool", node.input[:1], node.output[0])
        elif _is_shuffle([node, *nodes[:2]], parameters):
            shuffled = nodes[1].output[0]
            graph.add_shuffle(node.input[0], parameters, shuffled)
            del nodes[:2]
        else:
            graph.nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(graph.nodes)
    _remove_unused(model.graph)
    checker.check_model(model)
    return model


class _Graph:
    """The nodes of a graph that is written anew; constants are added to `model`."""

    def __init__(self, model: "onnx.ModelProto") -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.constants: set[str] = set()

    def add(self, operation: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        from onnx import helper

        node = helper.make_node(operation, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def constant(self, values: Any, dtype: type = np.float32) -> str:
        from onnx import numpy_helper

        array = np.asarray(values, dtype)
        name = f"constant_{'_'.join(str(value) for value in array.ravel())}"
        if name not in self.constants:
            self.model.graph.initializer.append(numpy_helper.from_array(array, name))
            self.constants.add(name)
        return name

    def add_hard_sigmoid(self, node: "onnx.NodeProto") -> None:
        features, output = node.input[0], node.output[0]
        gate = output if node.op_type == "HardSigmoid" else f"{output}_gate"
        scaled = self.add("Mul", [features, self.constant(1 / 6)], f"{output}_scaled")
        added = self.add("Add", [scaled, self.constant(0.5)], f"{output}_added")
        self.add("Clip", [added, self.constant(0), self.constant(1)], gate)
        if node.op_type == "HardSwish":
            self.add("Mul", [features, gate], output)

    def add_shuffle(self, features: str, shape: np.ndarray, output: str) -> None:
        batch, groups, channels, height, width = shape.tolist()

        def sizes(*values: int) -> str:
            return self.constant(values, np.int64)

        last = self.add("Transpose", [features], f"{output}_last", perm=[0, 2, 3, 1])
        split = sizes(batch, height, width, groups, channels)
        grouped = self.add("Reshape", [last, split], f"{output}_grouped")
        mixed = self.add("Transpose", [grouped], f"{output}_mixed", perm=[0, 1, 2, 4, 3])
        joined = sizes(batch, height, width, channels * groups)
        whole = self.add("Reshape", [mixed, joined], f"{output}_whole")
        self.add("Transpose", [whole], output, perm=[0, 3, 1, 2])


def _is_hard_sigmoid(node: "onnx.NodeProto") -> bool:
    """Whether it is HardSwish, or HardSigmoid with torch's slope of 1/6, which is not ONNX's."""
    from onnx import helper

    said = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    is_torchs = abs(said.get("alpha", 0.2) - 1 / 6) < 1e-6 and said.get("beta", 0.5) == 0.5
    return node.op_type == "HardSwish" or (node.op_type == "HardSigmoid" and is_torchs)


def _is_spatial_mean(node: "onnx.NodeProto", axes: np.ndarray | None) -> bool:
    from onnx import helper

    said = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    over = said.get("axes") if axes is None else axes.tolist()  # an attribute before opset 18
    is_mean = node.op_type == "ReduceMean" and over is not None and said.get("keepdims", 1) == 1
    return is_mean and sorted(axis % 4 for axis in over) == [2, 3]


def _is_shuffle(nodes: "Sequence[onnx.NodeProto]", shape: np.ndarray | None) -> bool:
    """Whether `nodes` swap groups and channels: (batch, groups, channels, height, width)."""
    from onnx import helper

    if [node.op_type for node in nodes] != ["Reshape", "Transpose", "Reshape"]:
        return False
    [order] = [helper.get_attribute_value(a) for a in nodes[1].attribute if a.name == "perm"]
    return shape is not None and len(shape) == 5 and list(order) == [0, 2, 1, 3, 4]


def without_constant_factors(model: "onnx.ModelProto") -> "onnx.ModelProto":
    """`model`, quantised, with each product of a tensor and a constant as another scale of it.

    A quantised tensor times a constant is the same integers with their scale times the constant,
    which costs nothing: QuantizeLinear - DequantizeLinear(s) - Mul(c) - QuantizeLinear(s') -
    DequantizeLinear(s') becomes QuantizeLinear - DequantizeLinear(s c).
    """
    from onnx import numpy_helper

    graph = model.graph
    values = {each.name: each for each in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    for node in [node for node in graph.node if node.op_type == "Mul"]:
        before, factor = makers.get(node.input[0]), _constant(node.input[1], makers, values)
        users = [user for user in graph.node if node.output[0] in user.input]
        if factor is None or before is None or before.op_type != "DequantizeLinear":
            continue
        if len(users) != 1 or users[0].op_type != "QuantizeLinear" or factor <= 0:
            continue
        scale = numpy_helper.to_array(values[before.input[1]])
        name = f"{node.name}_times_{before.input[1]}"
        changed = numpy_helper.from_array((scale * factor).astype(np.float32), name)
        graph.initializer.append(changed)
        for user in [user for user in graph.node if users[0].output[0] in user.input]:
            user.input[0], user.input[1], user.input[2] = before.input[0], name, before.input[2]
        graph.node.remove(users[0])
        graph.node.remove(node)
    _remove_unused(graph)
    return model


def _constant(
    name: str, makers: "dict[str, onnx.NodeProto]", values: "dict[str, onnx.TensorProto]"
) -> float | None:
    """The value of a tensor that is one number, quantised or not; None if it is none."""
    from onnx import numpy_helper

    maker = makers.get(name)
    if name in values:
        value = numpy_helper.to_array(values[name])
    elif maker is not None and maker.op_type == "DequantizeLinear" and maker.input[0] in values:
        integers, scale, zero = (numpy_helper.to_array(values[each]) for each in maker.input)
        value = (integers.astype(np.float32) - zero.astype(np.float32)) * scale
    else:
        return None
    return float(value) if value.size == 1 else None


def _remove_unused(graph: "onnx.GraphProto") -> None:
    """Remove nodes and constants that no output needs; the nodes are in the order of running."""
    wanted = {output.name for output in graph.output}
    for node in reversed(list(graph.node)):
        if wanted.isdisjoint(node.output):
            graph.node.remove(node)
        else:
            wanted.update(node.input)
    for each in [each for each in graph.initializer if each.name not in wanted]:
        graph.initializer.remove(each)


def _blocks(model: "onnx.ModelProto") -> dict[str, list[str]]:
    """The names of the nodes of each block, in their order.

    A weight's name says of which block it is: network.<block>.<...>. What has no weights, such as
    an activation function, is of the block before it.
    """
    blocks: dict[str, list[str]] = {}
    block = ""
    for node in model.graph.node:
        named = [name.split(".")[1] for name in node.input if name.startswith("network.")]
        block = named[0] if named else block
        if block:
            blocks.setdefault(block, []).append(node.name)
    return blocks


def _ranges(path: str, images: np.ndarray, folder: str) -> Any:
    """The range of each tensor of the ONNX file at `path`, without its outliers.

    That is the mean over batches of `images`. onnxruntime's own histograms need bins of one size
    for all values, and fail where those are nearly the same.
    """
    from onnxruntime.quantization import CalibrationMethod, create_calibrator
    from onnxruntime.quantization.calibrate import TensorsData

    # It only makes every tensor an output.
    session = create_calibrator(
        path,
        sorted(OPERATIONS),
        augmented_model_path=os.path.join(folder, "augmented.onnx"),
        calibrate_method=CalibrationMethod.Percentile,
    ).infer_session
    [given] = session.get_inputs()
    names = [output.name for output in session.get_outputs()]
    size = given.shape[0] if isinstance(given.shape[0], int) else BATCH_SIZE
    found = []
    for start in range(0, len(images), size):
        batch = images[start : start + size].astype(np.float32) / 255
        tensors = session.run(None, {given.name: batch})
        found.append([np.quantile(tensor, OUTERMOST) for tensor in tensors])
    means = np.mean(found, axis=0, dtype=np.float32)
    ranges = {name: tuple(map(np.array, pair)) for name, pair in zip(names, means, strict=True)}
    return TensorsData(CalibrationMethod.MinMax, ranges)
