"""What a supernet starts from, and how weights that do not fit are refused."""

import logging
from dataclasses import replace

import pytest
import torch

from nasray import checkpoint
from nasray.errors import UserError
from nasray.pretrained import start
from nasray.pretrained.start import start_from
from nasray.spaces import SPACES, space_by_name
from nasray.spaces.supernet import build_subnet
from nasray.spaces.tiny import Tiny
from tests.pretrained.published import formula_state, space_of, static_state

TINY = Tiny(num_classes=4, resolution=32)
NET = "mbv3_w1.0"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "weights.pt")


def initial(space, seed):
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(seed))
    return supernet


def saved(path, state):
    torch.save({"state_dict": state}, path)
    return path


def complaint(space, path, **options):
    with pytest.raises(UserError) as refused:
        start_from(space, path, **{"seed": 0} | options)
    text = str(refused.value)
    assert text.startswith(path) and "\n" not in text
    return text


def differing(supernet, other):
    own, its = supernet.state_dict(), other.state_dict()
    assert own.keys() == its.keys()
    return {name for name in own if not torch.equal(own[name], its[name])}


def test_a_supernet_of_nasray_comes_back_whole(path):
    trained = initial(TINY, seed=1)
    checkpoint.save_supernet(path, trained)
    started = start_from(TINY, path, seed=2)
    assert not started.new_head and not started.supernet.training
    assert differing(started.supernet, trained) == set()
    assert started.supernet.space == TINY


def test_other_classes_get_the_classifier_that_the_seed_draws(path, caplog):
    trained = initial(TINY, seed=1)
    checkpoint.save_supernet(path, trained)
    other = replace(TINY, num_classes=6)
    with caplog.at_level(logging.INFO):
        started = start_from(other, path, seed=2)
    assert started.new_head
    assert f"{path} is of 4 classes, not 6: the classifier starts anew" in caplog.text
    drawn, kept = initial(other, seed=2).state_dict(), trained.state_dict()
    for name, tensor in started.supernet.state_dict().items():
        assert torch.equal(tensor, (drawn if "output" in name else kept)[name]), name
    assert "set num_classes = 4" in complaint(other, path, seed=None)


@pytest.mark.parametrize("name", SPACES)
def test_the_classifier_of_every_space_is_found(name):
    """That of ShuffleNet is a convolution."""
    found = start._classifier(space_by_name(name, num_classes=4))
    assert [each.split(".", 2)[2] for each in found] == ["0.output.weight", "0.output.bias"]


def test_a_published_file_for_other_classes_keeps_all_else(path):
    saved(path, static_state(NET))
    whole = start_from(space_of(NET), path, seed=3).supernet
    started = start_from(space_of(NET, num_classes=10), path, seed=3)
    assert started.new_head
    assert differing(whole, started.supernet) == {
        "positions.22.0.output.weight",
        "positions.22.0.output.bias",
    }


def test_options_that_change_no_weight_may_differ(path):
    trained = initial(space_of(NET, num_classes=3), seed=1)
    checkpoint.save_supernet(path, trained)
    smaller = space_of(NET, num_classes=3, resolution=128, resolutions=[96, 128])
    started = start_from(smaller, path, seed=0)
    assert started.supernet.space == smaller
    assert differing(started.supernet, trained) == set()


def test_other_options_of_a_supernet_of_nasray_are_named(path):
    checkpoint.save_supernet(path, space_of(NET, width=0.5).supernet())
    text = complaint(space_of(NET, num_classes=7), path)
    assert "a supernet with space.width = 0.5, not 1.0; set space.width to that" in text
    assert "of ofa_mobilenetv3, not of tiny; set space.name = 'ofa_m" in complaint(TINY, path)


def test_one_subnet_is_refused(path):
    arch = TINY.named["largest"]
    checkpoint.save_subnet(path, TINY, arch, build_subnet(TINY.decode(arch)))
    assert "holds one subnet; give the supernet.pt" in complaint(TINY, path)


def test_a_file_of_another_width_says_which(path):
    saved(path, formula_state(NET))
    for classes in (1000, 10):
        text = complaint(space_of("mbv3_w1.2", num_classes=classes), path)
        assert "first_conv.conv.weight is (16, 3, 3, 3), where ofa_mobilenetv3 has (24, 3" in text
        assert text.endswith("the file has another width: set space.width = 1.0")


def test_one_tensor_of_another_shape_is_named_with_both(path):
    name = "blocks.5.conv.depth_conv.se.fc.reduce.bias"
    saved(path, formula_state(NET) | {name: torch.ones(3)})
    text = complaint(space_of(NET), path)
    assert f"{name} is (3,), where ofa_mobilenetv3 has (40,); the file is of another" in text


def test_missing_and_surplus_tensors_are_named(path):
    state = formula_state(NET)
    saved(path, state | {"head.weight": torch.ones(2)})
    assert "holds head.weight, which no" in complaint(space_of(NET), path)
    saved(path, {name: each for name, each in state.items() if "classifier" not in name})
    assert "lacks classifier.linear.weight" in complaint(space_of(NET), path)
    weights = initial(TINY, seed=0).state_dict()
    first, *_, last = weights
    for changed, words in (
        ({**weights, "more": torch.ones(1)}, "holds more, which tiny does not have"),
        ({name: weights[name] for name in weights if name != last}, f"lacks {last}"),
        (weights | {first: torch.ones(2)}, f"{first} is (2,), where tiny has"),
    ):
        torch.save({"space": {"name": "tiny", "num_classes": 4}, "state": changed}, path)
        assert words in complaint(TINY, path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_become_float32(path, dtype):
    state = formula_state(NET)
    cast = {
        name: each.to(dtype) if each.is_floating_point() else each for name, each in state.items()
    }
    supernet = start_from(space_of(NET), saved(path, cast), seed=0).supernet
    found = supernet.state_dict()["positions.22.0.output.bias"]
    assert found.dtype == torch.float32
    assert torch.equal(found, cast["classifier.linear.bias"].float())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(path, value):
    name = "blocks.2.conv.point_linear.bn.bn.running_var"
    broken = formula_state(NET)[name].clone()
    broken[3] = value
    saved(path, formula_state(NET) | {name: broken})
    assert f"{name} has values that are not finite" in complaint(space_of(NET), path)


def test_whole_numbers_are_no_weights(path):
    name = "classifier.linear.bias"
    saved(path, formula_state(NET) | {name: torch.ones(1000, dtype=torch.int8)})
    assert f"{name} is of torch.int8" in complaint(space_of(NET), path)


def test_the_digest_is_checked(path):
    checkpoint.save_supernet(path, TINY.supernet())
    assert start_from(TINY, path, seed=0, sha256=checkpoint.digest(path).upper())
    assert checkpoint.digest(path) in complaint(TINY, path, sha256="0" * 64)


def test_a_space_without_published_weights_says_so(path):
    saved(path, {"weight": torch.ones(1)})
    assert "of tiny no published weights are known; give a supernet.pt" in complaint(TINY, path)


def test_all_published_functions_are_found():
    for name, function in start.PUBLISHED.items():
        assert name in function or callable(start.pkgutil.resolve_name(function))
