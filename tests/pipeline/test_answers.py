"""Which candidates a search answers with, and what it says of them; recorded results, no Ray."""

from dataclasses import replace

import numpy as np
import pytest

from nasray.config import Job
from nasray.pipeline.answers import Ranking, answers, rankings
from nasray.search.candidate import Candidate, pack

LABELS = np.arange(200) % 4


def candidates(top1, macs, seed=0):
    """One candidate for each top-1, a fraction: independent results on 200 images."""
    rng = np.random.default_rng(seed)
    found = []
    for number, (share, cost) in enumerate(zip(top1, macs, strict=True)):
        correct = rng.permutation(200) < round(200 * share)
        found.append(
            Candidate(
                arch=(number,),
                costs={"macs": float(cost)},
                fitness=float(correct.mean()),
                images=200,
                correct=pack(correct),
            )
        )
    return found


def job(limits=(), num_winners=1, **search):
    search = {"limits": [{"cost": "macs", "max": each} for each in limits], **search}
    return Job.model_validate(
        {
            "data": {"source": "synthetic"},
            "search": search,
            "retrain": {"num_winners": num_winners, "epochs": 10, "grace_epochs": 1},
        }
    )


def ranking(job, found, **options) -> Ranking:
    [only] = rankings(job, found, LABELS, **options)
    return only


NOISE = candidates(np.linspace(0.70, 0.72, 30), range(130, 100, -1))
CLEAR = candidates([0.95, 0.8, *np.linspace(0.3, 0.6, 28)], range(130, 100, -1))


def test_where_differences_are_noise_the_cheapest_is_the_answer():
    found = ranking(job(), NOISE)
    assert found.num_equal == len(NOISE)
    assert found.answer.costs["macs"] == 101
    said = found.sentences()
    assert "30 of them, itself included, are not clearly worse than the best" in said
    assert "the answer is the cheapest of these, 101 macs instead of" in said
    assert 'search.prefer = "best" takes the best' in said


def test_the_best_is_the_answer_where_it_is_clearly_better_or_asked_for():
    found = ranking(job(), CLEAR)
    assert found.num_equal == 1 and found.answer.fitness == 0.95
    assert "which is the cheapest of these and the answer" in found.sentences()
    asked = ranking(job(prefer="best"), NOISE)
    assert asked.answer.fitness == max(each.fitness for each in NOISE)
    assert 'which is the answer by search.prefer = "best"' in asked.sentences()


def test_each_limit_has_its_own_answer():
    both = rankings(job((115, 130, 50), algorithm="front"), CLEAR, LABELS)
    assert [each.limit.max for each in both] == [115, 130]  # within 50 there is none
    for each in both:
        assert all(found.costs["macs"] <= each.limit.max for found in each.candidates)
        assert each.to_json()["num_candidates"] == len(each.candidates)
    assert both[1].answer.fitness == 0.95
    assert [limit.max for limit, _ in answers(job(), both)] == [115, 130]


@pytest.mark.parametrize("prefer", ["cheapest", "best"])
def test_the_next_best_are_retrained_with_the_answer(prefer: str):
    asked = job(num_winners=3, prefer=prefer)
    found = ranking(asked, NOISE)
    archs = [each.arch for _, each in answers(asked, [found])]
    assert archs[0] == found.answer.arch and len(set(archs)) == 3
    assert archs[1:] == [c.arch for c in found.candidates if c.arch != archs[0]][:2]


def test_what_cannot_be_told_is_said():
    few = ranking(job(), NOISE[:2])
    assert few.reliability is None and few.to_json() is None
    assert few.answer.fitness == max(each.fitness for each in NOISE[:2])
    assert "too few to tell" in few.sentences()
    said = ranking(job(), NOISE[:1]).sentences()
    assert said.startswith("1 candidate on 200 images are too few to tell")
    old = [replace(each, correct=b"") for each in NOISE]
    assert "30 candidates on 200 images have no record of each image" in (
        ranking(job(), old).sentences()
    )
    assert "7 stopped early left out" in ranking(job(), NOISE, num_left_out=7).sentences()


def test_of_a_few_candidates_each_is_named_once_and_the_reliability_called_uncertain():
    for number, names in ((3, ["second"]), (5, ["second", "median"]), (19, ["second", "tenth"])):
        few = ranking(job(), CLEAR[:number])
        assert [each["with"] for each in few.to_json()["comparisons"]] == names
        said = f"of {number} candidates only, so itself uncertain" in few.sentences()
        assert said == (number < 10)


def test_candidates_that_agree_on_every_image_are_not_called_noise():
    same = [replace(each, correct=NOISE[0].correct, fitness=NOISE[0].fitness) for each in NOISE]
    found = ranking(job(), same)
    assert "The 30 candidates agree on every one of the 200 hold-out images" in found.sentences()
    assert "noise" not in found.sentences() and "30 of them, itself" in found.sentences()


def test_search_json_compares_the_best_with_others():
    content = ranking(job(), CLEAR).to_json()
    assert [each["with"] for each in content["comparisons"]] == ["second", "tenth", "median"]
    assert content["comparisons"][0]["chance"] < content["comparisons"][2]["chance"]
    assert content["comparisons"][0]["lead"] == pytest.approx(0.15)
    assert content["split_half"] > 0.8 and len(content["chances"]) == 30


def test_by_balanced_top1_each_class_counts_alike():
    labels = np.repeat([0, 1], (150, 50))
    settings = job(fitness="balanced")
    [found] = rankings(settings, NOISE, labels)
    first = np.unpackbits(np.frombuffer(found.candidates[0].correct, np.uint8), count=200)
    shares = first[:150].mean(), first[150:].mean()
    variance = shares[0] * (1 - shares[0]) / 150 + shares[1] * (1 - shares[1]) / 50
    assert found.to_json()["standard_error"] == pytest.approx(variance**0.5 / 2, rel=0.01)


def test_by_log_likelihood_the_log_probabilities_count():
    rng = np.random.default_rng(0)
    scores = (rng.normal(-0.5, 0.2, 200) + rng.normal(0, 0.05, (30, 200))).astype(np.float16)
    found = [
        replace(each, fitness=float(own.mean(dtype=np.float64)), log_likelihoods=own.tobytes())
        for each, own in zip(NOISE, scores, strict=True)
    ]
    [ranked] = rankings(job(fitness="log_likelihood"), found, LABELS)
    best = max(range(30), key=lambda row: found[row].fitness)
    assert ranked.candidates[0] is found[best]
    error = scores[best].astype(float).std(ddof=1) / 200**0.5
    assert ranked.to_json()["standard_error"] == pytest.approx(error)
    assert "nats below the best as measured" in ranked.sentences()
    assert rankings(job(fitness="log_likelihood"), NOISE, LABELS)[0].reliability is None
