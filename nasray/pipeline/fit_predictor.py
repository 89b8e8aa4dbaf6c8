"""The stage that fits an accuracy predictor to a run's supernet: RUN/predictor/.

predictor.pt, fitted to all that the run has evaluated, and fit.json: how well one that is fitted
to four fifths of it predicts the rest. Random architectures come first if asked for.
"""

import math
from typing import Any

from nasray.algorithms.random import RandomSearch
from nasray.algorithms.verified import MIN_FITTED, unique
from nasray.errors import UserError
from nasray.pipeline.run import Run
from nasray.pipeline.search import accuracy_of, evaluators, require_supernet
from nasray.predictors.predictor import STEPS, AccuracyPredictor
from nasray.predictors.quality import quality_of_fit
from nasray.progress import progress
from nasray.search.candidate import Candidate
from nasray.search.driver import run_search
from nasray.search.limits import Limits
from nasray.search.schedules import Schedule
from nasray.spaces.population import as_population
from nasray.storage import files as storage
from nasray.storage import layout

CHUNK = 10  # architectures of a sample that are recorded together


def fit_predictor(run: Run) -> dict[str, Any]:
    """Fit a predictor to all evaluations of `run`, those of its sample and of its search.

    Writes RUN/predictor/predictor.pt and returns what RUN/predictor/fit.json says of it.
    """
    candidates = unique(run.sample.candidates + run.candidates)
    if len(candidates) < MIN_FITTED:
        raise UserError(
            f"{run.folder} has {len(candidates)} evaluations to fit a predictor to, and needs "
            f"{MIN_FITTED} at least; say --sample {MIN_FITTED} or more"
        )
    population = as_population([candidate.arch for candidate in candidates])
    data = run.space, population, [accuracy_of(each, run.job.search) for each in candidates]
    with progress("predictor", 2 * STEPS) as show:
        quality = quality_of_fit(*data, seed=run.job.seed, show=show)
        predictor = AccuracyPredictor.fit(
            *data, seed=run.job.seed, show=lambda done, text: show(STEPS + done, text)
        )
    path = run.path(layout.PREDICTOR)
    predictor.save(path)
    found = {"predictor": path, "num_evaluations": len(candidates), **quality}
    storage.write_json(run.path(layout.PREDICTOR_FIT), found)
    return found


def is_sampled(run: Run, number: int) -> bool:
    """Whether `number` random architectures are evaluated already."""
    return len(run.sample) >= math.ceil(number / CHUNK)


def sample(run: Run, number: int) -> list[Candidate]:
    """Evaluate `number` random architectures on the pool, or go on with them; all recorded."""
    require_supernet(run)
    num_chunks = math.ceil(number / CHUNK)
    config = run.job.search.model_copy(update={"population_size": CHUNK})
    limits = Limits(run.space, (), run.latency)
    algorithm = RandomSearch(run.space, config, limits, run.job.seed)
    history = run.sample
    with evaluators(run) as pool, progress("sample", num_chunks, len(history)) as show:
        found = run_search(algorithm, Schedule(asks=num_chunks), limits, pool, history, show=show)
    history.close()
    return found
