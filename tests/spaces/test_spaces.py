"""The contract of every design space, and facts of the ShuffleNet one (docs/spec.md, OneShot 1)."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn

from nasray.errors import UserError
from nasray.evaluation.evaluate import fold_bn
from nasray.spaces import SPACES, describe, make_space, space_by_name, space_class
from nasray.spaces.population import (
    as_architectures,
    crossover,
    embedded,
    mutate,
    random_population,
)
from nasray.spaces.shufflenet import LAYOUTS, SCALES, ShuffleNet
from nasray.spaces.shufflenet_blocks import SqueezeExcite
from nasray.spaces.space import num_architectures
from nasray.spaces.supernet import build_subnet, leading_slice

# Options under which a space of the table is small enough to be tested; without any here, its
# defaults. So a new space is tested as soon as it is in the table.
RESOLUTIONS = {"resolution": 64, "resolutions": (32, 48, 64)}
OPTIONS = {
    "shufflenet": [
        {"resolution": 32, "first_scale": 0},
        {"resolution": 64, "layout": "shufflenetv2plus", "head": "shufflenetv2plus"},
        {"resolution": 32, "se": False, "head": "spos"},
    ],
    "mbconv": [
        {**RESOLUTIONS, "base": "efficientnet_lite0"},
        {**RESOLUTIONS, "base": "mobilenet_v3_small"},
        {**RESOLUTIONS, "base": "proxylessnas_mobile"},
    ],
    "ofa_mobilenetv3": [{**RESOLUTIONS, "width": 0.4}],
    "ofa_proxyless": [{**RESOLUTIONS, "width": 0.4}],
    "ofa_resnet50d": [{**RESOLUTIONS, "width": 0.6}],
}
SMALL = [
    space_by_name(name, num_classes=7, **options)
    for name in SPACES
    for options in OPTIONS.get(name, [{}])
]
every_space = pytest.mark.parametrize("space", SMALL, ids=lambda space: repr(space)[:60])

# Operations into which the first one can be copied exactly.
EXACT_SIBLINGS = {"shufflenet": "shuffle7", "tiny": "conv5"}
spaces_of_exact_siblings = pytest.mark.parametrize(
    "space",
    [space for space in SMALL if space.name in EXACT_SIBLINGS],
    ids=lambda space: repr(space)[:60],
)


def trained_like(space, seed=0):
    """A supernet whose weights and BN statistics have left their initial values."""
    generator = torch.Generator().manual_seed(seed)
    supernet = space.supernet()
    with torch.no_grad():
        for name, tensor in supernet.state_dict().items():
            if tensor.dim() > 1:  # weights of convolutions and linear layers
                tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
            elif tensor.is_floating_point():
                tensor.uniform_(-0.2, 0.2, generator=generator)
                tensor += name.endswith(("running_var", "weight"))
    return supernet


def random_archs(space, number, seed=0):
    rng = np.random.default_rng(seed)
    return as_architectures(random_population(space.genes, number, rng))


def full_arch(space):
    """An architecture in which every gene has an effect: the last choice of each."""
    return tuple(len(gene.choices) - 1 for gene in space.genes)


def images(space, number=2, seed=0):
    shape = (number, 3, space.resolution, space.resolution)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@every_space
def test_extracted_subnet_computes_what_the_supernet_computes(space):
    supernet = trained_like(space).eval()
    for arch in [*random_archs(space, 4), *space.named.values()]:
        expected = supernet.extract(arch)(images(space))
        assert expected.std() > 0
        torch.testing.assert_close(supernet(images(space), arch), expected)


@every_space
def test_supernet_and_subnet_train_alike(space):
    """Equal loss, equal gradients of the shared weights, equal BN statistics after a step."""
    for arch in random_archs(space, 2, seed=1):
        supernet = trained_like(space).train()
        subnet = supernet.extract(arch)
        batch = images(space, 4)
        torch.manual_seed(0)  # of dropout
        supernet(batch, arch).square().mean().backward()
        torch.manual_seed(0)
        subnet(batch).square().mean().backward()
        after = supernet.extract(arch).state_dict()
        for name, tensor in subnet.state_dict().items():
            torch.testing.assert_close(after[name], tensor, msg=name)
        chosen = supernet.whole_blocks(arch)
        for (row, whole), block in zip(chosen, subnet, strict=True):
            shared = dict(whole.named_parameters())
            for name, param in block.named_parameters():
                if name == "depthwise.conv.weight" and row.transform_names:
                    continue  # no slice: goes through matrices, see test_ofa_spaces.py
                leading = shared[name].grad[tuple(slice(n) for n in param.shape)]
                torch.testing.assert_close(leading, param.grad, msg=name)
                rest = shared[name].grad.abs().sum() - leading.abs().sum()
                assert rest.abs() <= 1e-4 * leading.abs().sum() + 1e-12


@every_space
def test_folding_bn_into_convolutions_changes_no_logit(space):
    [arch] = random_archs(space, 1, seed=6)
    subnet = trained_like(space).extract(arch).double().eval()
    before = subnet(images(space, 2).double())
    fold_bn(subnet)
    torch.testing.assert_close(subnet(images(space, 2).double()), before)
    assert not [part for part in subnet.modules() if isinstance(part, nn.BatchNorm2d)]


@every_space
def test_a_copied_and_converted_supernet_computes_with_its_own_weights(space):
    [arch] = random_archs(space, 1, seed=5)
    supernet = trained_like(space).eval()
    wanted = supernet.extract(arch).double()(images(space, 2).double())
    twin = copy.deepcopy(supernet).double()
    for param in supernet.parameters():
        param.data.zero_()
    torch.testing.assert_close(twin(images(space, 2).double(), arch), wanted)
    torch.testing.assert_close(twin.extract(arch).double()(images(space, 2).double()), wanted)


@every_space
def test_a_step_gives_gradients_to_the_chosen_blocks_only(space):
    supernet = trained_like(space).train()
    arch = random_archs(space, 1)[0]
    supernet(images(space, 4), arch).sum().backward()
    touched = {id(param) for param in supernet.parameters() if param.grad is not None}
    slices = supernet.slices_of(arch)
    assert touched == {id(param) for param, _ in slices}
    assert len(touched) < len(list(supernet.parameters()))
    for param, shape in slices:  # all of a gradient lies in its slice
        leading_slice(param.grad, shape).zero_()
        assert not param.grad.any()


@every_space
def test_extract_copies(space):
    supernet = trained_like(space).eval()
    arch = random_archs(space, 1)[0]
    before = supernet(images(space), arch)
    with torch.no_grad():
        for param in supernet.extract(arch).parameters():
            param.zero_()
    assert torch.equal(supernet(images(space), arch), before)


@every_space
def test_what_is_done_to_an_extracted_subnet_is_not_done_to_others(space):
    supernet, arch = trained_like(space).eval(), random_archs(space, 1)[0]
    subnet, seen = supernet.extract(arch), []
    for module in subnet.modules():
        module.register_forward_pre_hook(lambda module, inputs: seen.append(module))
        module.register_forward_hook(lambda module, inputs, output: seen.append(module))
    fold_bn(subnet)
    subnet.train()
    other = supernet.extract(arch)
    torch.testing.assert_close(other(images(space)), supernet(images(space), arch))
    assert not seen and not any(module.training for module in other.modules())


@every_space
def test_an_extracted_subnet_is_made_of_standard_layers(space):
    subnet = trained_like(space).extract(random_archs(space, 1)[0])
    leaves = {type(module) for module in subnet.modules() if not list(module.children())}
    assert all(leaf.__module__.startswith("torch.nn.") for leaf in leaves)


@every_space
def test_smaller_widths_are_views_of_larger_ones(space):
    """Sub-networks nest: the weights of a smaller one are leading slices of a larger one's."""
    widths = [i for i, gene in enumerate(space.genes) if gene.kind in ("scale", "expand")]
    if not widths:
        pytest.skip("a space without widths")
    supernet = trained_like(space)
    arch = list(full_arch(space))
    large = supernet.extract(tuple(arch)).state_dict()
    arch[widths[0]] -= 1
    small = supernet.extract(tuple(arch)).state_dict()
    assert any(small[name].shape != large[name].shape for name in small)
    for name, tensor in small.items():
        assert torch.equal(tensor, large[name][tuple(slice(n) for n in tensor.shape)])


@spaces_of_exact_siblings
def test_copies_of_the_first_operation_compute_alike(space):
    """Exactly for kernels of other sizes; an xception branch only copies what it can."""
    supernet = trained_like(space).eval()
    first = tuple(0 if gene.kind == "op" else len(gene.choices) - 1 for gene in space.genes)
    other = [
        gene.choices.index(EXACT_SIBLINGS[space.name]) if gene.kind == "op" else choice
        for gene, choice in zip(space.genes, first, strict=True)
    ]
    before = supernet(images(space), first)
    assert not torch.allclose(supernet(images(space), tuple(other)), before, rtol=1e-2)
    space.copy_to_siblings(supernet)
    assert torch.equal(supernet(images(space), first), before)
    torch.testing.assert_close(supernet(images(space), tuple(other)), before)


def test_xception_branches_get_copies_and_identities():
    supernet = trained_like(ShuffleNet())
    ShuffleNet().copy_to_siblings(supernet)
    shuffle3, _, _, xception = supernet.positions[2]
    assert torch.equal(xception.main.conv1.weight, shuffle3.main.conv0.weight)
    assert torch.equal(xception.main.conv2.weight, shuffle3.main.conv1.weight)
    assert torch.equal(xception.main.conv5.weight, shuffle3.main.conv2.weight)
    features = torch.randn(1, 32, 8, 8)
    assert torch.equal(xception.main.conv0(features), features)  # an identity
    wide = torch.randn(1, 64, 8, 8)
    assert torch.equal(xception.main.conv3(wide), wide)


@every_space
def test_every_gene_changes_the_network(space):
    base = full_arch(space)
    for column, gene in enumerate(space.genes):
        for choice in range(len(gene.choices)):
            other = (*base[:column], choice, *base[column + 1 :])
            assert (space.decode(other) == space.decode(base)) == (choice == base[column])


@every_space
def test_blocks_depend_on_the_genes_that_gene_columns_names(space):
    base = full_arch(space)
    rows = space.decode(base)
    assert len(rows) == len(space.gene_columns)
    for column, gene in enumerate(space.genes):
        other = (*base[:column], (base[column] + 1) % len(gene.choices), *base[column + 1 :])
        changed = [a != b for a, b in zip(rows, space.decode(other), strict=True)]
        assert changed == [column in columns for columns in space.gene_columns]


@every_space
def test_architectures_survive_json(space):
    drawn = random_population(space.genes, 3, np.random.default_rng(0))
    for arch in as_architectures(space.canonical(drawn)):
        assert space.from_json(json.loads(json.dumps(space.to_json(arch)))) == arch


@every_space
def test_canonical_is_idempotent(space):
    population = random_population(space.genes, 50, np.random.default_rng(0))
    before = population.copy()
    once = space.canonical(population)
    assert np.array_equal(population, before)
    assert np.array_equal(space.canonical(once), once)


@every_space
def test_canonical_changes_no_network(space):
    population = random_population(space.genes, 20, np.random.default_rng(0))
    once = space.canonical(population)
    for arch, other in zip(as_architectures(population), as_architectures(once), strict=True):
        assert space.decode(arch) == space.decode(other)


@every_space
def test_the_resolution_of_an_architecture_is_that_of_its_first_block(space):
    for arch in [*random_archs(space, 5), full_arch(space)]:
        assert space.resolution_of(arch) == space.decode(arch)[0].resolution <= space.resolution


@every_space
def test_blocks_say_what_features_reach_them(space):
    """Cost and latency tables are computed from each block's channels and resolution."""
    for arch in [full_arch(space), *random_archs(space, 3)]:
        resolution = space.resolution_of(arch)
        features = torch.zeros(1, 3, resolution, resolution)
        for block in filter(None, space.decode(arch)):
            assert features.shape[1:] == (block.in_channels, block.resolution, block.resolution)
            features = block.build().eval()(features)
        assert features.shape == (1, space.num_classes)


@every_space
def test_a_space_is_rebuilt_from_its_description(space):
    assert space_by_name(**json.loads(json.dumps(describe(space)))) == space


@every_space
def test_initial_weights_come_from_the_generator_alone(space):
    def weights(seed):
        network = space.supernet()
        space.initialize(network, torch.Generator().manual_seed(seed))
        return network.state_dict()

    torch.manual_seed(1)
    first = weights(0)
    torch.manual_seed(2)
    assert all(torch.equal(tensor, first[name]) for name, tensor in weights(0).items())
    assert any(not torch.equal(tensor, first[name]) for name, tensor in weights(1).items())


def test_search_ranges_and_sizes():
    assert num_architectures(ShuffleNet().genes) == 32**20
    assert num_architectures(ShuffleNet(first_scale=0).genes) == 40**20
    drawn = random_population(ShuffleNet().genes, 2000, np.random.default_rng(0))
    assert set(drawn[:, 1::2].ravel()) == set(range(2, 10))
    assert set(drawn[:, 0::2].ravel()) == set(range(4))


def test_children_get_each_gene_from_one_parent_and_the_other_from_the_other():
    rng = np.random.default_rng(0)
    mothers, fathers = np.zeros((500, 40), np.int8), np.ones((500, 40), np.int8)
    first, second = crossover(mothers, fathers, rng)
    assert np.array_equal(first + second, np.ones_like(first))
    assert 0.48 < first.mean() < 0.52


def test_embedded_architectures_are_as_far_apart_as_their_genes():
    """An operation is another one or not; a scale is nearer or farther."""
    space = space_class("tiny")(num_classes=7)
    kinds = [gene.kind for gene in space.genes]
    assert kinds == ["op", "scale"] * 3
    population = np.zeros((4, 6), dtype=np.int8)
    population[1, [0, 2]] = 1  # two other operations
    population[2, 3] = 1  # the next scale of three
    population[3, 3] = 2
    vectors = embedded(population, space.genes)
    distances = np.square(vectors[:, None] - vectors).sum(axis=2)
    np.testing.assert_allclose(distances[0], [0, 2, 0.5, 1])
    np.testing.assert_allclose(distances[2], [0.5, 2.5, 0, 0.5])
    four = ShuffleNet(num_classes=7).genes[:1]
    vectors = embedded(np.arange(4, dtype=np.int8)[:, None], four)
    assert four[0].kind == "op" and four[0].first == 0
    np.testing.assert_allclose(np.square(vectors[3] - vectors).sum(axis=1), [1, 1, 1, 0])


def test_mutation_redraws_the_given_share_of_genes():
    genes = ShuffleNet().genes
    rng = np.random.default_rng(0)
    before = random_population(genes, 4000, rng)
    changed = mutate(before, genes, 0.1, rng) != before
    # A redrawn gene keeps its value in 1 of 4 (operation) or 1 of 8 (scale) cases.
    assert abs(changed[:, 0::2].mean() - 0.1 * 3 / 4) < 0.004
    assert abs(changed[:, 1::2].mean() - 0.1 * 7 / 8) < 0.004


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"name": "shufflenets"}, "did you mean 'shufflenet'.* there are \\['mbconv', .*'tiny'\\]"),
        ({"name": "shufflenet", "layot": "oneshot"}, "unknown key 'space.layot'"),
        ({"name": "shufflenet", "layout": "twoshot"}, "space.layout = 'twoshot'"),
        ({"name": "shufflenet", "se": "yes"}, "space.se = 'yes' must be of type bool"),
        ({"name": "shufflenet", "head": "spos"}, "set se = false"),
        ({"name": "shufflenet", "first_scale": 10}, "first_scale = 10"),
        ({"name": "shufflenet", "resolution": 100}, "multiple of 32"),
    ],
)
def test_a_mistake_in_the_space_is_named(options, complaint):
    with pytest.raises(UserError, match=complaint):
        space_by_name(**options)


@pytest.mark.parametrize(
    ("arch", "complaint"),
    [
        ({"block": [0] * 20}, "keys \\['block', 'channel'\\]"),
        ({"block": [0] * 19, "channel": [4] * 20}, "'block' must be a list of 20 integers"),
        ({"block": [0.5] * 20, "channel": [4] * 20}, "list of 20 integers"),
        ({"block": [0] * 20, "channel": [4] * 19 + [10]}, "gene block19.scale = 10"),
    ],
)
def test_an_architecture_outside_the_space_is_named(arch, complaint):
    with pytest.raises(UserError, match=complaint):
        ShuffleNet().from_json(arch)


# The ShuffleNet space, against docs/spec.md, OneShot 1.


def test_middle_widths_are_truncated_and_never_rounded():
    expected = {  # OneShot 1.6: stages 1 to 4
        "oneshot": [
            [6, 12, 19, 25, 32, 38, 44, 51, 57, 64],
            [16, 32, 48, 64, 80, 96, 112, 128, 144, 160],
            [32, 64, 96, 128, 160, 192, 224, 256, 288, 320],
            [64, 128, 192, 256, 320, 384, 448, 512, 576, 640],
        ],
        "shufflenetv2plus": [
            [4, 9, 14, 19, 24, 28, 33, 38, 43, 48],
            [12, 25, 38, 51, 64, 76, 89, 102, 115, 128],
            [25, 51, 76, 102, 128, 153, 179, 204, 230, 256],
            [51, 102, 153, 204, 256, 307, 358, 409, 460, 512],
        ],
    }
    for layout, stages in expected.items():
        space = ShuffleNet(layout=layout)
        for stage, first_block in enumerate((0, 4, 8, 16)):
            mids = [
                space.decode((0, scale) * 20)[1 + first_block].mid_channels
                for scale in range(len(SCALES))
            ]
            assert mids == stages[stage]


def test_published_widths_of_s_plus():
    rows = ShuffleNet().decode(ShuffleNet().named["oneshot-s+"])[1:-1]
    assert [row.mid_channels for row in rows] == [
        *(57, 51, 44, 57, 96, 128, 64, 80, 96, 160, 96, 128, 160, 192, 224, 224),
        *(256, 256, 320, 448),
    ]
    assert [row.out_channels for row in rows[::4]] == [64, 160, 320, 320, 640]
    assert [row.resolution for row in rows if row.stride == 2] == [112, 56, 28, 14]
    assert [row.se for row in rows] == [False] * 8 + [True] * 12
    assert [row.hardswish for row in rows] == [False] * 4 + [True] * 16


def test_the_shuffle_sends_the_first_quarter_of_both_halves_past_the_block():
    """OneShot 1.5: out[2k] = in[k], out[2k + 1] = in[C/2 + k]; the first half is passed on."""
    row = ShuffleNet().decode((0, 4) * 20)[2]
    unit = row.build().eval()
    features = torch.arange(64.0).reshape(1, 64, 1, 1)
    kept = unit(features).flatten()[:32]
    assert kept.tolist() == [value for k in range(16) for value in (k, 32 + k)]


def test_a_stride_2_unit_reads_its_whole_input_unshuffled():
    row = ShuffleNet().decode((0, 4) * 20)[5]  # first block of stage 2: 64 -> 160
    unit = row.build()
    assert not hasattr(unit, "shufflechannels0")
    assert unit.projection[0].in_channels == unit.main[0].in_channels == 64
    assert unit.main.conv2.out_channels == 160 - 64


def test_xception_strides_in_its_first_depthwise_only():
    unit = ShuffleNet().decode((3, 4) * 20)[5].build()
    assert [unit.main.conv0.stride, unit.main.conv2.stride, unit.main.conv4.stride] == [
        (2, 2),
        (1, 1),
        (1, 1),
    ]


@pytest.mark.parametrize(
    ("layout", "squeezed"), [("oneshot", (40, 80)), ("shufflenetv2plus", (32, 64))]
)
def test_squeeze_widths(layout, squeezed):
    space = ShuffleNet(layout=layout)
    for position, width in zip((9, 17), squeezed, strict=True):
        se = space.decode((0, 4) * 20)[position].build().se0
        assert isinstance(se, SqueezeExcite)
        assert se.conv_squeeze.out_channels == width
        assert se.conv_squeeze.bias is not None


def test_every_choice_has_a_projection_of_its_own_kernel():
    supernet = ShuffleNet().supernet()
    kernels = [op.projection[0].kernel_size for op in supernet.positions[1]]
    assert kernels == [(3, 3), (5, 5), (7, 7), (3, 3)]


@pytest.mark.parametrize(
    ("options", "millions"),
    [
        ({}, 17.180248),
        ({"head": "shufflenetv2plus"}, 18.100248),
        ({"se": False, "head": "spos"}, 15.939672),
    ],
)
def test_supernet_sizes(options, millions):
    """OneShot 1.8, recomputed there; the published 15.4 M cannot be reproduced."""
    supernet = ShuffleNet(**options).supernet()
    assert sum(param.numel() for param in supernet.parameters()) == round(millions * 1e6)


def test_published_initial_weights():
    network = build_subnet(ShuffleNet().decode((0, 9) * 20))
    ShuffleNet().initialize(network, torch.Generator().manual_seed(0))
    stds = {
        "stem.first_conv": 0.01,
        "SNB1.main.conv1": 1.0,  # depthwise
        "SNB9.main.conv0": 1 / 160,
        "SNB9.se0.conv_squeeze": 0.01,
        "head.conv_fc": 0.01,
    }
    modules = dict(network.named_modules())
    for name, std in stds.items():
        assert modules[name].weight.std().item() == pytest.approx(std, rel=0.1), name
    assert torch.all(modules["SNB9.main.bn0"].bias == 1e-4)
    assert torch.all(modules["head.conv_fc"].bias == 0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("resolution", [32, 96, 224])
def test_any_resolution_that_is_a_multiple_of_32_runs(layout, resolution):
    space = ShuffleNet(num_classes=3, resolution=resolution, layout=layout)
    network = build_subnet(space.decode(space.named["oneshot"])).eval()
    assert network(images(space, 1)).shape == (1, 3)


def test_one_switch_governs_se_hardswish_and_dropout():
    for se, head in ((True, "after_pooling"), (False, "spos")):
        space = ShuffleNet(se=se, head=head)
        modules = list(build_subnet(space.decode(space.named["oneshot"])).modules())
        assert any(isinstance(module, nn.Hardswish) for module in modules) is se
        assert any(isinstance(module, SqueezeExcite) for module in modules) is se
        [dropout] = [module for module in modules if isinstance(module, nn.Dropout)]
        assert dropout.p == (0.2 if se else 0.1)


def test_a_job_does_not_count_the_classes():
    from nasray.config import SpaceConfig

    with pytest.raises(UserError, match="space.num_classes is that of the data set"):
        make_space(SpaceConfig.model_validate({"name": "tiny", "num_classes": 3}), 3)


def test_a_job_names_its_space():
    from nasray.config import SpaceConfig

    config = SpaceConfig.model_validate(
        {"name": "shufflenet", "resolution": 64, "se": False, "head": "spos"}
    )
    assert make_space(config, 5) == ShuffleNet(5, 64, se=False, head="spos")
