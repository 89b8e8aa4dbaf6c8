"""Early stopping: what is stopped would not have won, and far fewer images are evaluated."""

import numpy as np
import pytest
import torch
from torch import nn

from nasray.evaluation.evaluate import evaluate
from nasray.search.candidate import as_record, pack, unpack
from nasray.search.racing import (
    CorrectnessModel,
    StoppingRule,
    _best_kernel,
    _covariance,
    _features,
    _krige,
    _predict,
    measured,
    slice_ends,
)

NUMBER = 3000  # of images
GENES = 12


class Networks:
    """Draws which images networks have right, of hard and easy ones, each some `times` over.

    What a gene is worth differs from image to image, by `similarity`: 0 makes all independent.
    """

    def __init__(self, seed, times=1, similarity=0.0):
        self.rng = np.random.default_rng(seed)
        self.times = times
        self.ease = self.rng.normal(0.5, 3.0, NUMBER // times)
        self.worth = similarity * self.rng.normal(size=(GENES, NUMBER // times)) / GENES**0.5
        self.similarity = similarity

    def genes(self):
        return self.rng.choice([-1.0, 1.0], GENES) if self.similarity else np.zeros(GENES)

    def draw(self, ability, genes=0.0):
        logit = self.ease + ability + genes * np.ones(GENES) @ self.worth
        right = self.rng.random(len(logit)) < 1 / (1 + np.exp(-logit))
        return np.repeat(right, self.times)

    def model(self, number=30):
        known = [
            (genes := self.genes(), self.draw(self.rng.normal(0, 0.2), genes))
            for _ in range(number)
        ]
        return model_of([right for _, right in known], [genes / 2 for genes, _ in known])

    def rule(self, confidence=0.99, above=0.15):
        return StoppingRule(self.model(), np.zeros(GENES), int(self.draw(above).sum()), confidence)


def model_of(records, vectors=None):
    records = np.array(records, dtype=np.float32)
    if vectors is None:
        vectors = np.zeros((len(records), GENES))  # all alike
    return CorrectnessModel.fit(np.array(vectors), records, GENES)


def evaluated(rule, bits):
    """On how many images a candidate with these bits is evaluated."""
    return len(rule.apply(lambda rows: bits[rows]))


def dropped(networks, races, blind=False):
    """Of candidates dropped, the share that would have won; and the share of images judged.

    `blind` to the candidates' genes, a rule takes all of them to be alike.
    """
    wrongly = number = images = 0
    for _ in range(races):
        model, target = networks.model(60), int(networks.draw(0.15, networks.genes()).sum())
        for ability in networks.rng.normal(0, 0.2, 30):
            genes = networks.genes()
            bits = networks.draw(ability, genes)
            rule = StoppingRule(model, np.full(GENES, 1e3) if blind else genes / 2, target, 0.99)
            seen = evaluated(rule, bits)
            images += seen
            number += seen < NUMBER
            wrongly += seen < NUMBER and bits.sum() >= rule.target
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
    assert measured(bits, 128, None)["slices"] == (1.0, 0.5, 0.0, 0.0)
    assert measured(bits, 128, None)["fitness"] == 48 / 128


def test_packing_keeps_every_bit():
    bits = np.random.default_rng(0).random(77) < 0.5
    np.testing.assert_array_equal(unpack(pack(bits), 77), bits)
    assert len(pack(bits)) == 10


def test_images_on_which_networks_differ_come_first():
    records = [[1, 1, 0, 0, 1], [1, 0, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 0, 1, 1]]
    rule = StoppingRule(model_of(records), np.zeros(GENES), 3, 0.99)
    assert rule.order.tolist() == [1, 3, 4, 0, 2]
    assert np.all(np.diff(np.abs(rule.chance - 0.5)) >= 0)
    assert rule.chance[1] == rule.chance[2] > rule.chance[0] == 0.5 > rule.chance[4]


def test_what_would_win_is_hardly_ever_stopped_and_half_the_images_are_saved():
    wrongly, images = dropped(Networks(0), 40)
    assert wrongly <= 0.01
    assert images < 0.5


def test_images_that_are_nearly_copies_count_as_one():
    """Rasch's model takes them for so many: only its measured error saves who would win."""
    wrongly, _ = dropped(Networks(2, times=5), 40)
    assert wrongly <= 0.015  # an error measured on 30 networks is not exact itself


def test_similar_networks_predict_what_a_network_has_right():
    """Fewer images are evaluated for it, and as few winners are lost."""
    wrongly, images = dropped(Networks(5, similarity=3.0), 20)
    assert wrongly <= 0.01
    wrongly_blind, images_blind = dropped(Networks(5, similarity=3.0), 20, blind=True)
    assert wrongly_blind <= 0.01
    assert images < 0.8 * images_blind


def test_networks_that_were_stopped_early_predict_too():
    networks = Networks(6, similarity=3.0)
    known = [(genes := networks.genes(), networks.draw(0.0, genes)) for _ in range(90)]
    vectors, records = (np.array(each, dtype=np.float32) for each in zip(*known, strict=True))
    full = model_of(records[:30], vectors[:30] / 2)
    partly = records.copy()
    partly[30:, StoppingRule(full, np.zeros(GENES), 0, 0.99).order[NUMBER // 2 :]] = np.nan
    shuffled = networks.rng.permutation(90)  # they may come in any order
    more = model_of(partly[shuffled], vectors[shuffled] / 2)
    errors = {}
    for name, model in (("full", full), ("more", more)):
        networks.rng = np.random.default_rng(7)
        races = []
        for _ in range(40):
            genes = networks.genes()
            rule = StoppingRule(model, genes / 2, 0, 0.99)
            races.append(np.mean((rule.chance - networks.draw(0.0, genes)[rule.order]) ** 2))
        errors[name] = np.mean(races)
    assert errors["more"] < 0.95 * errors["full"]


@pytest.mark.parametrize("num_dropped", [0, 120])
def test_predictions_are_off_by_as_much_as_they_say(num_dropped):
    """After every slice, of networks that the model has not seen, with and without stopped ones."""
    networks = Networks(8, similarity=3.0)
    known = [(genes := networks.genes(), networks.draw(0.0, genes)) for _ in range(40)]
    vectors, records = (np.array(each, dtype=np.float32) for each in zip(*known, strict=True))
    full, more = model_of(records, vectors / 2), []
    for _ in range(num_dropped):
        genes = networks.genes()
        right, seen = StoppingRule(full, genes / 2, 0, 0.99).among_all(
            np.zeros(NUMBER // 4, dtype=bool)
        )
        bits = networks.draw(0.0, genes)
        more.append((genes, np.where(seen, bits, np.nan)))
        assert not right.any()
    for genes, record in more:
        vectors, records = np.vstack((vectors, genes)), np.vstack((records, record))
    model = model_of(records, vectors / 2)
    errors = []
    for _ in range(100):
        genes = networks.genes()
        rule, bits = StoppingRule(model, genes / 2, 0, 0.99), networks.draw(0.0, genes)
        mean, variance = _predict(rule.chance, bits[rule.order], rule.model.precision)
        errors.append((bits.sum() - mean[:-1]) ** 2 / (rule.model.dispersion * variance[:-1]))
    assert np.mean(errors, axis=0).max() < 1.5
    assert np.mean(errors) < 1.1


@pytest.mark.parametrize("number, times", [(8, 8 / 5), (33, 33 / 30)])
def test_networks_that_agree_by_chance_do_not_make_a_rule_sure(number, times):
    """No error was measured: the model's own is taken, and more of it, the fewer they are."""
    right = np.arange(NUMBER) < 2000
    np.testing.assert_allclose(model_of([right] * number).dispersion, times, rtol=1e-4)


def test_a_prediction_shifts_a_logit_by_eight_at_most():
    logits, shifts = _features(np.array([0.0, 0.5, 1.0]), 40, np.array([1.0, 0.6, 0.0]))
    np.testing.assert_allclose(logits, [-np.log(81), 0, np.log(81)])
    np.testing.assert_allclose(shifts, [8.0, 0.4, -8.0])


def test_leave_one_out_errors_are_those_of_fits_without_the_one():
    rng = np.random.default_rng(0)
    vectors, right = rng.normal(size=(12, 3)), rng.random((12, 50)).round()
    covariance = _covariance(vectors, 2.0, 0.3)
    _, weights, precisions = _krige(covariance, right)
    errors = weights / precisions[:, None]
    for own in range(12):
        others = np.arange(12) != own
        mean, weights, _ = _krige(covariance[np.ix_(others, others)], right[others])
        predicted = mean + covariance[own, others] @ weights
        np.testing.assert_allclose(right[own] - predicted, errors[own], atol=1e-4)


def test_the_kernel_reaches_as_far_as_networks_are_similar():
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(150, 2)) * 3
    near, far = ((np.sin(vectors @ rng.normal(size=(2, 400)) * pace) > 0) for pace in (1.0, 0.1))
    lengths = [_best_kernel(vectors, each.astype(np.float32), GENES)[0] for each in (near, far)]
    assert lengths[0] < lengths[1]


def test_a_record_is_made_of_what_was_evaluated():
    rule, bits = Networks(1).rule(), np.random.default_rng(1).random(NUMBER) < 0.5
    found = measured(bits[rule.order][:400], NUMBER, rule)
    assert found["images"] == 400 and len(found["slices"]) == 3
    record = as_record(found["correct"], found["judged"], NUMBER)
    seen = unpack(found["judged"], NUMBER)
    assert np.isnan(record).sum() == NUMBER - 400 and seen[rule.order[:400]].all()
    np.testing.assert_array_equal(record[seen], bits[seen])
    np.testing.assert_array_equal(as_record(pack(bits), b"", NUMBER), bits)


def test_hopeless_candidates_are_stopped_after_one_slice():
    networks = Networks(2)
    rule = networks.rule()
    assert evaluated(rule, networks.draw(-2.0)) == slice_ends(NUMBER)[0]


def test_a_complete_evaluation_counts_by_its_top1():
    rule = Networks(3).rule()
    bits = np.zeros(NUMBER, dtype=bool)
    assert not rule.is_hopeless(bits)
    assert rule.fitness(bits) == 0.0


def test_the_estimate_of_a_stopped_candidate_is_close_and_below_the_incumbent():
    networks = Networks(4)
    rule = networks.rule()
    errors = []
    for _ in range(50):
        bits = networks.draw(-0.3)
        seen = evaluated(rule, bits)
        assert seen < NUMBER
        estimate = rule.fitness(bits[rule.order][:seen])
        assert estimate < rule.target / NUMBER
        errors.append(estimate - bits.mean())
    assert abs(np.mean(errors)) < 0.01 and np.std(errors) < 0.02


def test_no_estimate_is_below_what_is_certain():
    easy = np.repeat([0.5, 0.08], NUMBER // 2)
    records = np.random.default_rng(0).random((30, NUMBER)) < easy
    rule = StoppingRule(model_of(records), np.zeros(GENES), 400, 0.99)
    lost = np.zeros(NUMBER // 2, dtype=bool)
    assert rule.is_hopeless(lost) and rule.fitness(lost) == 0.0


class Sign(nn.Module):
    """Class 1 if the first pixel is bright."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def forward(self, batch):
        self.seen += len(batch)
        bright = batch[:, 0, 0, 0]
        return torch.stack((-bright, bright), dim=1)


def test_evaluation_stops_after_the_slice_in_which_it_becomes_hopeless():
    labels = np.arange(640) % 2
    images = np.repeat(labels[:, None, None, None] * 255, 3, axis=1).astype(np.uint8)
    network = Sign()
    right = evaluate(network, images[:2], images, labels, batch_size=50)
    assert right.all() and network.seen == 640
    rule = StoppingRule(model_of([right] * 8), np.zeros(GENES), 640, 0.99)
    lost = evaluate(Sign(), images[:2], images, 1 - labels, batch_size=50, rule=rule)
    assert len(lost) == 40 and not lost.any()
    won = evaluate(Sign(), images[:2], images, labels, batch_size=50, rule=rule)
    assert len(won) == 640


def test_evaluation_goes_in_the_order_of_the_rule_and_returns_that_of_the_images():
    labels = np.arange(640) % 2
    images = np.repeat(labels[:, None, None, None] * 255, 3, axis=1).astype(np.uint8)
    wrong = np.arange(640) < 30
    records = np.array([np.ones(640, bool)] * 4 + [np.arange(640) < 320] * 4)  # last ones first
    answered = np.where(wrong, 1 - labels, labels)
    rule = StoppingRule(model_of(records), np.zeros(GENES), 600, 0.99)
    bits = evaluate(Sign(), images[:2], images, answered, batch_size=50, rule=rule)
    np.testing.assert_array_equal(bits, ~wrong)
    rule = StoppingRule(model_of(records), np.zeros(GENES), 639, 0.99)
    network = Sign()
    lost = evaluate(network, images[:2], images, answered[::-1].copy(), batch_size=50, rule=rule)
    assert len(lost) == network.seen < 640
    assert not lost.any()
