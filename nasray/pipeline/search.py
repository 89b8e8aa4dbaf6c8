"""The stage that searches a supernet, and what else evaluates its subnets."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from nasray import checkpoint
from nasray.algorithms import ONE_AT_A_TIME, make_algorithm, make_schedule
from nasray.algorithms.first import WithFirst
from nasray.algorithms.many_limits import SplitLimits
from nasray.config import Limit, SearchConfig, limited_cost
from nasray.data.splits import JobImages
from nasray.errors import EvaluationError, UserError
from nasray.pipeline.answers import Ranking, answers, limits_of, rankings
from nasray.pipeline.run import Run
from nasray.predictors.predictor import AccuracyPredictor
from nasray.progress import progress
from nasray.search.candidate import (
    Candidate,
    Evaluation,
    best_first,
    fully_evaluated,
    pareto_front,
)
from nasray.search.driver import Algorithm, run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.search.racing import EarlyStopping
from nasray.search.scores import FITNESS
from nasray.spaces.population import as_architectures, as_population
from nasray.spaces.space import Architecture, largest
from nasray.storage import files as storage
from nasray.storage import layout

if TYPE_CHECKING:
    from nasray.evaluation.evaluator import EvaluatorPool

logger = logging.getLogger(__name__)


def search(run: Run) -> list[Candidate]:
    """Search the supernet; write the history, the Pareto front, the top k and a summary.

    Returns what was evaluated in full.
    """
    config, history = run.job.search, run.history
    run.supernet_digest  # noqa: B018  asked for to be checked
    if is_finished(run):
        if not all(storage.exists(run.path(name)) for name in (layout.FRONT, layout.TOP)):
            _write_best(run, run.candidates)  # one was removed, or damaged and removed
        return run.candidates
    require_supernet(run)
    one_at_a_time = config.algorithm in ONE_AT_A_TIME and not config.verify
    if one_at_a_time and run.job.compute.num_evaluators > config.lag:
        logger.warning(
            "search.lag = %d keeps no more evaluators than that busy; compute.num_evaluators is %d",
            config.lag,
            run.job.compute.num_evaluators,
        )
    if config.evaluations:
        logger.info("search: %s", _announced(config))
    begun = begin(run, history)
    if config.verify:
        algorithm = _verified(run, begun)
    else:
        algorithm = make_algorithm(run.space, config, run.limits, run.job.seed)
    if not one_at_a_time:
        most = config.evaluations or config.most_evaluations
        algorithm = WithFirst(algorithm, _best_trained(run), run.limits, most)
    schedule = make_schedule(config)
    with (
        evaluators(run) as pool,
        progress("search", config.num_generations, len(history)) as show,
    ):
        every = run_search(
            algorithm,
            schedule,
            run.limits,
            pool,
            history,
            early_stopping=EarlyStopping.of(run.space, config, schedule),
            show=show,
            tell_best=pool.metrics.best.set,
            fitness=FITNESS[config.fitness],
        )
        candidates = fully_evaluated(every)
        if not candidates:
            raise EvaluationError(f"no architecture could be evaluated: {every[-1].error}")
        ranked = rankings(
            run.job,
            candidates,
            JobImages(run.job, run.data_path).holdout_labels,
            num_left_out=sum(not each.failed for each in every) - len(candidates),
        )
        found = answers(run.job, ranked)
        baseline = _compare_with_random(run, pool, *found[0]) if found else None
    best = _write_best(run, candidates)[0]
    for ranking in ranked:
        limit = ranking.limit
        within = f"{limit.cost} of {limit.max:g} at most: " if limit and limit.max else ""
        logger.info("%s%s", within, ranking.sentences())
    warn_of_unanswered(config, ranked)
    reliabilities = [ranking.to_json() for ranking in ranked]
    storage.write_json(
        run.path(layout.SEARCH),
        {
            "winner": _entry(run, found[0][1] if found else best),
            "num_evaluations": len(every),
            "num_failed": sum(candidate.failed for candidate in every),
            "num_images": sum(candidate.images for candidate in every),
            "seconds": sum(candidate.seconds for candidate in every),
            "limits": [limit.model_dump() for limit in config.limits],
            "front_cost": limited_cost(config.limits),
            "answers": [
                {"limit": limit and limit.model_dump(), **_entry(run, answer)}
                for limit, answer in found
            ],
            "prefer": config.prefer,
            "reliability": reliabilities,  # of each ranking: one, or one for each limit
            "baseline": baseline,
        },
    )
    history.close()
    return candidates


def _announced(config: SearchConfig) -> str:
    """What follows from search.evaluations."""
    sizes = f"population_size = {config.population_size}, num_generations = "
    sizes += str(config.num_generations)
    if config.verify:
        return f"proposals of a predictor, {sizes}, for at most {config.evaluations} evaluations"
    lag = f", lag = {config.lag}" if config.algorithm in ONE_AT_A_TIME else ""
    return (
        f"{config.algorithm}, {sizes}{lag}, as best for {config.evaluations} evaluations on a "
        "space whose truth is known, unless the job says otherwise"
    )


def warn_of_unanswered(config: SearchConfig, ranked: Sequence[Ranking]) -> None:
    """Name the limits that should have an answer of their own and have none."""
    answered = [ranking.limit for ranking in ranked]
    for limit in config.limits if config.one_by_one else ():
        if limit.cost == limited_cost(config.limits) and limit not in answered:
            logger.warning(
                "no answer within %s: none of the candidates within it could be evaluated",
                limit.text,
            )


def _best_trained(run: Run) -> list[Architecture]:
    """The subnets that every step of a sandwich trained, as far as they are within the limits."""
    genes = run.space.genes
    if run.job.supernet.sampling != "sandwich" or any(gene.kind == "op" for gene in genes):
        return []  # operations have no order, so no subnet is the largest
    limits = SplitLimits(run.limits).bounds if run.job.search.one_by_one else run.limits
    ends = [largest(run.space), tuple(gene.first for gene in genes)]
    return as_architectures(limits.feasible(run.space.canonical(as_population(ends))))


def is_finished(run: Run) -> bool:
    """Whether the search has ended; then its history must hold all that it evaluated.

    Raises:
        UserError: evaluations are missing, or search.json is not as it was written.
    """
    path, history = run.path(layout.SEARCH), run.history
    if not storage.exists(path):
        return False
    found = storage.read_object(path, "num_evaluations", "winner", "baseline")["num_evaluations"]
    if found != len(history.candidates):
        raise UserError(
            f"{path} tells of {found} evaluations, {history.folder} holds "
            f"{len(history.candidates)}; remove search.json and retrain/ to search them again"
        )
    return True


def answered(run: Run) -> list[Architecture]:
    """The answers of the finished search, in order; then the next best ones that are retrained."""
    summary = storage.read_json(run.path(layout.SEARCH))
    found = [tuple(each["genes"]) for each in summary.get("answers") or [summary["winner"]]]
    if not (run.job.search.one_by_one and run.job.search.limits):  # ways may have been added
        number = max(way.num_winners for way in run.job.retrain.ways)
        found += [each.arch for each in best_first(run.candidates)[:number]]
        return list(dict.fromkeys(found))[: max(1, number)]
    return list(dict.fromkeys(found))


def _write_best(run: Run, candidates: Sequence[Candidate]) -> list[Candidate]:
    """Write the Pareto front and the top k; return all, the best first."""
    ranked = best_first(candidates)
    front = pareto_front(candidates, limited_cost(run.job.search.limits))
    top = ranked[: run.job.search.top_k]
    storage.write_json(run.path(layout.FRONT), [_entry(run, found) for found in front])
    storage.write_json(run.path(layout.TOP), [_entry(run, found) for found in top])
    return ranked


def evaluators(run: Run) -> "EvaluatorPool":
    """The pool of this run's evaluators."""
    from nasray.evaluation.evaluator import EvaluationTask, EvaluatorPool

    recorded = run.path(layout.PRECISION)
    return EvaluatorPool(
        EvaluationTask(
            supernet=run.supernet_path,
            digest=run.supernet_digest,
            data_path=run.data_path,
            job=run.job,
            fingerprint=run.dataset.fingerprint,
            precision=storage.read_json(recorded) if storage.exists(recorded) else "",
        ),
        record=lambda precision: storage.write_json(recorded, precision),
    )


def begin(run: Run, history: History) -> dict[str, Any]:
    """What a search began with and must go on with, whatever has been fitted or measured since."""
    path = run.job.search.predictor
    begun = {
        "predictor": checkpoint.digest(path) if path else "",
        "latency_table": run.latency.digest() if run.latency else "",
        "num_known": len(run.sample.candidates),
    }
    recorded = run.path(layout.SEARCH_INPUTS)
    if history.empty or not storage.exists(recorded):
        storage.write_json(recorded, begun)
    before = storage.read_json(recorded)
    if before["predictor"] != begun["predictor"]:
        raise UserError(f"search.predictor = {path}: not the file that this search began with")
    if before["latency_table"] != begun["latency_table"]:
        raise UserError(
            f"search.latency_table = {run.job.search.latency_table}: not the table that this "
            f"search began with; restore it, or remove {run.path(layout.HISTORY)} to search anew"
        )
    return before


def _verified(run: Run, begun: dict[str, Any]) -> Algorithm:
    """The search whose proposals come from a predictor: the job's, or one fitted to this run."""
    from nasray.algorithms.annealing import Annealing
    from nasray.algorithms.verified import VerifiedSearch

    known = begun["num_known"]
    warn_of_chance(run.job.search, known)
    return VerifiedSearch(
        run.space,
        run.job.search,
        run.limits,
        run.job.seed,
        inner_search=Annealing,
        fit=partial(AccuracyPredictor.fit, run.space),
        known=run.sample.candidates[:known],
        predictor=given_predictor(run),
    )


def warn_of_chance(config: SearchConfig, known: int) -> None:
    """Say that a verified search, before which `known` evaluations are known, is a random one."""
    from nasray.algorithms.verified import MIN_FITTED

    known += config.population_size * (config.num_generations - 1)
    if known < MIN_FITTED and not config.predictor:
        logger.warning(
            "search.verify: a predictor is fitted to %d evaluations at least, and %d are known "
            "before the last generation, so all candidates are random; a search of more "
            "generations, or after `nasray fit-predictor RUN_DIR --sample %d`, has some proposed",
            MIN_FITTED,
            known,
            MIN_FITTED,
        )


def given_predictor(run: Run) -> AccuracyPredictor | None:
    """The predictor that the job names in search.predictor, if it names one.

    Raises:
        UserError: the file is absent, damaged, or of another space.
    """
    path = run.job.search.predictor
    return AccuracyPredictor.load(path, run.space) if path else None


def evaluate(run: Run, archs: Sequence[Architecture]) -> list[dict[str, Any]]:
    """BN-recalibrated hold-out top-1 and costs of `archs`, in their order.

    They join the run's data set of evaluations, as its source "listed".
    """
    from nasray.evaluation.evaluator import Request

    with evaluators(run) as pool:
        evaluations = pool.evaluate([Request(arch=arch) for arch in archs])
    history, costs = run.listed, run.limits.costs(archs)
    history.append(
        [
            Candidate.of(found, arch=arch, costs=cost, generation=len(history))
            for arch, found, cost in zip(archs, evaluations, costs, strict=True)
        ],
        run.space.to_json,
    )
    return [
        {"arch": run.space.to_json(arch), **_top1(run, found), **cost}
        for arch, found, cost in zip(archs, evaluations, costs, strict=True)
    ]


def _top1(run: Run, found: Evaluation) -> dict[str, Any]:
    if found.failed:
        return {"top1": None, "error": found.error}
    return {"top1": found.top1, **_other_fitness(run, found)}


def _other_fitness(run: Run, found: Evaluation) -> dict[str, float]:
    """The fitness, where it is not top-1."""
    name = run.job.search.fitness
    key = f"{name}_top1" if name == run.job.search.accuracy else name
    return {} if name == "top1" else {key: found.fitness}


def accuracy_of(found: Evaluation, config: SearchConfig) -> float:
    """Top-1, or balanced top-1 if that is searched for."""
    return found.fitness if config.fitness == config.accuracy else found.top1


def _compare_with_random(
    run: Run, pool: "EvaluatorPool", limit: Limit | None, winner: Candidate
) -> dict[str, Any] | None:
    """The winner, which answers `limit` or all of them, and random subnets under the same limits
    on the validation folder, which search never saw. For the report only: nothing is chosen by it.
    """
    from nasray.evaluation.evaluator import Request

    number = run.job.search.num_baseline
    if number == 0:
        return None
    limits = Limits(run.space, limits_of(run.job, limit), run.latency)
    rng = np.random.default_rng((run.job.seed, 0xBA5E))
    others = limits.draw(number, rng, {winner.arch})
    requests = [Request(arch=arch, on_validation=True) for arch in (winner.arch, *others)]
    evaluations = pool.evaluate(requests)
    if evaluations[0].failed:
        return None
    succeeded = (found for found in evaluations if not found.failed)
    winner_top1, *random_top1 = (accuracy_of(found, run.job.search) for found in succeeded)
    return {
        "winner_top1": winner_top1,
        "random_top1": random_top1,
        "random_mean_top1": float(np.mean(random_top1)) if random_top1 else None,
        "num_images": evaluations[0].images,
        "resolution": run.space.resolution_of(winner.arch),
        "scaled_from": run.job.space.resolution,
    }


def _entry(run: Run, candidate: Candidate) -> dict[str, Any]:
    return {
        "arch": run.space.to_json(candidate.arch),
        "genes": list(candidate.arch),
        "fitness": candidate.fitness,
        **({"top1": candidate.top1} if run.job.search.fitness != "top1" else {}),
        "top1_error": (candidate.top1 * (1 - candidate.top1) / candidate.images) ** 0.5,
        "generation": candidate.generation,
        **candidate.costs,
    }


def require_supernet(run: Run) -> None:
    """Refuse here what an actor would refuse: a supernet not trained, or of another space."""
    if not storage.exists(run.supernet_path):
        raise UserError(f"{run.folder} has no trained supernet; run `nasray train` first")
    checkpoint.load_supernet(run.supernet_path, run.space)
