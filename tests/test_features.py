"""Networks without their heads: the feature maps are those inside the network, and timm's."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nasray
from nasray import checkpoint
from nasray.data.transforms import MEAN, STD
from nasray.errors import UserError
from nasray.features import FeatureNetwork
from nasray.pretrained.plain import plain_tensors
from nasray.spaces import SPACES, space_by_name
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.supernet import build_subnet

OPTIONS = {"resolution": 64, "num_classes": 5}
TIMM = (
    "mobilenetv3_large_100",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
)


def space_of(name: str):
    sizes = {"resolutions": (64,)} if name.startswith(("ofa", "mbconv")) else {}
    return space_by_name(name, **OPTIONS, **sizes)


def network_of(name: str) -> nn.Sequential:
    """A random network of a space, in eval mode, no BN of which is an identity."""
    space = space_of(name)
    population = random_population(space.genes, 1, np.random.default_rng(3))
    [arch] = as_architectures(space.canonical(population))
    network = build_subnet(space.decode(arch))
    generator = torch.Generator().manual_seed(0)
    space.initialize(network, generator)
    for key, value in network.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
    return network.eval()


REDUCTIONS = {"tiny": [2, 4, 8], "nasbench_macro": [1, 2, 4, 8]}


@pytest.mark.parametrize("name", SPACES)
def test_levels_are_the_last_outputs_before_the_resolution_halves(name):
    network = network_of(name)
    features = FeatureNetwork(network)
    images = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = features(images)
        inside = [images]
        for block in network[:-1]:
            inside.append(block(inside[-1].clone()))  # which blocks might change in place
        # The head takes the last one, so nothing between the last level and it was left out.
        torch.testing.assert_close(network[-1](found[-1]), network(images))
    last = {tuple(each.shape[2:]): each for each in inside}
    assert list(dict.fromkeys(tuple(each.shape[2:]) for each in [images, *found])) == list(last)
    for each in found:
        assert torch.equal(each, last[tuple(each.shape[2:])])
    info = features.feature_info
    assert info.reduction() == REDUCTIONS.get(name, [2, 4, 8, 16, 32])
    assert info.channels() == [each.shape[1] for each in found]
    for each, reduction in zip(found, info.reduction(), strict=True):
        assert tuple(each.shape[2:]) == (64 // reduction, 96 // reduction)


@pytest.mark.parametrize("name", SPACES)
def test_features_train_and_keep_the_names_of_the_weights(name):
    network = network_of(name)
    features = FeatureNetwork(network)
    head = f"{list(dict(network.named_children()))[-1]}."
    assert list(features.state_dict()) == [
        key for key in network.state_dict() if not key.startswith(head)
    ]
    initial = buffers_of(features)
    features.train()(torch.rand(2, 3, 64, 64))[-1].square().mean().backward()
    assert all(parameter.grad is not None for parameter in features.parameters())
    trained = buffers_of(features)
    assert any(not torch.equal(trained[key], value) for key, value in initial.items())
    features.eval()(torch.rand(2, 3, 64, 64))
    assert all(map(torch.equal, trained.values(), buffers_of(features).values()))


def buffers_of(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in network.named_buffers()}


def test_levels_are_chosen_by_index_and_what_is_behind_them_is_left_out():
    network = network_of("shufflenet")
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        levels = FeatureNetwork(network)(images)
        for indices, expected in (((2, 1), (1, 2)), ((-1,), (4,)), ((0, -4, 1), (0, 1))):
            features = FeatureNetwork(network, indices)
            found = features(images)
            assert len(found) == len(expected)
            assert all(map(torch.equal, found, (levels[index] for index in expected)))
            assert [each["index"] for each in features.feature_info.get_dicts()] == list(expected)
            last = features.feature_info.module_name()[-1]
            assert list(dict(features.named_children()))[-1] == last


def test_a_level_that_is_not_there_is_refused():
    network = network_of("tiny")
    for wrong in ((3,), (-4,), (), 3, (0.0,), (True,), "01"):
        with pytest.raises(UserError, match=r"indices from 0 to 2, .* \[2, 4, 8\]"):
            FeatureNetwork(network, wrong)


@pytest.mark.parametrize("base", TIMM)
def test_feature_maps_are_those_of_timm(base: str, tmp_path: Path):
    """But for MobileNetV3, whose last one timm takes behind the first convolution of our head."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = timm.create_model(base)
    generator = torch.Generator().manual_seed(0)
    for key, value in original.state_dict().items():
        if key.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=generator)
    reference = timm.create_model(base, features_only=True).eval()
    reference.load_state_dict(original.state_dict(), strict=False)

    space = space_by_name("mbconv", base=base, num_classes=1000)
    supernet = space.supernet().eval()
    supernet.load_state_dict(plain_tensors(space, original.state_dict()))
    arch = space.named["largest"]
    subnet = supernet.extract(arch)
    checkpoint.save_subnet(f"{tmp_path}/model.pt", space, arch, subnet)
    features = nasray.load(f"{tmp_path}/model.pt", features_only=True)

    images = torch.rand(1, 3, 96, 64, generator=generator)
    mean, std = (torch.tensor(values).view(3, 1, 1) / 255 for values in (MEAN, STD))
    with torch.no_grad():
        found, expected = features(images), reference((images - mean) / std)
    channels, reduction = features.feature_info.channels(), features.feature_info.reduction()
    assert reduction == reference.feature_info.reduction()
    if base.startswith("mobilenetv3"):
        with torch.no_grad():
            found[-1] = subnet.head.mix(found[-1])
        assert channels[:-1] == reference.feature_info.channels()[:-1]
    else:
        assert channels == reference.feature_info.channels()
    assert len(found) == len(expected)
    for own, its in zip(found, expected, strict=True):
        torch.testing.assert_close(own, its, rtol=1e-4, atol=1e-4 * float(its.std()))
    assert len(features.feature_info.module_name()) == len(reference.feature_info.module_name())
    theirs = reference.feature_info.get_dicts(keys=["num_chs", "reduction", "index"])[:-1]
    assert [
        {key: each[key] for key in theirs[0]} for each in features.feature_info.get_dicts()[:-1]
    ] == theirs
