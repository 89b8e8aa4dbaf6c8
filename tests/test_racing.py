"""Races: what they drop would not have won, and they judge far fewer images for it."""

import numpy as np
import pytest
import torch
from torch import nn

from nasray.evaluate import evaluate
from nasray.racing import Form, Race, pack, slice_ends, slice_top1, unpack

NUMBER = 3000  # of images


class Networks:
    """Draws which images networks have right, of hard and easy ones, each some `times` over."""

    def __init__(self, seed, times=1):
        self.rng = np.random.default_rng(seed)
        self.times = times
        self.ease = self.rng.normal(0.5, 3.0, NUMBER // times)

    def draw(self, ability):
        chance = 1 / (1 + np.exp(-self.ease - ability))
        return np.repeat(self.rng.random(len(chance)) < chance, self.times)

    def race(self, confidence=0.99, above=0.15):
        records = np.array([self.draw(ability) for ability in self.rng.normal(0, 0.2, 30)])
        bar = self.draw(above)
        return Race(Form.of(records), int(bar.sum()), confidence)


def judged(race, bits):
    """How many images a race judges of a candidate with these bits."""
    ordered = bits[race.form.order]
    for end in slice_ends(len(bits)):
        if race.is_lost(ordered[:end]):
            return end
    return len(bits)


def dropped(networks, races):
    """Of candidates dropped, the share that would have won; and the share of images judged."""
    wrongly = number = images = 0
    for _ in range(races):
        race = networks.race()
        for ability in networks.rng.normal(0, 0.2, 30):
            bits = networks.draw(ability)
            seen = judged(race, bits)
            images += seen
            number += seen < NUMBER
            wrongly += seen < NUMBER and bits.sum() >= race.target
    assert number > 10 * races
    return wrongly / number, images / (races * 30 * NUMBER)


@pytest.mark.parametrize("number", [10, 32, 100, 1000, 50_000])
def test_slices_grow_to_all_images(number):
    ends = slice_ends(number)
    sizes = np.diff([0, *ends])
    assert ends[-1] == number and len(ends) <= 16
    assert min(sizes) >= min(number, 32) and max(sizes) - min(sizes) <= 1


def test_slice_accuracies_are_those_of_the_slices():
    bits = np.arange(128) < 48
    assert slice_ends(128) == (32, 64, 96, 128)
    assert slice_top1(bits, 128) == (1.0, 0.5, 0.0, 0.0)
    assert slice_top1(bits[:64], 128) == (1.0, 0.5)


def test_packing_keeps_every_bit():
    bits = np.random.default_rng(0).random(77) < 0.5
    np.testing.assert_array_equal(unpack(pack(bits), 77), bits)
    assert len(pack(bits)) == 10


def test_images_on_which_networks_differ_come_first():
    records = np.array([[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 0, 1, 1]], bool)
    form = Form.of(records)
    assert form.order.tolist() == [1, 3, 4, 0, 2]
    assert form.chance.tolist() == [0.5, 0.7, 0.7, 0.9, 0.1]


def test_what_would_win_is_hardly_ever_dropped_and_half_the_images_are_saved():
    wrongly, images = dropped(Networks(0), 40)
    assert wrongly <= 0.01
    assert images < 0.5


def test_images_that_are_nearly_copies_count_as_one():
    """Rasch's model takes them for so many: only its measured error saves who would win."""
    wrongly, _ = dropped(Networks(2, times=5), 40)
    assert wrongly <= 0.015  # an error measured on 30 networks is not exact itself


def test_hopeless_candidates_are_dropped_after_one_slice():
    networks = Networks(2)
    race = networks.race()
    assert judged(race, networks.draw(-2.0)) == slice_ends(NUMBER)[0]


def test_a_race_that_is_run_to_the_end_is_decided_by_its_top1():
    race = Networks(3).race()
    bits = np.zeros(NUMBER, dtype=bool)
    assert not race.is_lost(bits)
    assert race.fitness(bits) == 0.0


def test_the_estimate_of_a_dropped_candidate_is_close_and_below_the_bar():
    networks = Networks(4)
    race = networks.race()
    errors = []
    for _ in range(50):
        bits = networks.draw(-0.3)
        seen = judged(race, bits)
        assert seen < NUMBER
        estimate = race.fitness(bits[race.form.order][:seen])
        assert estimate < race.target / NUMBER
        errors.append(estimate - bits.mean())
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.02


def test_no_estimate_is_below_what_is_certain():
    easy = np.repeat([0.5, 0.08], [300, NUMBER - 300])
    records = np.random.default_rng(0).random((30, NUMBER)) < easy
    race = Race(Form.of(records), 400, 0.99)
    lost = np.zeros(slice_ends(NUMBER)[0], dtype=bool)
    assert race.is_lost(lost) and race.fitness(lost) == 0.0


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
    right = evaluate(network, images[:2], images, labels, batch_size=50)
    assert right.all() and network.seen == 640
    race = Race(Form.of(np.array([right] * 8)), 640, 0.99)
    lost = evaluate(Sign(), images[:2], images, 1 - labels, batch_size=50, race=race)
    assert len(lost) == 40 and not lost.any()
    won = evaluate(Sign(), images[:2], images, labels, batch_size=50, race=race)
    assert len(won) == 640


def test_evaluation_judges_in_the_order_of_the_race_and_answers_in_that_of_the_images():
    labels = np.arange(640) % 2
    images = np.repeat(labels[:, None, None, None] * 255, 3, axis=1).astype(np.uint8)
    wrong = np.arange(640) < 30
    records = np.array([np.ones(640, bool)] * 4 + [np.arange(640) < 320] * 4)  # last ones first
    answered = np.where(wrong, 1 - labels, labels)
    race = Race(Form.of(records), 600, 0.99)
    bits = evaluate(Sign(), images[:2], images, answered, batch_size=50, race=race)
    np.testing.assert_array_equal(bits, ~wrong)
    race = Race(Form.of(records), 639, 0.99)
    network = Sign()
    lost = evaluate(network, images[:2], images, answered[::-1].copy(), batch_size=50, race=race)
    assert len(lost) == network.seen < 640
    assert not lost.any()
