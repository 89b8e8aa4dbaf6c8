"""The lines in which the OFA code prints sub-networks (docs/spec.md, OFA 1.6)."""

import numpy as np
import pytest

from nasray.errors import UserError
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.ofa_proxyless import OfaProxyless
from nasray.spaces.ofa_resnet50d import OfaResNet50D
from nasray.spaces.ofa_strings import format, parse
from nasray.spaces.population import as_architectures, random_population

SPACES = [OfaMobileNetV3(), OfaProxyless(), OfaResNet50D()]
every_space = pytest.mark.parametrize("space", SPACES, ids=lambda space: space.name)


@every_space
def test_printed_lines_are_read_back(space):
    drawn = space.canonical(random_population(space.genes, 20, np.random.default_rng(0)))
    if space.name == "ofa_resnet50d":
        drawn[:, 18] = 2  # the two narrower stems have one width, and one line
    for arch in as_architectures(drawn):
        lines = format(space, arch)
        assert parse(lines, space) == arch
        without = [*lines[:-1], "MyGlobalAvgPool2d(keep_dim=True)", ""]
        assert parse(without, space, space.resolution_of(arch)) == arch


def test_lines_as_published():
    """Spec 1.6, and the resolution."""
    space = OfaMobileNetV3()
    lines = format(space, space.named["smallest"])
    assert lines[:6] == [
        "3x3_Conv_O24_H_SWISH_BN",
        "(3x3_MBConv1_RELU_O24_BN, Identity)",
        "((O32, E3.0, K3), None)",
        "((O32, E3.0, K3), Identity)",
        "(SE(O48, E3.0, K3), None)",
        "(SE(O48, E3.0, K3), Identity)",
    ]
    assert lines[-4:] == [
        "1x1_Conv_O1152_H_SWISH_BN",
        "1x1_Conv_O1536_H_SWISH",
        "1536x1000_Linear",
        "resolution 160",
    ]
    lines = format(OfaProxyless(), OfaProxyless().named["largest"])
    assert lines[:2] == ["3x3_Conv_O40_RELU6_BN", "(3x3_MBConv1_RELU6_O24_BN, None)"]
    assert lines[22:] == [
        "((O416, E6.0, K7), None)",
        "1x1_Conv_O1664_RELU6_BN",
        "1664x1000_Linear",
        "resolution 224",
    ]
    lines = format(OfaResNet50D(), OfaResNet50D().named["largest"])
    assert lines[:7] == [
        "DyConv(O32, K3, S2)",
        "(DyConv(O32, K3, S1), Identity)",
        "DyConv(O64, K3, S1)",
        "max_pooling(ks=3, stride=2)",
        *("(3x3_BottleneckConv_in->88->256_S1, avgpool_conv)",),
        *("(3x3_BottleneckConv_in->88->256_S1, Identity)",) * 2,
    ]
    assert lines[8] == "(3x3_BottleneckConv_in->176->512_S2, avgpool_conv)"


def broken(lines, old, new):
    return [line.replace(old, new) for line in lines]


@pytest.mark.parametrize(
    ("space", "edit", "complaint"),
    [
        (SPACES[0], lambda lines: lines[:-1], "do not say the resolution"),
        (SPACES[0], lambda lines: broken(lines, " 160", " 161"), "resolution = 161 must be one of"),
        (SPACES[0], lambda lines: broken(lines, "E3.0", "E5.0"), "expand = 5 must be one of"),
        (SPACES[0], lambda lines: broken(lines, "O96", "O80"), "must be '\\(\\(O96"),
        (SPACES[0], lambda lines: lines[:2] + lines[3:], "stage0.depth = 1"),
        (
            SPACES[0],
            lambda lines: [*lines[:5], *lines[4:]],
            "and the lines are of 6, of 11 blocks",
        ),
        (SPACES[0], lambda lines: lines[1:], "the line"),
        # What notebooks print for "ResNet50D": MobileNetV3's expand ratios (docs/spec.md, OFA 1.6).
        (
            SPACES[2],
            lambda lines: broken(lines, "->32->168", "->504->168"),
            "middle channels of 168",
        ),
        (SPACES[2], lambda lines: broken(lines, "->1328", "->1536"), "width = 1536"),
    ],
)
def test_lines_of_another_network_are_refused(space, edit, complaint):
    lines = format(space, space.named["smallest"])
    with pytest.raises(UserError, match=complaint):
        parse(edit(lines), space)


def test_lines_of_two_architectures_are_those_of_the_smaller():
    space = OfaResNet50D(7, 64, (32, 48, 64), 0.6)  # whose ratios often round to one width
    smallest = space.named["smallest"]
    assert parse(format(space, smallest), space) == smallest


def test_a_second_resolution_is_refused():
    space = OfaMobileNetV3()
    with pytest.raises(UserError, match="'resolution 160', not 224"):
        parse(format(space, space.named["smallest"]), space, 224)
