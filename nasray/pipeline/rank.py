"""How well a run's supernet orders architectures whose true top-1 is known: RUN/rank.json.

The truth is a table of trained networks, or of this run's own, some of which are trained for a
few epochs each. Beside the supernet, multiply-accumulates and parameters rank them: what a
supernet must beat to be worth its training.
"""

import csv
import hashlib
import io
import json
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from nasray.config import Job, Limit
from nasray.errors import EvaluationError, UserError
from nasray.pipeline.answers import limits_of
from nasray.pipeline.run import NOT_OF_A_TRIAL, Run, is_retrained
from nasray.pipeline.search import evaluators, is_finished, require_supernet
from nasray.predictors.quality import kendall_tau
from nasray.progress import progress
from nasray.search.candidate import Candidate, fully_evaluated
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures, as_population
from nasray.spaces.space import Architecture, Space, check_architecture
from nasray.storage import files as storage
from nasray.storage import layout

logger = logging.getLogger(__name__)

ARCH_KEYS = ("arch", "architecture", "genes")
VALUE_KEYS = ("value", "mean_acc", "val_top1", "top1", "accuracy", "acc")
RESAMPLES = 300  # of the bootstrap over architectures
FEWEST = 10  # architectures of which there is an interval: resamples of fewer are too much alike
SHOWN_AT_ONCE = 10  # architectures evaluated between two records, at least


def rank(
    run: Run,
    truth: dict[Architecture, float],
    number: int,
    source: str,
    of_pick: dict[Architecture, float] | None = None,
) -> dict[str, Any]:
    """Evaluate `number` architectures of `truth`, drawn by the run's seed, and compare orders.

    Writes RUN/rank.json and returns its content. What the run has evaluated already is not
    evaluated again; what cannot be evaluated is left out. If the search is finished, its answer is
    compared with them where its truth is known, in `truth` or in `of_pick`.

    Raises:
        UserError: fewer than three architectures have a truth, or all have the same.
        EvaluationError: fewer than three could be evaluated.
    """
    chosen = choose(truth, number, run.job.seed, source)
    require_supernet(run)
    candidates, failed = _evaluated(run, chosen)
    first = f"{json.dumps(run.space.to_json(failed[0][0]))}: {failed[0][1]}" if failed else ""
    if len(candidates) < 3:
        raise EvaluationError(
            f"{len(failed)} of {len(chosen)} architectures cannot be evaluated, and an order takes "
            f"three; the first: {first}"
        )
    true = np.array([truth[each.arch] for each in candidates])
    by_ranker = {
        "supernet": np.array([each.fitness for each in candidates]),
        "macs": np.array([each.costs["macs"] for each in candidates]),
        "params": np.array([each.costs["params"] for each in candidates]),
    }
    rows = resamples(len(true), run.job.seed)
    found = {
        "truth": source,
        "num_archs": len(candidates),
        "num_failed": len(failed),
        "first_failed": first,
        "rankers": {name: agreement(values, true, rows) for name, values in by_ranker.items()},
        "beyond_macs": beyond(by_ranker["supernet"], by_ranker["macs"], true, rows),
        "pick": _worth_of_pick(run, truth | (of_pick or {}), [each.arch for each in candidates]),
        "archs": [list(each.arch) for each in candidates],
        "true": true.tolist(),
        **{name: values.tolist() for name, values in by_ranker.items()},
    }
    storage.write_json(run.path(layout.RANK), found)
    return found


def choose(
    truth: dict[Architecture, float], number: int, seed: int, source: str
) -> list[Architecture]:
    """Draw `number` architectures of `truth`, or all if there are fewer.

    Raises:
        UserError: fewer than three have a truth, or those drawn all have the same.
    """
    if len(truth) < 3:
        raise UserError(f"{source}: {len(truth)} architectures; an order takes three or more")
    every = sorted(truth)
    rng = np.random.default_rng((seed, 0x7A2B))
    chosen = [every[row] for row in rng.permutation(len(every))[:number]]
    values = [truth[arch] for arch in chosen]
    if len(set(values)) == 1:
        more = "a larger --sample" if len(values) < len(every) else "other ones (--value NAME)"
        raise UserError(
            f"{source}: all {len(values)} true values are {values[0]:.6g}, which have no order; "
            f"give {more}, or with --retrain more --epochs"
        )
    return chosen


def draw_random(run: Run, number: int) -> tuple[list[Architecture], str]:
    """Draw `number` random architectures within the limits that the search's answer keeps, or will.

    Returns them and these limits in words.

    Raises:
        UserError: fewer than three are within these limits.
    """
    require_supernet(run)
    limits = limits_to_draw_in(run.job, _pick(run)[1])
    drawn = draw_within(Limits(run.space, limits, run.latency), number, run.job.seed)
    return drawn, _words(limits)


def limits_to_draw_in(job: Job, own: Limit | None) -> list[Limit]:
    """The limits of an answer to `own`; before there is one, of the first that there will be."""
    first = job.search.limits[0] if job.search.one_by_one and job.search.limits else None
    return limits_of(job, own or first)


def draw_within(limits: Limits, number: int, seed: int) -> list[Architecture]:
    """Draw `number` random architectures within `limits`, or all if there are fewer.

    Raises:
        UserError: there are fewer than three.
    """
    drawn = limits.draw(number, np.random.default_rng((seed, 0x7A2C)), set())
    if len(drawn) < 3:
        raise UserError(
            f"--retrain {number}: within search.limits, {_words(limits.limits)}, there are only "
            f"{len(drawn)} architectures, and an order takes three; rank by --truth FILE, which "
            "limits do not bind, or in a run with wider limits"
        )
    return drawn


def _words(limits: Sequence[Limit]) -> str:
    return " and ".join(each.text for each in limits) or "no limits"


def train_some(
    run: Run, drawn: Sequence[Architecture], epochs: int
) -> tuple[dict[Architecture, float], dict[Architecture, float]]:
    """Train the architectures `drawn`, and the search's answer if there is one, from scratch.

    For `epochs` each, with the first recipe of [retrain]. Under RUN/ranked/; those that were
    trained by the same recipe stay.

    Returns the validation top-1 of those drawn, and apart from it that of the answer.
    """
    from nasray.training.retrain import retrain

    pick, _ = _pick(run)
    job = job_of_training(run.job, epochs)
    named = {folder_of(job, arch): arch for arch in (*drawn, *([pick] if pick else []))}
    record = "retrain JOB RUN_DIR --again" if is_retrained(run.folder) else "train JOB RUN_DIR"
    way_out = f"change [retrain] in the job, record it by `nasray {record}`, and rank again"
    results = dict(
        retrain(job, run.folder, run.data_path, named, into=layout.RANKED, way_out=way_out)
    )
    values = {named[name]: float(results[name]["val_top1"]) for name in named}
    return {arch: values[arch] for arch in drawn}, {pick: values[pick]} if pick else {}


def job_of_training(job: Job, epochs: int) -> Job:
    """The job by which the truth is trained: the first recipe of [retrain], from scratch."""
    values = {key: _first(value) for key, value in job.retrain.model_dump().items()}
    values |= {"init": "scratch", "epochs": epochs, "num_trials": 1, "also": (), "num_winners": 1}
    values |= {"warmup_epochs": min(values["warmup_epochs"], epochs / 4), "distillation": 0.0}
    return job.model_copy(update={"retrain": type(job.retrain).model_validate(values)})


def folder_of(job: Job, arch: Architecture) -> str:
    """Where `arch` is trained, by its recipe, too: what others trained cannot be compared."""
    recipe = job.retrain.model_dump(exclude=NOT_OF_A_TRIAL)
    recipe["workers"] = job.compute.workers_per_trial
    digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()
    return f"{job.retrain.epochs}-{digest[:8]}-{'-'.join(map(str, arch))}"


def _first(value: Any) -> Any:
    """Of a range that would be tuned, its geometric mean."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] > 0:
        return (value[0] * value[1]) ** 0.5
    return sum(value) / 2 if isinstance(value, tuple) and len(value) == 2 else value


def read_truth(path: str, space: Space, value_key: str = "") -> dict[Architecture, float]:
    """Read a table of true values: CSV, or JSON with an object by architecture or a list of rows.

    Architectures are as `nasray evaluate` takes them, strings of digits, or lists of choices;
    rows of one network, under several names, too, are averaged, and a warning tells where they
    differ. `value_key` names the column, which is one of VALUE_KEYS without it.

    Raises:
        UserError: it is not there, is no such table, or an architecture is not one of the space.
    """
    text = _text(path)
    rows = _json_rows(path, text) if path.lower().endswith(".json") else _csv_rows(path, text)
    if not rows:
        raise UserError(f"--truth {path} has no rows; give a CSV file with a header, or JSON")
    arch_key = _key(path, "architecture", list(rows[0]), ARCH_KEYS)
    if value_key == arch_key:
        raise UserError(
            f"--truth {path}: --value {value_key} is the column of the architectures; give that of "
            f"the true values; there are {', '.join(map(str, rows[0]))}"
        )
    known = (value_key,) if value_key else VALUE_KEYS
    value_key = _key(path, "true value", list(rows[0]), known)
    found: dict[Architecture, list[float]] = {}
    values: list[float] = []
    for number, row in enumerate(rows, 1):
        if missing := [key for key in (arch_key, value_key) if key not in row]:
            raise UserError(
                f"--truth {path}, row {number}: no {missing[0]!r}; there are "
                f"{', '.join(map(str, row))}; all rows need the same names"
            )
        try:
            arch = _architecture(row[arch_key], space)
            value = float(row[value_key])
            if isinstance(row[value_key], bool) or not math.isfinite(value):
                raise ValueError
        except UserError as error:
            raise UserError(f"--truth {path}, row {number}: {error}") from None
        except (TypeError, ValueError):
            raise UserError(
                f"--truth {path}, row {number}: {value_key} = {row[value_key]!r} is no finite "
                f"number; columns are {', '.join(map(str, row))} (--value NAME chooses one)"
            ) from None
        found.setdefault(arch, []).append(value)
        values.append(value)
    _check_units(path, value_key, values)
    if several := [arch for arch, own in found.items() if len(set(own)) > 1]:
        logger.warning(
            "--truth %s: %s differs between rows of one network, which are averaged (of %d "
            "architectures; the first: %s with %s)",
            path,
            value_key,
            len(several),
            json.dumps(space.to_json(several[0])),
            ", ".join(f"{value:g}" for value in found[several[0]]),
        )
    return {arch: float(np.mean(values)) for arch, values in found.items()}


def _check_units(path: str, key: str, values: Sequence[float]) -> None:
    """Refuse accuracies some of which are in percent, some fractions.

    Of a network that learned nothing 0.1 may be its percentage, of a thousand classes.
    """
    fractions = [row for row, value in enumerate(values) if 0.1 < value < 1]
    largest = max(range(len(values)), key=values.__getitem__)
    if fractions and min(values) >= 0 and 10 < values[largest] <= 100:
        raise UserError(
            f"--truth {path}: {key} = {values[fractions[0]]:g} in row {fractions[0] + 1} and "
            f"{values[largest]:g} in row {largest + 1}, fractions and percent in one column; "
            "divide those in percent by 100"
        )


def _text(path: str) -> str:
    if not storage.is_url(path) and not storage.exists(path):
        raise UserError(f"--truth {path} does not exist; give a CSV or JSON file")
    if path.lower().endswith((".jsonl", ".ndjson")):
        raise UserError(f"--truth {path}: JSON lines; give a JSON list of these rows, or CSV")
    try:
        return storage.read(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"--truth {path} is not in UTF-8; save it as CSV in UTF-8") from None
    except OSError as error:
        raise UserError(f"--truth {storage.told(error)}; give a CSV or JSON file") from None


def _csv_rows(path: str, text: str) -> list[dict[str, Any]]:
    reader = csv.DictReader(io.StringIO(text))
    names = list(reader.fieldnames or [])
    if twice := [name for name in names if name and names.count(name) > 1]:
        raise UserError(f"--truth {path}: two columns are called {twice[0]}; rename one of them")
    return list(reader)


def _json_rows(path: str, text: str) -> list[dict[str, Any]]:
    def without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(found := dict(pairs)) < len(pairs):
            twice = next(key for key in found if keys.count(key) > 1)
            raise UserError(f"--truth {path}: {twice!r} is twice in one object; keep one of them")
        return found

    try:
        content = json.loads(text, object_pairs_hook=without_twins)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"--truth {path}: no JSON: {error}") from None
    if isinstance(content, dict):
        return [
            {"arch": arch, **(value if isinstance(value, dict) else {"value": value})}
            for arch, value in content.items()
        ]
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return content
    raise UserError(f"--truth {path}: neither an object by architecture nor a list of objects")


def _key(path: str, what: str, there: Sequence[str], known: Sequence[str]) -> str:
    for key in known:
        if key in there:
            return key
    hint = "" if known is ARCH_KEYS else "; --value NAME chooses one"
    raise UserError(
        f"--truth {path}: no column for the {what}, which is one of {', '.join(known)}; there are "
        f"{', '.join(map(str, there))}{hint}"
    )


def _architecture(value: Any, space: Space) -> Architecture:
    if isinstance(value, str) and value in space.named:
        return space.named[value]
    if isinstance(value, str) and value.isdigit() and len(value) == len(space.genes):
        value = [int(digit) for digit in value]
    elif isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{value!r} is no architecture of {space.name}") from None
    if isinstance(value, dict):
        return space.from_json(value)
    if not isinstance(value, list) or not all(isinstance(each, int) for each in value):
        raise UserError(f"{value!r} is no architecture of {space.name}")
    arch = check_architecture(value, space)
    return tuple(space.canonical(as_population([arch]))[0].tolist())


def agreement(
    values: np.ndarray, true: np.ndarray, rows: np.ndarray
) -> dict[str, list[float | None]]:
    """How well `values` (n,) order the networks of these true values (n,), more being better.

    Each as [figure, low, high], of a 95 % interval by a bootstrap over the networks, whose
    resamples are `rows` (resamples, n): Kendall's tau-b, Spearman's rho, the share of the true best
    tenth that is in the tenth ranked first, and by how much the network ranked first is below the
    best (regret, in units of the truth). Of fewer than FEWEST networks there is no interval, and of
    regret never: a resample may lack the best. Then low and high are None.
    """
    figures = {"kendall_tau": kendall_tau, "spearman": spearman, "top_tenth": top_tenth}
    found = {
        name: interval(partial(_of_rows, of, values, true), rows) for name, of in figures.items()
    }
    return found | {"regret": [regret(values, true), None, None]}


def beyond(
    values: np.ndarray, others: np.ndarray, true: np.ndarray, rows: np.ndarray
) -> list[float | None]:
    """Kendall's tau-b of `values` (n,) minus that of `others` (n,), as agreement() gives it.

    In pairs: both order the same networks in each resample.
    """

    def difference(row: np.ndarray) -> float:
        own, other = (_of_rows(kendall_tau, each, true, row) for each in (values, others))
        return own - other

    return interval(difference, rows)


def resamples(number: int, seed: int) -> np.ndarray:
    """Of the bootstrap over `number` networks: (RESAMPLES, number)."""
    rng = np.random.default_rng((seed, 0xB007))
    return rng.integers(0, number, (RESAMPLES, number))


def _of_rows(
    of: Callable[[np.ndarray, np.ndarray], float],
    values: np.ndarray,
    true: np.ndarray,
    row: np.ndarray,
) -> float:
    return of(values[row], true[row])


def interval(figure: Callable[[np.ndarray], float], rows: np.ndarray) -> list[float | None]:
    """[figure, low, high], as of agreement(): of all networks, whose resamples are `rows`.

    `figure` takes the positions of the networks that it is computed of.
    """
    whole = float(figure(np.arange(rows.shape[1])))
    if rows.shape[1] < FEWEST:
        return [whole, None, None]
    low, high = np.quantile([figure(row) for row in rows], (0.025, 0.975))
    return [whole, float(low), float(high)]


def spearman(values: np.ndarray, true: np.ndarray) -> float:
    """Spearman's rho between two arrays (n,); 0 where one of them is constant."""
    first, second = (_ranks(each) - (len(each) - 1) / 2 for each in (values, true))
    norm = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / norm if norm else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 0; equal values have the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


def top_tenth(values: np.ndarray, true: np.ndarray) -> float:
    """The share of the tenth ranked first by `values` (n,), one at least, that is in the true best.

    Of equal `values` at its end each is in it by the same share; as good as the last of the true
    best tenth is good enough.
    """
    number = max(1, round(len(true) / 10))
    last, worst = (np.sort(each)[-number] for each in (values, true))
    above, level = values > last, values == last
    taken = above + level * ((number - above.sum()) / level.sum())
    return float(taken[true >= worst].sum()) / number


def regret(values: np.ndarray, true: np.ndarray) -> float:
    """How far the first by `values` (n,), the mean of equal ones, is below the best of `true`."""
    return float(true.max() - true[values == values.max()].mean())


def _pick(run: Run) -> tuple[Architecture | None, Limit | None]:
    """The answer of the search, if it is finished, and the limit that it answers by itself."""
    if not is_finished(run):
        return None, None
    summary = storage.read_json(run.path(layout.SEARCH))
    answers = summary.get("answers") or [{}]
    limit = answers[0].get("limit")
    return tuple(summary["winner"]["genes"]), Limit(**limit) if limit else None


def _worth_of_pick(
    run: Run, truth: dict[Architecture, float], drawn: Sequence[Architecture]
) -> dict[str, Any] | None:
    """What the search's answer is worth, beside the best and the random ones within its limits."""
    pick, limit = _pick(run)
    if pick is None or pick not in truth:
        return None
    limits = Limits(run.space, limits_of(run.job, limit), run.latency)
    within = {pick, *as_architectures(limits.feasible(as_population(list(truth))))}
    own, others = truth[pick], [truth[arch] for arch in drawn if arch in within - {pick}]
    return {
        "genes": list(pick),
        "true": own,
        "regret": max(truth[arch] for arch in within) - own,
        "num_known": len(within),
        "better_than": float(np.mean(np.array(others) < own)) if others else None,
        "num_others": len(others),
    }


def _evaluated(
    run: Run, archs: Sequence[Architecture]
) -> tuple[list[Candidate], list[tuple[Architecture, str]]]:
    """The evaluations of `archs`, in their order; those that are missing are done and recorded.

    Also those that cannot be evaluated, each with its error.
    """
    from nasray.evaluation.evaluator import Request

    history = History(run.path(layout.HISTORY), "ranked")
    before = [*run.candidates, *run.sample.candidates, *run.listed.candidates]
    known = {each.arch: each for each in fully_evaluated([*before, *history.candidates])}
    missing = [arch for arch in archs if arch not in known]
    failed: list[tuple[Architecture, str]] = []
    if missing:
        size = max(SHOWN_AT_ONCE, 4 * run.job.compute.num_evaluators)
        done = len(archs) - len(missing)
        with evaluators(run) as pool, progress("rank", len(archs), done) as show:
            for start in range(0, len(missing), size):
                some = missing[start : start + size]
                found = pool.evaluate([Request(arch=arch) for arch in some])
                chunk = [
                    Candidate.of(each, arch=arch, costs=costs, generation=len(history))
                    for each, arch, costs in zip(found, some, run.limits.costs(some), strict=True)
                ]
                failed += [(each.arch, each.error) for each in chunk if each.failed]
                if succeeded := [each for each in chunk if not each.failed]:
                    history.append(succeeded, run.space.to_json)
                known |= {each.arch: each for each in succeeded}
                show(done + start + len(some), "")
    return [known[arch] for arch in archs if arch in known], failed
