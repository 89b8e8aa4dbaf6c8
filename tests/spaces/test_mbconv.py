"""The elastic space around published networks; what all spaces share is in test_spaces.py."""

import pytest

from nasray.costs.profile import profile, total
from nasray.errors import UserError
from nasray.spaces import space_by_name
from nasray.spaces.mbconv_blocks import same_padding

# Multiply-accumulates and parameters at 224 pixels, as torchvision's documentation has them.
PUBLISHED = {
    "efficientnet_b0": (0.39e9, 5_288_548),
    "mobilenet_v2": (0.30e9, 3_504_872),
    "mobilenet_v3_large": (0.22e9, 5_483_032),
    "mobilenet_v3_small": (0.06e9, 2_542_856),
    "mnasnet1_0": (0.31e9, 4_383_312),
}


@pytest.mark.parametrize("base", PUBLISHED)
def test_the_largest_subnet_costs_what_the_base_does(base):
    space = space_by_name("mbconv", base=base, num_classes=1000)
    costs = total(profile(space, space.named["largest"]))
    macs, params = PUBLISHED[base]
    assert costs["params"] == params
    assert costs["macs"] == pytest.approx(macs, abs=0.006e9)


@pytest.mark.parametrize(
    ("kernel", "stride", "side", "margins"),
    [(3, 2, 224, (0, 1)), (3, 2, 13, (1, 1)), (5, 2, 14, (1, 2)), (5, 2, 7, (2, 2))],
)
def test_tensorflow_pads_more_behind_where_it_is_uneven(kernel, stride, side, margins):
    assert same_padding(kernel, stride, side) == margins


def test_a_smaller_kernel_of_a_stride_stays_on_the_same_pixels():
    """The centre of TensorFlow's 5x5 window is that of its 3x3 one, at even and odd sides."""
    for side in (13, 14):
        larger, smaller = same_padding(5, 2, side), same_padding(3, 2, side)
        assert larger[0] - 2 == smaller[0] - 1


def test_depths_keep_the_first_blocks_of_a_stage():
    space = space_by_name("mbconv", base="efficientnet_lite0")
    depths = [gene.choices for gene in space.genes if gene.kind == "depth"]
    assert depths == [(1, 2), (1, 2), (1, 2, 3), (1, 2, 3), (2, 3, 4)]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"base": "efficientnet_lit0"}, "did you mean 'efficientnet_lite0'"),
        ({"base": "vgg16"}, "space.base = 'vgg16' is unknown; there are efficientnet_lite0,"),
        ({"expand_shares": (0.5, 0.75)}, "end with 1.0"),
        ({"expand_shares": (0.75, 0.5, 1.0)}, "ascending"),
        ({"expand_shares": ()}, "expand_shares = \\[\\]"),
        ({"expand_shares": (0.0, 1.0)}, "above 0"),
        ({"width": 1.2}, "unknown key 'space.width'"),
        ({"resolutions": (32, 256)}, "space.resolution"),
    ],
)
def test_a_wrong_option_is_named(options, complaint):
    with pytest.raises(UserError, match=complaint):
        space_by_name("mbconv", **options)
