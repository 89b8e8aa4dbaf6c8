"""Statements on a ranking, on simulated candidates whose true top-1 is known."""

import math

import numpy as np
import pytest

from nasray.search import reliability
from nasray.search.reliability import CLEARLY, SPLITS, Reliability, _split_half
from nasray.search.scores import balanced_top1

PHI = np.vectorize(lambda z: 0.5 * math.erfc(-z / math.sqrt(2)))


def simulated(rng, *, spread, number=40, num_images=200, converged=False, related=0.0):
    """(correct, the best first; true top-1): abilities of standard deviation `spread` on images of
    unlike difficulty. `converged`: most candidates are alike and some are much worse, as late in a
    search; `related`: the share of ability and luck that families of six have in common.
    """
    families = rng.integers(0, number // 6, number)
    ability = spread * rng.normal(size=number)
    if converged:
        worse = rng.random(number) < 0.2
        ability = np.where(worse, 4 * ability - 3 * spread, ability / 2)
    luck = rng.normal(size=(number, num_images))
    if related:
        shared = spread * rng.normal(size=number), rng.normal(size=(number, num_images))
        ability = related**0.5 * shared[0][families] + (1 - related) ** 0.5 * ability
        luck = related**0.5 * shared[1][families] + (1 - related) ** 0.5 * luck
    ease = rng.normal(0.8, 1.2, num_images)
    correct = ability[:, None] + ease + luck > 0
    order = np.argsort(-correct.mean(axis=1), kind="stable")
    return correct[order], PHI((ability + 0.8) / math.sqrt(1 + 1.2**2))[order]


def assess(correct, **options):
    return Reliability.of(correct, np.arange(correct.shape[1]) % 5, **options)


WAYS = {
    "plain": {},
    "converged": {"converged": True},
    "related": {"related": 0.8},
    "few": {"number": 24},
}


def test_stated_probabilities_are_right_as_often_as_they_say():
    """500 searches of four kinds, whose differences are from next to none to clear ones."""
    chances, right = [], []
    for seed in range(500):
        rng = np.random.default_rng(seed)
        spread = (0.03, 0.1, 0.2)[seed % 3]
        correct, true = simulated(rng, spread=spread, **list(WAYS.values())[seed % 4])
        found = assess(correct)
        rows = [1, 9, len(true) // 2, rng.integers(1, len(true))]
        chances += found.chances[rows].tolist()
        right += (true[0] > true[rows]).tolist()
    chances, right = np.array(chances), np.array(right)
    for low, high in ((0.5, 0.6), (0.6, 0.7), (0.7, 0.8), (0.8, 0.87), (0.87, 0.93), (0.93, 1.01)):
        stated = (chances >= low) & (chances < high)
        assert stated.sum() > 100
        assert abs(chances[stated].mean() - right[stated].mean()) < 0.07, low
    nine_in_ten = (chances >= 0.87) & (chances < 0.93)
    assert 0.85 < right[nine_in_ten].mean() < 0.95


def test_raw_probabilities_would_not_be():
    """The winner's curse: without shrinkage, what is stated at 90 % is right less often."""
    right = []
    for seed in range(60):
        correct, true = simulated(np.random.default_rng(seed), spread=0.03)
        found = assess(correct)
        z = found.leads[1:] / found.lead_errors[1:]
        right += (true[0] > true[1:])[(PHI(z) > 0.87) & (PHI(z) < 0.93)].tolist()
    assert np.mean(right) < 0.75


def test_split_half_reliability_is_the_square_of_the_correlation_with_the_truth():
    for spread, low, high in ((0.0, 0.0, 0.25), (0.1, 0.3, 0.6), (0.5, 0.9, 1.0)):
        found = []
        for seed in range(10):
            correct, true = simulated(np.random.default_rng(seed), spread=spread)
            found.append((assess(correct).split_half, correct.mean(axis=1), true))
        mean = np.mean([each for each, _, _ in found])
        assert low <= mean <= high
        if spread:
            squares = [np.corrcoef(fitness, true)[0, 1] ** 2 for _, fitness, true in found]
            assert mean == pytest.approx(np.mean(squares), abs=0.1)


@pytest.mark.parametrize("kind", ["right or wrong", "log-probabilities"])
def test_errors_are_those_of_a_paired_bootstrap(kind):
    correct, _ = simulated(np.random.default_rng(0), spread=0.2)
    rng = np.random.default_rng(1)
    if kind == "log-probabilities":
        correct = np.where(correct, -0.2, -1.5) + rng.normal(0, 0.3, correct.shape)
        correct = correct[np.argsort(-correct.mean(axis=1))].astype(np.float16)
    found = assess(correct)
    drawn = rng.integers(0, correct.shape[1], (4000, correct.shape[1]))
    tops = [row[drawn].mean(axis=1) for row in correct[[0, 30]].astype(np.float64)]
    assert found.errors[0] == pytest.approx(tops[0].std(), rel=0.1)
    assert found.lead_errors[30] == pytest.approx((tops[0] - tops[1]).std(), rel=0.1)
    fitness = correct.mean(axis=1, dtype=np.float64)
    assert found.leads == pytest.approx(fitness[0] - fitness)


def test_errors_of_a_balanced_fitness_are_those_of_its_bootstrap(monkeypatch):
    """Classes of unlike accuracy and size: an image deviates from the mean of its class."""
    rng = np.random.default_rng(2)
    labels = rng.permutation(np.repeat(range(4), (80, 80, 80, 60)))
    shares = np.array([0.95, 0.8, 0.5, 0.2])[labels]
    shares = [shares, 0.9 * shares, np.array([0.5, 0.7, 0.9, 0.1])[labels]]
    correct = rng.random((3, len(labels))) < shares
    found = Reliability.of(correct, labels, balanced=True)
    # Within the classes: their sizes are no luck, either.
    drawn = [
        rng.choice(np.flatnonzero(labels == own), (4000, sum(labels == own))) for own in range(4)
    ]
    tops = [np.mean([row[images].mean(axis=1) for images in drawn], axis=0) for row in correct]
    for row in range(3):
        assert found.errors[row] == pytest.approx(tops[row].std(), rel=0.05)
        lead_error = (tops[0] - tops[row]).std()
        assert found.lead_errors[row] == pytest.approx(lead_error, rel=0.05)
    fitness = [balanced_top1(row, labels) for row in correct]
    assert found.leads == pytest.approx(np.subtract(fitness[0], fitness))
    monkeypatch.setattr(reliability, "BLOCK", 7)  # no class in one block
    again = Reliability.of(correct, labels, balanced=True)
    assert again.errors == pytest.approx(found.errors)
    assert (again.chances == found.chances).all()


def test_what_agrees_on_all_images_is_no_better():
    correct, _ = simulated(np.random.default_rng(0), spread=0.2)
    correct[1] = correct[0]
    found = assess(correct)
    assert found.chances[0] == found.chances[1] == 0.5
    alike = assess(np.repeat(correct[:1], 5, axis=0))
    assert alike.split_half == 0
    assert (alike.chances == 0.5).all() and (alike.expected_leads == 0).all()


@pytest.mark.parametrize("number, worse", [(8, 3), (2, 1)])
def test_a_better_half_that_agrees_on_all_images_leaves_probabilities(number, worse):
    """The others are compared by the noise of all."""
    rng = np.random.default_rng(0)
    best = rng.random(200) < 0.9
    others = best & (rng.random((worse, 200)) < np.linspace(0.9, 0.85, worse)[:, None])
    found = assess(np.concatenate((np.repeat(best[None], number, axis=0), others)))
    assert (found.chances[:number] == 0.5).all()
    assert (found.chances[number:] > 0.9).all() and (found.chances <= 1).all()
    assert np.isfinite(found.expected_leads).all()


def test_a_lead_on_every_image_is_certain():
    correct = np.zeros((5, 32), bool)
    correct[0] = True
    found = assess(correct)
    assert found.chances.tolist() == [0.5, 1, 1, 1, 1]
    assert found.expected_leads.tolist() == [0, 1, 1, 1, 1]


def test_equal_candidates_are_not_told_apart_by_rounding(monkeypatch):
    """Sums over blocks of another size differ in their last bits."""
    for seed in range(20):
        correct, _ = simulated(np.random.default_rng(seed), spread=0.05, number=60, num_images=300)
        found = []
        for size in (4096, 100):
            monkeypatch.setattr(reliability, "BLOCK", size)
            found.append(assess(correct).chances)
        assert (found[0] == found[1]).all(), seed


def test_halves_that_contradict_each_other_have_no_reliability():
    parts = np.zeros((4, SPLITS, 4))
    parts[..., 0], parts[..., 1] = np.arange(4)[:, None], -np.arange(4)[:, None]
    assert _split_half(parts) == 0


def test_a_candidate_far_below_is_clearly_worse_though_all_others_are_alike():
    correct, _ = simulated(np.random.default_rng(3), spread=0.0)
    correct[-1] &= np.random.default_rng(4).random(correct.shape[1]) < 0.6
    found = assess(correct)
    assert found.chances[-1] > CLEARLY > found.chances[1]


def test_images_needed_follow_spearman_and_brown():
    correct, _ = simulated(np.random.default_rng(0), spread=0.2)
    found = assess(correct)
    number = found.images_for(0.8)
    times = number / correct.shape[1]
    predicted = times * found.split_half / (1 + (times - 1) * found.split_half)
    assert predicted == pytest.approx(0.8, abs=0.01)


def test_too_few_say_nothing():
    assert assess(np.ones((2, 100), dtype=bool)) is None
    assert assess(np.ones((50, 7), dtype=bool)) is None
