"""The stage that fits an accuracy predictor to a run's supernet: RUN/predictor/.

sample/ (random architectures, evaluated on the pool like any candidate), predictor.pt, and
fit.json: how well it predicts evaluations that it was not fitted to.
"""

import math
from typing import Any

from nasray import storage
from nasray.errors import UserError
from nasray.progress import progress
from nasray.run import Run
from nasray.search.candidate import Candidate
from nasray.search.driver import run_search
from nasray.search.limits import Limits
from nasray.stages import require_supernet
from nasray.verified import FEWEST, fitted, unique

CHUNK = 10  # architectures of a sample that are recorded together


def fit_predictor(run: Run, num_sample: int = 0) -> dict[str, Any]:
    """Fit a predictor to all evaluations of `run`, after `num_sample` random ones.

    Writes RUN/predictor/predictor.pt and returns what RUN/predictor/fit.json says of it.
    """
    candidates = unique(sample(run, num_sample) + run.history.candidates)
    if len(candidates) < FEWEST:
        raise UserError(
            f"{run.folder} has {len(candidates)} evaluations to fit a predictor to, and needs "
            f"{FEWEST} at least; say --sample {FEWEST} or more"
        )
    predictor, quality = fitted(run.space, candidates, run.job.seed)
    path = run.path("predictor", "predictor.pt")
    predictor.save(path)
    found = {"predictor": path, "num_evaluations": len(candidates), **quality}
    storage.write_json(run.path("predictor", "fit.json"), found)
    return found


def sample(run: Run, number: int) -> list[Candidate]:
    """Evaluate `number` random architectures on the pool, or go on with them; all recorded."""
    history = run.sample
    num_chunks = math.ceil(number / CHUNK)
    if len(history) >= num_chunks:
        return history.candidates
    from nasray.evaluator import EvaluationTask, EvaluatorPool

    require_supernet(run)
    config = run.job.search.model_copy(
        update={"algorithm": "random", "population_size": CHUNK, "num_generations": num_chunks}
    )
    task = EvaluationTask(supernet=run.supernet_path, data_path=run.data_path, job=run.job)
    with EvaluatorPool(task) as pool, progress("sample", num_chunks, len(history)) as show:
        limits = Limits(run.space, (), run.latency)
        return run_search(run.space, config, limits, pool, history, seed=run.job.seed, show=show)
