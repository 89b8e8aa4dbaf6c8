"""Races against a bar: what they drop would not have reached it, and fewer images are judged."""

import numpy as np
import pytest
import torch
from torch import nn

from nasray.evaluate import evaluate
from nasray.racing import Race, pack, slice_ends, slice_top1, unpack


def correct(rng, number, top1, like=None, agreement=0.9):
    """Which of `number` images a network of this top-1 has right, mostly those of `like`."""
    own = rng.random(number) < top1
    return own if like is None else np.where(rng.random(number) < agreement, like, own)


def judged(race, bits):
    """How many images a race judges of a candidate with these bits."""
    for end in slice_ends(len(bits)):
        if race.is_lost(bits[:end]):
            return end
    return len(bits)


@pytest.mark.parametrize("number", [10, 64, 100, 1000, 50_000])
def test_slices_grow_to_all_images(number):
    ends = slice_ends(number)
    assert ends[-1] == number and all(a < b for a, b in zip(ends, ends[1:], strict=False))
    assert ends[0] == min(number, max(64, number // 16))


def test_slice_accuracies_are_those_of_the_slices():
    bits = np.arange(1000) < 125
    assert slice_ends(1000) == (64, 128, 256, 512, 1000)
    assert slice_top1(bits, 1000) == (1.0, 61 / 64, 0.0, 0.0, 0.0)
    assert slice_top1(bits[:128], 1000) == (1.0, 61 / 64)


def test_packing_keeps_every_bit():
    bits = np.random.default_rng(0).random(77) < 0.5
    np.testing.assert_array_equal(unpack(pack(bits), 77), bits)
    assert len(pack(bits)) == 10


def test_what_would_reach_the_bar_is_hardly_ever_dropped_and_what_is_far_below_is_soon():
    """2,000 candidates around a bar of 80 %, 5,000 images."""
    rng = np.random.default_rng(0)
    bar = correct(rng, 5000, 0.8)
    race = Race(bar, 0.99)
    wrongly = good = images = 0
    for _ in range(2000):
        bits = correct(rng, 5000, rng.uniform(0.6, 0.9), like=bar)
        seen = judged(race, bits)
        images += seen
        if bits.mean() >= bar.mean():
            good += 1
            wrongly += seen < 5000
        else:
            assert race.fitness(bits[:seen]) < bar.mean() or seen == 5000
    assert good > 400 and wrongly / good <= 0.01
    hopeless = correct(rng, 5000, 0.3)
    assert judged(race, hopeless) == slice_ends(5000)[0]
    assert images < 0.9 * 2000 * 5000


def test_a_race_that_is_run_to_the_end_is_decided_by_its_top1():
    rng = np.random.default_rng(1)
    bar = correct(rng, 300, 0.5)
    race = Race(bar, 0.99)
    worse = bar.copy()
    worse[-1] = not worse[-1]
    assert not race.is_lost(worse)
    assert race.fitness(worse) == worse.mean()


def test_the_estimate_of_a_dropped_candidate_is_close_and_below_the_bar():
    rng = np.random.default_rng(2)
    bar = correct(rng, 20_000, 0.8)
    bits = correct(rng, 20_000, 0.4, like=bar)
    race = Race(bar, 0.99)
    seen = judged(race, bits)
    assert seen < 20_000
    assert race.fitness(bits[:seen]) == pytest.approx(bits.mean(), abs=0.02)
    assert race.fitness(bits[:seen]) < bar.mean()


class Sign(nn.Module):
    """Class 1 if the first pixel is bright."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, batch):
        self.seen += len(batch)
        bright = batch[:, 0, 0, 0]
        return torch.stack((-bright, bright), dim=1)


def test_evaluation_stops_after_the_slice_in_which_a_race_is_lost():
    labels = np.arange(640) % 2
    images = np.repeat(labels[:, None, None, None] * 255, 3, axis=1).astype(np.uint8)
    network = Sign()
    bits = evaluate(network, images[:2], images, labels, batch_size=50)
    assert bits.all() and network.seen == 640
    lost = evaluate(Sign(), images[:2], images, 1 - labels, batch_size=50, race=Race(bits, 0.99))
    assert len(lost) == 64 and not lost.any()
    won = evaluate(Sign(), images[:2], images, labels, batch_size=50, race=Race(bits, 0.99))
    assert len(won) == 640
