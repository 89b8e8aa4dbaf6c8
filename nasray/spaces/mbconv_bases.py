"""Published networks of inverted residual blocks: one table of stages each.

Sources: EfficientNet (Tan and Le 2019, arXiv 1905.11946) and its Lite variants (TensorFlow's
efficientnet/lite), MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381), MobileNetV3 (Howard et al.
2019, arXiv 1905.02244), MnasNet (Tan et al. 2019, arXiv 1807.11626) and ProxylessNAS (Cai et al.
2019, arXiv 1812.00332). The same network circulates with other epsilons and paddings, because
weights come from TensorFlow or from PyTorch; each of these has a name of its own here.
"""

from dataclasses import dataclass, replace
from math import ceil

from nasray.spaces.ofa_mbconv import div8


@dataclass(frozen=True)
class BaseBlock:
    """One inverted residual block of a base network."""

    kernel: int
    mid_channels: int
    squeezed: int = 0  # channels in the middle of squeeze-and-excitation; 0: there is none


@dataclass(frozen=True)
class BaseStage:
    """Blocks of one output width, the first of which strides."""

    out_channels: int
    stride: int
    act: str
    blocks: tuple[BaseBlock, ...]


@dataclass(frozen=True)
class Base:
    """A published network: stem, stages, head."""

    stem: int  # output channels of the 3x3 convolution with stride 2
    act: str  # of stem and head
    stages: tuple[BaseStage, ...]
    head: int  # output channels of the 1x1 convolution before the pooling
    features: int = 0  # of a biased 1x1 convolution after the pooling (MobileNetV3); 0: none
    gate: str = "sigmoid"  # of squeeze-and-excitation
    squeeze_act: str = "swish"
    eps: float = 1e-5  # of BN
    padding: str = "symmetric"  # or "tensorflow": one more pixel right and below, where uneven


def _stages(
    rows: list[tuple[int, int, int, int, int]], *, act: str, stem: int, se: bool = False
) -> tuple[BaseStage, ...]:
    """Stages from rows of expand ratio, kernel, stride, output channels, number of blocks.

    A squeeze has a quarter of the block's input channels, as in EfficientNet.
    """
    stages, in_channels = [], stem
    for expand, kernel, stride, out_channels, number in rows:
        blocks = []
        for _ in range(number):
            blocks.append(
                BaseBlock(kernel, in_channels * expand, max(1, in_channels // 4) if se else 0)
            )
            in_channels = out_channels
        stages.append(BaseStage(out_channels, stride, act, tuple(blocks)))
    return tuple(stages)


EFFICIENTNET = [
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
]


def _lite(width: float, depth: float) -> Base:
    """EfficientNet-Lite: no SE, ReLU6; stem, head and the ends' depths are not scaled."""
    rows = []
    for index, (expand, kernel, stride, out_channels, number) in enumerate(EFFICIENTNET):
        at_an_end = index in (0, len(EFFICIENTNET) - 1)
        scaled = number if at_an_end else ceil(number * depth)
        rows.append((expand, kernel, stride, div8(out_channels * width), scaled))
    stages = _stages(rows, act="relu6", stem=32)
    return Base(32, "relu6", stages, 1280, eps=1e-3, padding="tensorflow")


def _mobilenet_v3(
    rows: list[tuple[int, int, bool, str, int, tuple[int, ...]]], *, head: int, features: int
) -> Base:
    """MobileNetV3 from rows of output channels, kernel, SE, activation, stride, middle widths."""
    stages = tuple(
        BaseStage(
            out_channels,
            stride,
            act,
            tuple(BaseBlock(kernel, mid, div8(mid // 4) if se else 0) for mid in widths),
        )
        for out_channels, kernel, se, act, stride, widths in rows
    )
    return Base(16, "h_swish", stages, head, features, "h_sigmoid", "relu", eps=1e-3)


B0 = Base(32, "swish", _stages(EFFICIENTNET, act="swish", stem=32, se=True), 1280)

V3_LARGE = _mobilenet_v3(
    [
        (16, 3, False, "relu", 1, (16,)),
        (24, 3, False, "relu", 2, (64, 72)),
        (40, 5, True, "relu", 2, (72, 120, 120)),
        (80, 3, False, "h_swish", 2, (240, 200, 184, 184)),
        (112, 3, True, "h_swish", 1, (480, 672)),
        (160, 5, True, "h_swish", 2, (672, 960, 960)),
    ],
    head=960,
    features=1280,
)

V3_SMALL = _mobilenet_v3(
    [
        (16, 3, True, "relu", 2, (16,)),
        (24, 3, False, "relu", 2, (72, 88)),
        (40, 5, True, "h_swish", 2, (96, 240, 240)),
        (48, 5, True, "h_swish", 1, (120, 144)),
        (96, 5, True, "h_swish", 2, (288, 576, 576)),
    ],
    head=576,
    features=1024,
)

V2 = Base(
    32,
    "relu6",
    _stages(
        [
            (1, 3, 1, 16, 1),
            (6, 3, 2, 24, 2),
            (6, 3, 2, 32, 3),
            (6, 3, 2, 64, 4),
            (6, 3, 1, 96, 3),
            (6, 3, 2, 160, 3),
            (6, 3, 1, 320, 1),
        ],
        act="relu6",
        stem=32,
    ),
    1280,
)

MNASNET = Base(
    32,
    "relu",
    _stages(
        [
            (1, 3, 1, 16, 1),
            (3, 3, 2, 24, 3),
            (3, 5, 2, 40, 3),
            (6, 5, 2, 80, 3),
            (6, 3, 1, 96, 2),
            (6, 5, 2, 192, 4),
            (6, 3, 1, 320, 1),
        ],
        act="relu",
        stem=32,
    ),
    1280,
)

# Output channels, stride, then kernel and expand ratio of each block.
PROXYLESS_ROWS: list[tuple[int, int, tuple[tuple[int, int], ...]]] = [
    (16, 1, ((3, 1),)),
    (32, 2, ((5, 3), (3, 3))),
    (40, 2, ((7, 3), (3, 3), (5, 3), (5, 3))),
    (80, 2, ((7, 6), (5, 3), (5, 3), (5, 3))),
    (96, 1, ((5, 6), (5, 3), (5, 3), (5, 3))),
    (192, 2, ((7, 6), (7, 6), (7, 3), (7, 3))),
    (320, 1, ((7, 6),)),
]


def _proxyless() -> Base:
    stages, in_channels = [], 32
    for out_channels, stride, rows in PROXYLESS_ROWS:
        blocks = []
        for kernel, expand in rows:
            blocks.append(BaseBlock(kernel, in_channels * expand))
            in_channels = out_channels
        stages.append(BaseStage(out_channels, stride, "relu6", tuple(blocks)))
    return Base(32, "relu6", tuple(stages), 1280, eps=1e-3)


LITE = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2), 3: (1.2, 1.4), 4: (1.4, 1.8)}
TENSORFLOW = {"eps": 1e-3, "padding": "tensorflow"}

# By the names of torchvision and timm. TensorFlow's weights ("tf_") pad unevenly; the Lite ones
# exist as those, and timm trained its own efficientnet_lite0.
BASES: dict[str, Base] = {
    **{f"efficientnet_lite{number}": _lite(*scales) for number, scales in LITE.items()},
    **{f"tf_efficientnet_lite{number}": _lite(*scales) for number, scales in LITE.items()},
    "timm_efficientnet_lite0": replace(_lite(*LITE[0]), eps=1e-5, padding="symmetric"),
    "efficientnet_b0": B0,
    "tf_efficientnet_b0": replace(B0, **TENSORFLOW),
    "mobilenet_v2": V2,
    "mobilenetv2_100": V2,
    "mobilenet_v3_large": V3_LARGE,
    "mobilenet_v3_small": V3_SMALL,
    "mobilenetv3_large_100": replace(V3_LARGE, eps=1e-5),
    "mobilenetv3_small_100": replace(V3_SMALL, eps=1e-5),
    "tf_mobilenetv3_large_100": replace(V3_LARGE, **TENSORFLOW),
    "tf_mobilenetv3_small_100": replace(V3_SMALL, **TENSORFLOW),
    "mnasnet1_0": MNASNET,
    "mnasnet_100": MNASNET,
    "proxylessnas_mobile": _proxyless(),
}
