"""A network in integers computes nearly what it computed, in integers throughout."""

import json
from collections import Counter, OrderedDict

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import nasray
from nasray.costs.latency_onnx import to_onnx
from nasray.export import export_onnx
from nasray.quantize import Quantiser, logits, quantise, to_float16, with_integer_kernels
from nasray.spaces.supernet import build_subnet
from tests.test_export import SqueezeExcite

CLASSES = ("ant", "bee", "cat", "dog", "emu")
SIDE = 32  # pixels
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 200, (48, 3, 1, 1))
IMAGES = (COLOURS + RNG.integers(0, 56, (48, 3, SIDE, SIDE))).astype(np.uint8)


class Shuffle(nn.Module):
    """The operations of a ShuffleNet's block."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.shuffle = nn.ChannelShuffle(2)
        self.branch = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.Hardswish(),
            SqueezeExcite(half),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept, changed = self.shuffle(x).chunk(2, dim=1)
        return torch.cat([kept, self.branch(changed)], dim=1)


class Inverted(nn.Module):
    """The operations of a MobileNet's block."""

    def __init__(self, channels: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 3 * channels, 1, bias=False),
            nn.BatchNorm2d(3 * channels),
            activation(),
            nn.Conv2d(3 * channels, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


class Head(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.output = nn.Linear(channels, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(x.mean((2, 3), keepdim=True).flatten(1))


class Fragile(nn.Module):
    """A convolution that adds a large value and one that takes it off again."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.add, self.take = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        with torch.no_grad():
            for conv, bias in ((self.add, 1000.0), (self.take, -1000.0)):
                conv.weight.copy_(torch.eye(channels)[:, :, None, None])
                conv.bias.fill_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.take(self.add(x))


def network(*blocks: tuple[str, nn.Module]) -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16))
    return nn.Sequential(OrderedDict([("stem", stem), *blocks, ("head", Head(16))]))


def exported(make, folder) -> bytes:
    torch.manual_seed(0)
    made = make()
    with torch.no_grad():
        for _ in range(5):
            made.train()(torch.randn(16, 3, SIDE, SIDE))
    path = str(folder / "net.onnx")
    export_onnx(
        made,
        path,
        resolution=SIDE,
        classes=CLASSES,
        metadata={"space": "tiny"},
        check_images=IMAGES[:4],
    )
    return open(path, "rb").read()


def shufflenet() -> nn.Module:
    return network(("first", Shuffle(16)), ("second", Shuffle(16)))


def mobilenet() -> nn.Module:
    return network(("first", Inverted(16, nn.ReLU6)), ("second", Inverted(16, nn.Hardswish)))


@pytest.fixture(scope="module", params=[shufflenet, mobilenet])
def content(request, tmp_path_factory) -> bytes:
    return exported(request.param, tmp_path_factory.mktemp("net"))


def as_run(content: bytes, folder) -> Counter:
    """The operations that onnxruntime runs, after its own optimisations."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "run.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "run.onnx").graph.node)


def test_in_operations_with_integer_kernels_it_computes_the_same(content):
    rewritten = with_integer_kernels(onnx.load_from_string(content))
    kinds = {node.op_type for node in rewritten.graph.node}
    assert kinds.isdisjoint({"HardSwish", "HardSigmoid", "ReduceMean"})
    expected = logits(content, IMAGES)
    found = logits(rewritten.SerializeToString(), IMAGES)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_everything_but_the_normalisation_is_computed_in_integers(content, tmp_path):
    found = as_run(Quantiser(content, IMAGES).quantised(), tmp_path)
    assert found["QuantizeLinear"] == 1  # of the input
    assert found["DequantizeLinear"] == 1  # of the logits
    floats = {"Conv", "FusedConv", "Gemm", "MatMul", "Add", "Mul", "Clip", "Relu", "HardSigmoid"}
    assert floats.isdisjoint(found)


def test_its_logits_are_those_of_float_within_the_steps_of_8_bits(content):
    expected = logits(content, IMAGES)
    found = logits(Quantiser(content, IMAGES).quantised(), IMAGES)
    assert 0 < np.abs(found - expected).mean() < 0.1 * expected.std()


def test_it_is_smaller_and_says_what_the_original_says(content):
    changed = Quantiser(content, IMAGES).quantised()
    said = {each.key: each.value for each in onnx.load_from_string(changed).metadata_props}
    assert said["space"] == "tiny" and json.loads(said["classes"]) == list(CLASSES)
    assert said["resolution"] == str(SIDE)


def test_float16_takes_and_gives_float32(content):
    changed = to_float16(content)
    expected, found = logits(content, IMAGES), logits(changed, IMAGES)
    assert found.dtype == np.float32 and len(changed) < len(content)
    np.testing.assert_allclose(found, expected, atol=0.02 * np.abs(expected).max())


def test_blocks_that_cost_accuracy_stay_float(tmp_path):
    """Integers lose what is left of a difference between large values; float32 does not."""

    def fragile() -> nn.Module:
        return network(("first", Inverted(16, nn.ReLU6)), ("outlier", Fragile(16)))

    content = exported(fragile, tmp_path)
    labels = logits(content, IMAGES).argmax(axis=1)
    assert len(set(labels.tolist())) > 1
    alone = quantise(content, IMAGES, IMAGES, labels, max_drop=1.0)
    assert alone.float_blocks == () and alone.drop > 0.2
    found = quantise(content, IMAGES, IMAGES, labels, max_drop=0.1)
    assert found.float_blocks == ("outlier",) and found.drop <= 0.1
    assert as_run(found.content, tmp_path)["QLinearConv"] > 0


def test_a_shuffle_that_the_other_exporter_wrote_is_rewritten_too():
    """It writes shapes as nodes; an int8 latency is to be that of the file that is shipped."""
    space = nasray.space("shufflenet", resolution=64, num_classes=5)
    blocks = space.space.decode(space.architecture("oneshot-s+"))
    block = [each for each in blocks if each is not None][2]
    shape = (1, block.in_channels, block.resolution, block.resolution)
    content = to_onnx(build_subnet([block]).eval(), shape, "fp32")
    rewritten = with_integer_kernels(onnx.load_from_string(content))
    orders = [
        list(onnx.helper.get_attribute_value(attribute))
        for node in rewritten.graph.node
        for attribute in node.attribute
        if node.op_type == "Transpose"
    ]
    assert [0, 2, 3, 1] in orders and [0, 2, 1, 3, 4] not in orders
