"""What a search says of itself before and after it evaluates; no Ray."""

import logging

import numpy as np

from nasray.config import Limit, SearchConfig
from nasray.pipeline.answers import Ranking
from nasray.pipeline.search import _announced, warn_of_chance, warn_of_unanswered

LIMITS = tuple(Limit(cost="macs", max=top) for top in (178000, 9e5))


def test_what_is_announced_is_what_is_done():
    assert "steady, population_size = 20, num_generations = 50, lag = 16, as best for 1000" in (
        _announced(SearchConfig(evaluations=1000))
    )
    assert "lag" not in _announced(SearchConfig(evaluations=100, algorithm="random"))
    verified = _announced(SearchConfig(evaluations=12, verify=True, algorithm="random"))
    assert verified == (
        "proposals of a predictor, population_size = 4, num_generations = 3, "
        "for at most 12 evaluations"
    )


def test_a_limit_without_an_answer_is_named(caplog):
    config = SearchConfig(algorithm="nsga2", limits=LIMITS)
    rankings = [Ranking(config, limit, [], np.zeros(0)) for limit in LIMITS]
    warn_of_unanswered(config, rankings)
    warn_of_unanswered(SearchConfig(limits=LIMITS), [Ranking(config, None, [], np.zeros(0))])
    assert not caplog.messages
    warn_of_unanswered(config, rankings[1:])
    assert [each.split(":")[0] for each in caplog.messages] == ["no answer within macs <= 178000"]


def test_a_verified_search_without_any_proposal_says_that_it_is_random(caplog):
    few = SearchConfig(evaluations=12, verify=True)  # 3 generations of 4
    with caplog.at_level(logging.WARNING):
        warn_of_chance(few, known=12)
        warn_of_chance(few.model_copy(update={"predictor": "predictor.pt"}), known=0)
        assert not caplog.messages
        warn_of_chance(few, known=11)
    assert "19 are known before the last generation, so all candidates are random" in caplog.text
