"""The facts of the OFA spaces (docs/spec.md, OFA 1), against published networks where there are."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from nasray.costs.profile import profile, total
from nasray.costs.table import CostTable
from nasray.errors import UserError
from nasray.spaces import space_by_name
from nasray.spaces.ofa import num_networks
from nasray.spaces.ofa_mbconv import div8
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.ofa_proxyless import OfaProxyless
from nasray.spaces.ofa_resnet50d import OfaResNet50D
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.supernet import build_subnet

DATA = Path(__file__).parents[3] / "shared" / "data" / "ofa"
NETWORKS = sorted(DATA.glob("specialized/*.json"))
needs_data = pytest.mark.skipif(
    not NETWORKS, reason="needs the published OFA networks beside the repository"
)
SPACES = [OfaMobileNetV3(), OfaProxyless(), OfaResNet50D()]
TRIALS = [
    OfaMobileNetV3(7, 64, (32, 48, 64), 0.4),
    OfaProxyless(7, 64, (32, 48, 64), 0.4),
    OfaResNet50D(7, 64, (32, 48, 64), 0.6),
]
every_space = pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)
every_trial = pytest.mark.parametrize("space", TRIALS, ids=lambda space: space.name)
# Spec 1.7: rows of the published table that its own counter does not give.
WRONG_MACS = {"note10_lat@16ms_top1@75.5_finetune@25", "note10_lat@8ms_top1@71.4_finetune@25"}


def random_archs(space, number, seed=0):
    drawn = random_population(space.genes, number, np.random.default_rng(seed))
    return as_architectures(space.canonical(drawn))


def changed(space, arch, **genes):
    """`arch` with other choices of the genes of the given names (_ for .)."""
    columns = {gene.name: column for column, gene in enumerate(space.genes)}
    arch = list(arch)
    for name, choice in genes.items():
        arch[columns[name.replace("_", ".")]] = choice
    return tuple(arch)


def trained_like(space):
    generator = torch.Generator().manual_seed(0)
    supernet = space.supernet()
    space.initialize(supernet, generator)
    with torch.no_grad():
        for name, param in supernet.named_parameters():
            if "transform" in name:
                param.add_(torch.randn(param.shape, generator=generator), alpha=0.1)
    return supernet


def published(path):
    """(space, architecture, what the table says) of a published network."""
    record = json.loads(path.read_text())
    net, side = record["net"], record["image_size"]
    make = OfaMobileNetV3 if net["name"] == "MobileNetV3" else OfaProxyless
    width = {16: 1.0, 24: 1.2, 40: 1.3}[net["first_conv"]["out_channels"]]
    space = make(1000, side, (side,), width)
    num_blocks = sum(gene.kind == "kernel" for gene in space.genes)
    values = {"ks": [None] * num_blocks, "e": [None] * num_blocks, "d": [0] * 6, "r": side}
    stage = -1
    for block in net["blocks"][1:]:
        stage += block["shortcut"] is None
        place = 4 * stage + values["d"][stage]
        values["ks"][place] = block["mobile_inverted_conv"]["kernel_size"]
        values["e"][place] = block["mobile_inverted_conv"]["expand_ratio"]
        values["d"][stage] += 1
    return space, space.from_json({**values, "d": values["d"][:5]}), record


@needs_data
@pytest.mark.parametrize("path", NETWORKS, ids=lambda path: path.stem.split("_top1")[0])
def test_a_published_network_has_its_published_size(path):
    """Parameters as in the table; multiply-accumulates of convolutions and classifier."""
    space, arch, record = published(path)
    said = record["readme"]
    convs = [block["mobile_inverted_conv"] for block in record["net"]["blocks"][1:]]
    rows = [row for row in space.decode(arch)[2:-1] if row is not None]
    assert [row.mid_channels for row in rows] == [conv["mid_channels"] for conv in convs]
    assert [row.se for row in rows] == [conv["use_se"] for conv in convs]
    assert [row.act for row in rows] == [conv["act_func"] for conv in convs]
    ops = profile(space, arch)
    assert f"{total(ops)['params'] / 1e6:.1f}M" == said["params"]
    # Not `macs`: that counts biases and global pooling, too, 0.02 to 0.4 % more.
    macs = sum(op.mults for op in ops if op.kernel_size > 0)
    assert (f"{macs / 1e6:.0f}M" == said["macs"]) == (said["id"] not in WRONG_MACS)
    assert macs <= total(ops)["macs"] <= 1.005 * macs


@needs_data
def test_printed_architectures_are_read_with_nulls_and_written_with_them():
    space = OfaMobileNetV3()
    entries = json.loads((DATA / "printed_archs.json").read_text())["entries"]
    assert len(entries) > 4
    for entry in entries:
        values = {key: entry[key] for key in ("ks", "e", "d", "r")}
        assert space.to_json(space.from_json(values)) == values


def test_numbers_of_networks():
    """Spec 1.6."""
    stage = 9**2 + 9**3 + 9**4
    assert num_networks(OfaMobileNetV3()) == 5 * 21758655492572485851 == 5 * stage**5
    assert num_networks(OfaProxyless()) == 5 * 9 * stage**5
    assert num_networks(OfaResNet50D()) == 8 * 2458914796962


def test_every_network_is_counted_once():
    """All architectures of a stage, brought to canonical form."""
    space = OfaMobileNetV3()
    columns = [*range(4, 8), *range(24, 28), 41]  # of the second stage
    population = np.zeros((3**9, len(space.genes)), dtype=np.int8)
    population[:, columns] = list(itertools.product(range(3), repeat=9))
    assert len(np.unique(space.canonical(population), axis=0)) == 7371


def test_widths_as_published():
    assert [div8(v) for v in (1, 11, 12, 19.2, 20.8, 134.4, 18)] == [8, 16, 16, 24, 24, 136, 24]
    stem, fixed, *blocks, head = OfaMobileNetV3().decode(OfaMobileNetV3().named["largest"])
    assert (stem.out_channels, fixed.out_channels) == (24, 24)
    assert [row.out_channels for row in blocks[::4]] == [32, 48, 96, 136, 192]
    assert (head.in_channels, head.mid_channels, head.out_channels) == (192, 1152, 1536)
    stem, fixed, *blocks, head = OfaProxyless().decode(OfaProxyless().named["largest"])
    assert (stem.out_channels, fixed.out_channels) == (40, 24)
    assert [row.out_channels for row in blocks[::4]] == [32, 56, 104, 128, 248, 416]
    assert (head.in_channels, head.out_channels) == (416, 1664)


def test_widths_of_resnet50d():
    space = OfaResNet50D()
    published = [
        (24, 40, 168, 336, 664, 1328),
        (24, 48, 208, 408, 816, 1640),
        (32, 64, 256, 512, 1024, 2048),
    ]
    for choice, widths in enumerate(published):
        arch = list(space.named["largest"])
        arch[18:24] = [choice] * 6
        stem, residual, end, *blocks, head = space.decode(tuple(arch))
        assert residual.in_channels == stem.out_channels
        stages = (blocks[start].out_channels for start in (0, 4, 8, 14))
        assert (stem.out_channels, end.out_channels, *stages) == widths
        assert head.in_channels == widths[-1]


def test_strides_activations_and_shortcuts():
    rows = OfaMobileNetV3().decode(OfaMobileNetV3().named["largest"])
    assert [row.resolution for row in rows[:3]] == [224, 112, 112]
    assert [row.stride for row in rows[2:-1:4]] == [2, 2, 2, 1, 2]
    assert [row.identity for row in rows[1:-1]] == [True, *[False, True, True, True] * 5]
    assert [row.se for row in rows[2:-1:4]] == [False, True, False, True, True]
    assert [row.act for row in rows[1:-1:4]] == [
        "relu",
        "relu",
        "relu",
        *["h_swish"] * 2,
        "h_swish",
    ]
    assert rows[-1].resolution == 7
    rows = OfaProxyless().decode(OfaProxyless().named["largest"])
    assert [row.stride for row in rows[2:-1:4]] == [2, 2, 2, 1, 2, 1]
    assert not rows[1].identity and not rows[-2].identity
    assert {row.act for row in rows[:-1]} == {"relu6"} and not any(row.se for row in rows[1:-1])
    for space, eps in ((OfaMobileNetV3(), 1e-5), (OfaProxyless(), 1e-3)):
        modules = build_subnet(space.decode(space.named["smallest"])).modules()
        assert {module.eps for module in modules if isinstance(module, nn.BatchNorm2d)} == {eps}


@pytest.mark.parametrize("resolution", [188, 156, 224, 33])
def test_resolutions_are_rounded_up_at_every_stride(resolution):
    space = OfaMobileNetV3(7, 224, (resolution,), 0.4)
    network = build_subnet(space.decode(space.named["smallest"])).eval()
    features = torch.zeros(1, 3, resolution, resolution)
    for row in space.decode(space.named["smallest"]):
        if row is not None:
            assert features.shape[1:] == (row.in_channels, row.resolution, row.resolution)
            features = getattr(network, row.name)(features)


@every_space
def test_depth_drops_the_last_blocks_of_a_stage(space):
    first = {"ofa_resnet50d": 3}.get(space.name, 2)
    arch = changed(space, space.named["largest"], stage1_depth=0)
    gone = [index - first for index, row in enumerate(space.decode(arch)) if row is None]
    assert gone == [6, 7]
    arch = changed(space, arch, stage1_depth=1)
    assert [index - first for index, row in enumerate(space.decode(arch)) if row is None] == [7]


def test_only_the_greatest_stem_depth_keeps_the_residual_convolution():
    space = OfaResNet50D()
    arch = space.named["largest"]
    assert space.decode(arch)[1].name == "stem_residual"
    assert space.decode(changed(space, arch, stem_depth=0))[1] is None


def test_an_mbconv_by_hand():
    """SE between the depthwise convolution's activation and the linear one, then the sum."""
    space = TRIALS[0]
    unit = space.decode(space.named["largest"])[7].build().eval()
    features = torch.randn(2, unit.expand.conv.in_channels, 9, 9)
    inner = unit.depthwise(unit.expand(features))
    squeezed = unit.se.reduce(inner.mean((2, 3), keepdim=True)).clamp(min=0)
    gate = (unit.se.restore(squeezed) + 3).clamp(0, 6) / 6
    expected = features + unit.project.bn(unit.project.conv(inner * gate))
    torch.testing.assert_close(unit(features), expected)


def test_a_bottleneck_and_the_stem_by_hand():
    space = TRIALS[2]
    _, residual, _, *blocks, _ = space.decode(space.named["largest"])
    unit = residual.build().eval()
    features = torch.randn(2, residual.in_channels, 8, 8)
    added = unit.main.bn(unit.main.conv(features)).clamp(min=0)
    torch.testing.assert_close(unit(features), features + added)
    for row in (blocks[4], blocks[5]):  # stride 2 with a projection, then an identity
        unit = row.build().eval()
        features = torch.randn(2, row.in_channels, 8, 8)
        shortcut = features
        if row.stride == 2:
            pooled = features.unfold(2, 2, 2).unfold(3, 2, 2).mean((4, 5))
            shortcut = unit.shortcut.bn(unit.shortcut.conv(pooled))
        main = unit.outer.bn(unit.outer.conv(unit.middle(unit.inner(features))))
        torch.testing.assert_close(unit(features), (shortcut + main).clamp(min=0))


@every_trial
def test_images_of_any_resolution_pass(space):
    supernet = trained_like(space).eval()
    for side in (32, 48, 64, 70):
        assert supernet(torch.zeros(1, 3, side, side), space.named["smallest"]).shape == (1, 7)


@every_trial
def test_smaller_subnets_are_views_of_the_stored_weights(space):
    supernet = trained_like(space)
    stored = {tensor.untyped_storage().data_ptr() for tensor in supernet.state_dict().values()}
    shrunk = 0
    for arch in [space.named["smallest"], *random_archs(space, 2)]:
        rows = {row.name: row for row in space.decode(arch) if row is not None}
        for block, weights in supernet.weights(arch).items():
            for name, tensor in weights.items():
                smaller = (
                    bool(getattr(rows[block], "transform_names", ())) and "depthwise.conv" in name
                )
                assert (tensor.untyped_storage().data_ptr() in stored) != smaller, (block, name)
                shrunk += smaller
    assert bool(shrunk) == (space.name != "ofa_resnet50d")


@pytest.mark.parametrize("space", TRIALS[:2], ids=lambda space: space.name)
def test_a_small_kernel_goes_through_both_matrices(space):
    """7x7 -> centre 5x5 -> times 25x25 -> centre 3x3 -> times 9x9, channel by channel."""
    supernet = trained_like(space)
    whole = supernet.positions[2][0]
    full = whole.depthwise.conv.weight
    arch = space.named["smallest"]
    mid = space.decode(arch)[2].mid_channels
    assert mid < len(full)
    five = [whole.transform_7to5 @ channel[0, 1:6, 1:6].reshape(25) for channel in full[:mid]]
    centres = [channel.reshape(5, 5)[1:4, 1:4].reshape(9) for channel in five]
    three = torch.stack([whole.transform_5to3 @ centre for centre in centres])
    for choice, expected in ((1, torch.stack(five)), (0, three)):
        chosen = changed(space, arch, block0_kernel=choice)
        found = supernet.weights(chosen)["block0"]["depthwise.conv.weight"]
        torch.testing.assert_close(found.flatten(1), expected)
        kept = supernet.extract(chosen).block0.depthwise.conv.weight
        torch.testing.assert_close(kept, found)
    largest = changed(space, arch, block0_kernel=2)
    assert torch.equal(
        supernet.weights(largest)["block0"]["depthwise.conv.weight"], full[:mid].detach()
    )
    assert not torch.allclose(five[0], full[0, 0, 1:6, 1:6].reshape(25))  # the matrix matters


def test_gradients_of_a_small_kernel_reach_kernel_and_matrices():
    """By the chain rule from the gradient of the extracted kernel, and nothing elsewhere."""
    space = TRIALS[0]
    supernet = trained_like(space).train()
    arch = space.named["smallest"]
    subnet = supernet.extract(arch)
    batch = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    supernet(batch, arch).square().mean().backward()
    subnet(batch).square().mean().backward()
    whole, weight = supernet.positions[2][0], subnet.block0.depthwise.conv.weight
    mid = len(weight)
    outer = weight.grad.flatten(1)  # (mid, 9)
    with torch.no_grad():
        five = whole.depthwise.conv.weight[:mid, 0, 1:6, 1:6].flatten(1) @ whole.transform_7to5.t()
        centre = five.view(mid, 5, 5)[:, 1:4, 1:4].flatten(1)
        torch.testing.assert_close(whole.transform_5to3.grad, outer.t() @ centre)
        inner = torch.zeros(mid, 5, 5)
        inner[:, 1:4, 1:4] = (outer @ whole.transform_5to3).view(mid, 3, 3)
        pixels = torch.zeros(len(whole.depthwise.conv.weight), 1, 7, 7)
        pixels[:mid, 0, 1:6, 1:6] = (inner.flatten(1) @ whole.transform_7to5).view(mid, 5, 5)
    torch.testing.assert_close(whole.depthwise.conv.weight.grad, pixels)
    assert pixels.abs().sum() > 0


def test_matrices_of_kernels_that_are_not_used_get_no_gradient():
    space = TRIALS[0]
    supernet = trained_like(space).train()
    arch = changed(space, space.named["largest"], block0_kernel=1)
    supernet(torch.randn(2, 3, 64, 64), arch).sum().backward()
    used, unused = supernet.positions[2][0], supernet.positions[3][0]
    assert used.transform_7to5.grad is not None and used.transform_5to3.grad is None
    assert unused.transform_7to5.grad is None and unused.transform_5to3.grad is None


@every_trial
def test_initial_weights_of_an_output_channel_have_a_norm_of_one(space):
    supernet = space.supernet()
    with torch.no_grad():
        for param in supernet.parameters():
            param.fill_(3.0)
    space.initialize(supernet, torch.Generator().manual_seed(0))
    for name, module in supernet.named_modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            norms = module.weight.flatten(1).norm(dim=1)
            assert norms.square().mean().item() == pytest.approx(1, rel=0.1), name
    matrices = [param for name, param in supernet.named_parameters() if "transform" in name]
    assert all(torch.equal(matrix, torch.eye(len(matrix))) for matrix in matrices)
    assert len(matrices) == 2 * sum(gene.kind == "kernel" for gene in space.genes)


@every_trial
def test_the_table_agrees_with_the_walk_on_every_depth_and_resolution(space):
    table = CostTable(space)
    population = random_population(space.genes, 12, np.random.default_rng(3))
    costs = table(population)
    assert len(set(population[:, -1])) > 1
    for row, arch in enumerate(as_architectures(population)):
        for cost, value in total(profile(space, arch)).items():
            assert costs[cost][row] == pytest.approx(value, rel=1e-12), cost
    for cost in ("macs", "params", "micronet_score"):
        extremes = [total(profile(space, space.named[name]))[cost] for name in space.named]
        assert table.bounds(cost) == pytest.approx(extremes, rel=1e-12)


@pytest.mark.parametrize(
    ("space", "values", "complaint"),
    [
        (SPACES[2], {"d": [2, 3, 2, 2, 2]}, "stage0.depth = 3 must be one of \\[0, 1, 2\\]"),
        (SPACES[2], {"d": [1, 2, 2, 2, 2]}, "stem.depth = 1 must be one of \\[0, 2\\]"),
        (SPACES[2], {"e": [4] * 18}, "block0.expand = 4 must be one of \\[0.2, 0.25, 0.35\\]"),
        (SPACES[2], {"ks": [3] * 20}, "keys \\['d', 'e', 'r', 'w'\\]"),
        (SPACES[0], {"ks": [3] * 19}, "'ks' must be a list of 20 values"),
        (SPACES[0], {"d": 4}, "'d' must be a list of 5 values"),
        (SPACES[0], {"r": 200}, "resolution = 200 must be one of"),
        (SPACES[2], {"d": [2, True, 2, 2, 2]}, "stage0.depth = True"),
        (SPACES[0], {"e": [None, *[3] * 19]}, "block0.expand"),
        (SPACES[1], {"e": [*[3] * 20, None]}, "block20.expand"),
        (SPACES[0], {"r": None}, "resolution"),
    ],
)
def test_values_outside_a_space_are_refused(space, values, complaint):
    with pytest.raises(UserError, match=complaint):
        space.from_json({**space.to_json(space.named["largest"]), **values})


def test_values_of_dropped_blocks_are_checked_and_forgotten():
    space = OfaMobileNetV3()
    values = {"ks": [7] * 20, "e": [6] * 20, "d": [2] * 5, "r": 224}
    written = space.to_json(space.from_json(values))
    assert written["ks"] == [7, 7, None, None] * 5
    with pytest.raises(UserError, match="block3.kernel = 9"):
        space.from_json({**values, "ks": [7, 7, 7, 9] * 5})


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"resolution": 192}, "must not exceed space.resolution = 192"),
        ({"resolutions": [192, 160]}, "distinct and ascending"),
        ({"resolutions": [16, 160]}, "32 or more"),
        ({"resolutions": []}, "ascending"),
        ({"resolutions": [160.5]}, "space.resolutions = \\[160.5\\] must be a list of type int"),
        ({"resolutions": 160}, "space.resolutions = 160 must be a list of type int"),
        ({"width": 0.0}, "space.width = 0.0"),
    ],
)
def test_a_mistake_in_the_resolutions_or_width_is_named(options, complaint):
    with pytest.raises(UserError, match=complaint):
        space_by_name("ofa_mobilenetv3", **options)


def test_resolutions_are_read_from_a_list():
    space = space_by_name("ofa_proxyless", resolutions=[160, 224])
    assert space == OfaProxyless(resolutions=(160, 224))
