"""Published Once-for-All supernets compute here what they compute in the original code."""

import numpy as np
import pytest
import torch

from nasray.errors import UserError
from nasray.pretrained.ofa import ofa_tensors, shortest
from nasray.pretrained.start import start_from
from tests.pretrained.published import (
    SPACES,
    expected_logits,
    formula_state,
    image_of,
    published,
    respelled,
    space_of,
    static_state,
)

every_net = pytest.mark.parametrize("net", SPACES)
PER_DEVIATION = 1e-6  # the logits are stored as float32: rounding is a tenth of that


def logits(supernet, arch):
    with torch.no_grad():
        return supernet(image_of(arch["r"]).double(), supernet.space.from_json(arch))[0].numpy()


@every_net
def test_ten_subnets_compute_what_the_original_code_does(net, tmp_path):
    facts, expected = published(net), expected_logits(net)
    torch.save({"state_dict": formula_state(net)}, tmp_path / net)
    started = start_from(space_of(net), str(tmp_path / net), seed=0)
    assert not started.new_head and not started.supernet.training
    supernet = started.supernet.double()
    assert len(facts["archs"]) == len(expected) == 10
    for arch, wanted in zip(facts["archs"], expected, strict=True):
        difference = np.abs(logits(supernet, arch) - wanted).max()
        assert difference < PER_DEVIATION * wanted.std(), arch


@every_net
@pytest.mark.parametrize("spelling", ["plain", "older", "older plain", "module", "mixed", "bare"])
def test_all_spellings_are_the_same_tensors(net, spelling):
    state = formula_state(net)
    wanted = ofa_tensors(space_of(net), state)
    given = respelled(state, plain="plain" in spelling, older="older" in spelling)
    if spelling == "module":
        given = {f"module.{name}": tensor for name, tensor in state.items()}
    elif spelling == "mixed":
        plain = respelled(state, plain=True, older=True)
        pairs = zip(state.items(), plain.items(), strict=True)
        given = dict(pair[number % 2] for number, pair in enumerate(pairs))
    elif spelling == "bare":
        given = {shortest(name): tensor for name, tensor in state.items()}
    assert given.keys() != state.keys() or (net, spelling) == ("resnet50d", "older")
    found = ofa_tensors(space_of(net), given)
    assert found.keys() == wanted.keys() == space_of(net).supernet().state_dict().keys()
    assert all(found[name] is wanted[name] for name in wanted)
    assert {id(tensor) for tensor in found.values()} == {id(tensor) for tensor in state.values()}


@pytest.mark.parametrize("net", ["mbv3_w1.0", "proxyless_w1.3"])
def test_the_static_largest_network_gets_kernels_that_are_cropped(net, tmp_path):
    torch.save({"state_dict": static_state(net)}, tmp_path / "ofa_D4_E6_K7")
    supernet = start_from(space_of(net), str(tmp_path / "ofa_D4_E6_K7"), seed=0).supernet
    for name, tensor in supernet.state_dict().items():
        if "transform_" in name:
            assert torch.equal(tensor, torch.eye(len(tensor)))
    largest, wanted = published(net)["archs"][0], expected_logits(net)[0]
    assert set(largest["ks"]) == {7}
    difference = np.abs(logits(supernet.double(), largest) - wanted).max()
    assert difference < PER_DEVIATION * wanted.std()


def test_a_residual_wrapper_around_the_stem_is_left_out():
    for name in ("conv.conv.conv.weight", "conv.conv.weight", "conv.weight"):
        assert shortest(f"input_stem.1.{name}") == "input_stem.1.conv.weight"
    for name in ("conv.bn.bn.bias", "conv.bn.bias", "bn.bn.bias", "bn.bias"):
        assert shortest(f"module.input_stem.1.{name}") == "input_stem.1.bn.bias"


@pytest.mark.parametrize(
    ("net", "other"),
    [("mbv3_w1.0", "proxyless_w1.3"), ("proxyless_w1.3", "resnet50d"), ("resnet50d", "mbv3_w1.2")],
)
def test_a_file_of_another_space_says_of_which(net, other):
    with pytest.raises(UserError) as refused:
        ofa_tensors(space_of(net), formula_state(other))
    (wanted, _), (found, _) = SPACES[net], SPACES[other]
    assert str(refused.value) == f"is of {found}, not of {wanted}; set space.name = '{found}'"


def test_what_is_missing_or_unknown_is_named_as_published():
    space, state = space_of("mbv3_w1.0"), formula_state("mbv3_w1.0")
    surplus = state | {"blocks.21.conv.point_linear.conv.conv.weight": torch.ones(1)}
    doubled = state | {"first_conv.conv.conv.weight": torch.ones(1)}
    name = "blocks.7.conv.depth_conv.bn.bn.bias"
    lacking = {key: tensor for key, tensor in state.items() if key != name}
    matrix = "blocks.3.conv.depth_conv.conv.5to3_matrix"
    without = {key: tensor for key, tensor in state.items() if key != matrix}
    for given, complaint in (
        (surplus, "holds blocks.21.conv.point_linear.conv.conv.weight, which no tensor"),
        (doubled, "holds first_conv.conv.conv.weight and first_conv.conv.weight"),
        (lacking, "lacks blocks.7.depth_conv.bn.bias; a whole supernet is needed"),
        (without, "lacks blocks.3.depth_conv.conv.5to3_matrix; "),
        ({"fc.weight": torch.ones(1)}, "is no supernet that Once-for-All published: it holds fc"),
        ({}, "is no supernet that Once-for-All published: it holds nothing"),
    ):
        with pytest.raises(UserError) as refused:
            ofa_tensors(space, given)
        assert str(refused.value).startswith(complaint)


def test_counts_of_batches_may_be_missing():
    space, state = space_of("mbv3_w1.0"), formula_state("mbv3_w1.0")
    given = {name: each for name, each in state.items() if "num_batches" not in name}
    assert len(ofa_tensors(space, given)) == len(given) < len(state)
