"""Latencies of int8 networks: what is quantised, and that their tables serve as any other."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

import nasray
from nasray.config import Limit
from nasray.costs.latency import LatencyTable
from nasray.costs.latency_check import check
from nasray.costs.latency_files import block_key
from nasray.costs.latency_onnx import to_onnx
from nasray.costs.latency_timing import Setup, time_blocks, time_network, time_onnx
from nasray.errors import UserError
from nasray.search.candidate import Evaluation
from nasray.search.limits import Limits
from nasray.spaces import space_by_name
from nasray.spaces.supernet import build_subnet
from tests.costs.test_latency import SMALL, TINY, measure_quickly
from tests.search.searches import search

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
INT8 = Setup(runtime="onnxruntime", precision="int8")


def blocks_of(space, arch):
    return [block for block in space.decode(arch) if block is not None]


def network_of(space) -> tuple[torch.nn.Module, tuple[int, ...]]:
    """The first blocks of a network with initial weights, and the shape of their input."""
    blocks = blocks_of(space, next(iter(space.named.values())))[:6]
    network = build_subnet(blocks)
    space.initialize(network, torch.Generator().manual_seed(0))
    return network.eval(), (2, 3, blocks[0].resolution, blocks[0].resolution)


def optimised(content: bytes, path) -> Counter:
    """How often onnxruntime will run each operation of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(path).graph.node)


SPACES = [TINY, SMALL, space_by_name("shufflenet", resolution=64)]
SPACES.append(space_by_name("mbconv", resolution=64, resolutions=(64,)))


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_a_file_computes_what_the_network_computes(space):
    network, shape = network_of(space)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    session = onnxruntime.InferenceSession(to_onnx(network, shape, "fp32"))
    [found] = session.run(None, {"input": images.numpy()})
    with torch.inference_mode():
        np.testing.assert_allclose(found, network(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
def test_every_convolution_runs_in_int8(space, tmp_path):
    """Also where BN is folded into equal biases, as in all networks with initial weights."""
    network, shape = network_of(space)
    exported = onnx.load_from_string(to_onnx(network, shape, "fp32")).graph.node
    convolutions = Counter(node.op_type for node in exported)["Conv"]
    assert convolutions > 3 and not any(node.op_type == "BatchNormalization" for node in exported)
    found = optimised(to_onnx(network, shape, "int8"), tmp_path / "optimised.onnx")
    assert found["QLinearConv"] == convolutions and found["Conv"] == 0


def test_weights_are_int8_per_channel_and_activations_uint8():
    block = blocks_of(SMALL, SMALL.named["smallest"])[2]
    network = build_subnet([block]).eval()
    shape = (1, block.in_channels, block.resolution, block.resolution)
    graph = onnx.load_from_string(to_onnx(network, shape, "int8")).graph
    values = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    dequantised = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [
        (values[node.input[0]], values[node.input[2]])
        for node in dequantised
        if node.input[0] in values and values[node.input[0]].ndim == 4
    ]
    assert len(weights) == 3  # expansion, depthwise, projection
    for weight, zero_points in weights:
        assert weight.dtype == np.int8 and zero_points.shape == weight.shape[:1]
        assert not zero_points.any()
    quantised = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert {values[node.input[2]].dtype for node in quantised} == {np.dtype(np.uint8)}


def test_blocks_add_up_to_the_whole_int8_network():
    arch = TINY.named["largest"]
    times = time_blocks(TINY, arch, INT8)
    assert [key for key, _ in times] == [block_key(block) for block in blocks_of(TINY, arch)]
    # Loose, for machines that do other work meanwhile.
    assert 0.2 < sum(ms for _, ms in times) / time_network(TINY, arch, INT8) < 5


def test_blocks_are_quantised_once(monkeypatch):
    made = []

    def counted(network, shape, precision):
        made.append(precision)
        return to_onnx(network, shape, precision)

    monkeypatch.setattr("nasray.costs.latency_timing.to_onnx", counted)
    arch = TINY.named["largest"]
    distinct = len(set(map(block_key, blocks_of(TINY, arch))))
    for _ in range(2):
        time_blocks(TINY, arch, dataclasses.replace(INT8, batch_size=3))
    # The network is another one each time it is drawn.
    assert made == ["int8"] * (distinct + 2)


def test_a_search_keeps_a_limit_on_int8_latency(tmp_path, monkeypatch):
    path = str(tmp_path / "int8.parquet")
    measure_quickly(TINY, path, monkeypatch, setup=INT8)
    table = LatencyTable.load(path, TINY)
    assert table.provenance["precision"] == "int8"
    limit = sum(table.bounds()) / 2
    limits = Limits(TINY, [Limit(cost="latency_ms", max=limit)], table)
    found = search(
        tmp_path / "history",
        limits,
        evaluate=lambda arch: Evaluation(fitness=sum(arch) / 100, seconds=1.0),
        population_size=6,
        num_generations=2,
        num_parents=2,
    )
    assert len(found) > 6 and all(each.costs["latency_ms"] <= limit for each in found)
    limits_json = [{"cost": "latency_ms", "max": limit}]
    space = nasray.space("tiny", resolution=16)
    assert len(space.sample(3, limits=limits_json, latency_table=path)) == 3
    assert len(check(TINY, table, num_archs=2).rows) == 2


def test_a_file_is_timed_as_it_is():
    blocks = blocks_of(TINY, TINY.named["smallest"])
    network = build_subnet(blocks).eval()
    content = to_onnx(network, (2, 3, 16, 16), "fp32")
    assert time_onnx(content, INT8) > 0
    open_batch = onnx.load_from_string(content)
    open_batch.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    assert time_onnx(open_batch.SerializeToString(), Setup(runtime="onnxruntime")) > 0
    open_batch.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "width"
    with pytest.raises(UserError, match=r"input of \[1, 3, 16, 'width'\]; only the first may be"):
        time_onnx(open_batch.SerializeToString(), INT8)
    with pytest.raises(UserError, match="refuses the ONNX file .*; check it$"):
        time_onnx(b"PK and no more", INT8)
    of_the_future = onnx.load_from_string(content)
    of_the_future.opset_import[0].version = 99
    with pytest.raises(UserError, match=r"opset.*; update it: python3 -m pip install -U onnxrunt"):
        time_onnx(of_the_future.SerializeToString(), INT8)
