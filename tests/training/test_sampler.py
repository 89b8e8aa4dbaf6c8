"""The architectures of training steps, against the published warm-up table (OneShot 2.1)."""

import numpy as np
import pytest

from nasray.config import Limit, SearchConfig, SupernetConfig
from nasray.costs.table import CostTable
from nasray.errors import UserError
from nasray.search.limits import Limits
from nasray.spaces.nasbench_macro import NasBenchMacro
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.shufflenet import SCALES, ShuffleNet
from nasray.spaces.space import largest
from nasray.spaces.tiny import Tiny
from nasray.training import sampler
from nasray.training.sampler import (
    bands_of,
    check_sampling,
    check_trained_widths,
    fixed_architectures,
    lowest_scale,
    sample,
    sizes_of,
)

SPACE = ShuffleNet()
PUBLISHED = SupernetConfig()


def drawn(config, epoch, steps=300):
    archs = [sample(SPACE, config, seed=0, epoch=epoch, step=step)[0] for step in range(steps)]
    return np.array(archs)


# Spec 2.1: the seed's ten rows, in its 1-based epochs, with the lowest scale of each.
ROWS = [
    (range(61, 62), 1.8),
    (range(62, 63), 1.6),
    (range(63, 64), 1.4),
    (range(64, 65), 1.2),
    (range(65, 67), 1.0),
    (range(67, 70), 0.8),
    (range(70, 74), 0.6),
    (range(74, 79), 0.4),
    (range(79, 121), 0.2),
]


@pytest.mark.parametrize(("epochs", "lowest"), ROWS)
def test_published_channel_warmup(epochs, lowest):
    for epoch in epochs:
        assert lowest_scale(SPACE, PUBLISHED, epoch - 1) == lowest
    for epoch in (epochs[0], epochs[-1]):
        scales = drawn(PUBLISHED, epoch - 1)[:, 1::2]
        assert set(scales.ravel()) == set(range(SCALES.index(lowest), 10))


def test_block_selection_comes_first_at_full_width():
    for epoch in (0, 59):
        archs = drawn(PUBLISHED, epoch)
        assert set(archs[:, 1::2].ravel()) == {9}
        assert set(archs[:, 0::2].ravel()) == {0, 1, 2, 3}


def test_a_shared_start_trains_the_first_operations_at_full_width():
    config = SupernetConfig(shared_start_epochs=3, channel_warmup_start=5)
    assert set(map(tuple, drawn(config, 2, steps=20))) == {(0, 9) * 20}
    assert set(drawn(config, 3)[:, 0::2].ravel()) == {0, 1, 2, 3}


def test_operations_and_scales_are_uniform_and_independent():
    archs = drawn(PUBLISHED, 119, steps=2000)
    ops = np.bincount(archs[:, 0::2].ravel(), minlength=4) / archs[:, 0::2].size
    scales = np.bincount(archs[:, 1::2].ravel(), minlength=10) / archs[:, 1::2].size
    assert np.abs(ops - 1 / 4).max() < 0.01
    assert np.abs(scales - 1 / 10).max() < 0.01
    correlation = np.corrcoef(archs.T) - np.eye(40)
    assert np.abs(correlation).max() < 0.12


def test_a_step_is_a_pure_function_of_seed_epoch_and_step():
    def at(**changes):
        place = {"seed": 1, "epoch": 119, "step": 7} | changes
        return sample(SPACE, PUBLISHED, **place)[0]

    assert at() == at()
    assert len({at(), at(seed=2), at(epoch=118), at(step=8)}) == 4


def test_warmup_can_be_squeezed_and_stopped_at_a_scale():
    config = SupernetConfig(
        channel_warmup_start=2, channel_warmup_epochs=6, smallest_scale=0.6, epochs=20
    )
    lows = [lowest_scale(SPACE, config, epoch) for epoch in range(20)]
    assert lows[:2] == [2.0, 2.0]
    assert lows[2] == 1.8
    assert lows == sorted(lows, reverse=True)
    assert lows[8:] == [0.6] * 12


def test_spaces_with_fewer_scales_warm_up_too():
    tiny = Tiny()
    config = SupernetConfig(channel_warmup_start=0, channel_warmup_epochs=24)
    lows = [lowest_scale(tiny, config, epoch) for epoch in range(30)]
    assert set(lows) == {2.0, 1.0, 0.5}
    assert lows == sorted(lows, reverse=True)


def test_fixed_architectures_are_fixed():
    assert fixed_architectures(SPACE, PUBLISHED, 0) == fixed_architectures(SPACE, PUBLISHED, 0)
    assert fixed_architectures(SPACE, PUBLISHED, 0) != fixed_architectures(SPACE, PUBLISHED, 1)


def test_widths_that_are_searched_but_never_trained_are_refused():
    for config in (
        SupernetConfig(epochs=20, channel_warmup_start=15),  # the table has not come down yet
        SupernetConfig(smallest_scale=1.0),
    ):
        with pytest.raises(UserError, match="never trained"):
            check_trained_widths(SPACE, config)
    check_trained_widths(SPACE, PUBLISHED)
    check_trained_widths(ShuffleNet(first_scale=0), PUBLISHED)


def test_an_elastic_space_shrinks_kernels_then_depths_then_expansions():
    """Progressive shrinking (Cai et al. 2020): what is not open yet stays at its largest."""
    space = OfaMobileNetV3(resolution=64, resolutions=(48, 64))
    config = SupernetConfig(epochs=20, channel_warmup_start=4, channel_warmup_epochs=9)
    opened = {"kernel": 4, "depth": 7, "expand": 10}
    for epoch in (0, 3, 4, 6, 7, 9, 10, 19):
        archs = np.array(
            [sample(space, config, seed=0, epoch=epoch, step=step)[0] for step in range(60)]
        )
        for column, gene in enumerate(space.genes):
            full = {len(gene.choices) - 1} if epoch < opened.get(gene.kind, 0) else None
            assert set(archs[:, column]) == (full or set(range(len(gene.choices)))), (epoch, gene)


def test_choices_that_no_epoch_opens_are_refused_before_training():
    space = OfaMobileNetV3(resolution=64, resolutions=(64,))
    config = SupernetConfig(epochs=10, channel_warmup_start=4, channel_warmup_epochs=9)
    with pytest.raises(UserError, match="expands below 6 are never trained"):
        check_trained_widths(space, config)
    check_trained_widths(space, config.model_copy(update={"epochs": 11}))


SANDWICH = SupernetConfig(
    epochs=4, channel_warmup_start=1, channel_warmup_epochs=0, sampling="sandwich"
)


def test_a_sandwich_is_the_largest_the_smallest_and_random_ones():
    space = OfaMobileNetV3(resolution=64, resolutions=(48, 64))
    full, small = largest(space), (0,) * len(space.genes)
    steps = [sample(space, SANDWICH, seed=0, epoch=1, step=step) for step in range(50)]
    assert all(step[:2] == [full, small] and len(step) == 4 for step in steps)
    drawn = np.array([arch for step in steps for arch in step[2:]])
    for column, gene in enumerate(space.genes):
        assert set(drawn[:, column]) == set(range(len(gene.choices)))
    assert steps[0] == sample(space, SANDWICH, seed=0, epoch=1, step=0) != steps[1]


def test_the_operations_of_a_sandwich_are_all_drawn_at_both_ends():
    steps = [sample(SPACE, SANDWICH, seed=0, epoch=1, step=step) for step in range(50)]
    for end, scale in ((0, 9), (1, 0)):
        archs = np.array([step[end] for step in steps])
        assert set(archs[:, 1::2].ravel()) == {scale}
        assert set(archs[:, 0::2].ravel()) == {0, 1, 2, 3}


def test_a_sandwich_of_what_is_open_holds_no_subnet_twice():
    space = OfaMobileNetV3(resolution=64, resolutions=(64,))
    assert sample(space, SANDWICH, seed=0, epoch=0, step=0) == [largest(space)]


def test_a_warmup_of_no_epochs_opens_everything_at_once():
    assert [lowest_scale(SPACE, SANDWICH, epoch) for epoch in range(3)] == [2.0, 0.2, 0.2]
    check_trained_widths(SPACE, SANDWICH)
    check_trained_widths(SPACE, SupernetConfig(init="supernet.pt"))
    check_trained_widths(SPACE, SupernetConfig(init="supernet.pt", epochs=0, smallest_scale=1))


def test_the_largest_alone_is_drawn_for_a_teacher():
    space = OfaMobileNetV3(resolution=64, resolutions=(48, 64))
    config = SANDWICH.model_copy(update={"sampling": "largest"})
    steps = [sample(space, config, seed=0, epoch=1, step=step) for step in range(5)]
    assert steps == 5 * [[largest(space)]]
    assert fixed_architectures(space, config, 0) == [largest(space)]
    with pytest.raises(UserError, match="trains one subnet"):
        check_trained_widths(space, config)


def test_the_teacher_of_a_space_with_operations_is_the_one_that_is_trained():
    config = SANDWICH.model_copy(update={"sampling": "largest"})
    steps = [sample(SPACE, config, seed=0, epoch=0, step=step) for step in range(5)]
    assert steps == 5 * [[largest(SPACE)]] == 5 * [fixed_architectures(SPACE, config, 0)]


ALL_AT_ONCE = {"epochs": 20, "channel_warmup_start": 0, "channel_warmup_epochs": 0}
FAIR = SupernetConfig(**ALL_AT_ONCE, sampling="fair")
MACRO = NasBenchMacro()


def test_a_fair_round_has_each_operation_of_each_block_once():
    rounds = [np.array(sample(MACRO, FAIR, seed=0, epoch=1, step=step)) for step in range(300)]
    for archs in rounds:
        assert (np.sort(archs, axis=0) == np.arange(3)[:, None]).all()
    # Blocks are shuffled independently of one another, all orders alike.
    first = np.array([archs[0] for archs in rounds])
    assert np.abs(np.bincount(first.ravel()) / first.size - 1 / 3).max() < 0.03
    assert np.abs(np.corrcoef(first.T) - np.eye(8)).max() < 0.2
    assert (rounds[7] == sample(MACRO, FAIR, seed=0, epoch=1, step=7)).all()


def test_a_rank_loss_has_the_subnets_of_a_step_by_their_macs():
    config = FAIR.model_copy(update={"rank_loss": 2.0})
    for step in range(20):
        archs = sample(MACRO, config, seed=0, epoch=1, step=step)
        assert set(archs) == set(sample(MACRO, FAIR, seed=0, epoch=1, step=step))
        macs = CostTable(MACRO)(np.array(archs, dtype=np.int8))["macs"].tolist()
        assert macs == sorted(macs) == [size for _, size in sizes_of(MACRO, archs)]
    ends = sizes_of(MACRO, [(0,) * 8, (2,) * 8, (1,) * 8])
    assert [place for place, _ in ends[:2]] == [0, 1] and 0 < ends[2][0] < 1


def test_fair_takes_spaces_whose_only_choices_are_operations():
    check_sampling(MACRO, FAIR)
    at_full_width = FAIR.model_copy(update={"smallest_scale": 2.0})
    check_sampling(ShuffleNet(first_scale=9), at_full_width)
    archs = np.array(sample(SPACE, at_full_width, seed=0, epoch=1, step=0))
    assert archs.shape == (4, 40) and (archs[:, 1::2] == 9).all()
    with pytest.raises(UserError, match=r"fair to operations only, .* draws scales, too, from 0.2"):
        check_sampling(SPACE, FAIR)
    with pytest.raises(UserError, match=r"draws kernels, too"):
        check_sampling(OfaMobileNetV3(), FAIR)
    check_sampling(SPACE, FAIR.model_copy(update={"epochs": 0}))


def test_a_shared_start_needs_an_operation_that_can_be_copied():
    shared = SupernetConfig(shared_start_epochs=3)
    check_sampling(SPACE, shared)
    for space in (MACRO, OfaMobileNetV3()):
        with pytest.raises(UserError, match="shared_start_epochs = 3 .* set it to 0"):
            check_sampling(space, shared)


BANDED = SupernetConfig(**ALL_AT_ONCE, sampling="banded")


def drawn_within(space, bands, epochs=(0, 5), steps=400, config=BANDED):
    return np.array(
        [
            sample(space, config, seed=0, epoch=epoch, step=step, bands=bands)[0]
            for epoch in epochs
            for step in range(steps)
        ],
        dtype=np.int8,
    )


@pytest.mark.parametrize("ends", [(15e6, 45e6), (60e6, 100e6), (10e6, 40e6)])
def test_banded_draws_fill_a_band_evenly(ends):
    limit = Limit(cost="macs", min=ends[0], max=ends[1])
    archs = drawn_within(MACRO, bands_of(Limits(MACRO, (limit,)), SearchConfig()))
    macs = CostTable(MACRO)(archs)["macs"]
    assert macs.min() >= ends[0] and macs.max() <= ends[1]
    assert abs(macs.mean() - sum(ends) / 2) < 0.06 * (ends[1] - ends[0])
    assert len(set(map(tuple, archs))) > 60
    sampler._intervals.cache_clear()  # as in a worker that resumes
    bands = bands_of(Limits(MACRO, (limit,)), SearchConfig())
    assert (drawn_within(MACRO, bands) == archs).all()


def test_a_band_may_be_given_as_two_limits():
    limits = (Limit(cost="macs", max=100e6), Limit(cost="params", max=3e6))
    limits += (Limit(cost="macs", min=60e6),)
    archs = drawn_within(MACRO, bands_of(Limits(MACRO, limits), SearchConfig()))
    macs = CostTable(MACRO)(archs)["macs"]
    assert macs.min() >= 60e6 and abs(macs.mean() - 80e6) < 2e6


def test_banded_draws_are_within_all_limits():
    limits = (Limit(cost="params", max=1.2e6), Limit(cost="macs", min=30e6, max=60e6))
    archs = drawn_within(MACRO, bands_of(Limits(MACRO, limits), SearchConfig()))
    costs = CostTable(MACRO)(archs)
    assert costs["params"].max() <= 1.2e6
    assert 30e6 <= costs["macs"].min() and costs["macs"].max() <= 60e6


def test_limits_that_are_answered_one_by_one_are_all_drawn_within():
    limits = tuple(Limit(cost="macs", max=end) for end in (20e6, 50e6)) + (
        Limit(cost="params", max=2e6),
    )
    bands = bands_of(Limits(MACRO, limits), SearchConfig(algorithm="front"))
    assert [band.limits for band in bands] == [(limits[0], limits[2]), (limits[1], limits[2])]
    macs = CostTable(MACRO)(drawn_within(MACRO, bands))["macs"]
    assert macs.max() <= 50e6 and 0.5 < (macs <= 20e6).mean() < 0.7
    [together] = bands_of(Limits(MACRO, limits), SearchConfig())  # genetic answers once
    assert together.limits == limits


def test_banded_draws_what_is_open_until_all_is():
    config = SupernetConfig(epochs=20, channel_warmup_start=4, sampling="banded")
    config = config.model_copy(update={"channel_warmup_epochs": 9})
    limit = Limit(cost="macs", min=250e6, max=300e6)
    bands = bands_of(Limits(SPACE, (limit,)), SearchConfig())
    assert set(drawn_within(SPACE, bands, (3,), 50, config)[:, 1::2].ravel()) == {9}
    macs = CostTable(SPACE)(drawn_within(SPACE, bands, (13,), 50, config))["macs"]
    assert macs.min() >= 250e6 and macs.max() <= 300e6


def test_the_random_ones_of_a_sandwich_are_drawn_within_limits():
    space = OfaMobileNetV3()
    limits = tuple(Limit(cost="macs", max=end) for end in (200e6, 300e6))
    bands = bands_of(Limits(space, limits), SearchConfig(algorithm="front"))
    config = SupernetConfig(**ALL_AT_ONCE, sampling="sandwich", sandwich_within_limits=True)
    ends, random = set(), []
    for step in range(100):
        first, second, *others = sample(space, config, seed=0, epoch=0, step=step, bands=bands)
        ends.add((first, second))
        random += others
    assert len(ends) == 1
    macs = CostTable(space)(np.array(random, dtype=np.int8))["macs"]
    assert len(random) == 200 and macs.max() <= 300e6 and 0.4 < (macs <= 200e6).mean() < 0.8
    free = config.model_copy(update={"sandwich_within_limits": False})
    drawn = [sample(space, free, seed=0, epoch=0, step=step)[2] for step in range(100)]
    assert CostTable(space)(np.array(drawn, dtype=np.int8))["macs"].max() > 300e6
