"""How well a run's supernet orders architectures whose true top-1 is known: RUN/rank.json.

The truth is a table of trained networks, or of this run's own, some of which are trained for a
few epochs each. Beside the supernet, multiply-accumulates and parameters rank them: what a
supernet must beat to be worth its training.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from nasray.errors import EvaluationError, UserError
from nasray.pipeline.run import Run
from nasray.pipeline.search import evaluators, is_finished, require_supernet
from nasray.predictors.quality import kendall_tau
from nasray.progress import progress
from nasray.search.candidate import Candidate, fully_evaluated
from nasray.search.history import History
from nasray.spaces.population import as_population
from nasray.spaces.space import Architecture, Space, check_architecture
from nasray.storage import files as storage
from nasray.storage import layout

ARCH_KEYS = ("arch", "architecture", "genes")
VALUE_KEYS = ("value", "mean_acc", "val_top1", "top1", "accuracy", "acc")
RANKERS = ("supernet", "macs", "params")
RESAMPLES = 300  # of the bootstrap over architectures
SHOWN_AT_ONCE = 10  # architectures evaluated between two records, at least


def rank(run: Run, truth: dict[Architecture, float], number: int, source: str) -> dict[str, Any]:
    """Evaluate `number` architectures of `truth`, drawn by the run's seed, and compare orders.

    Writes RUN/rank.json and returns its content. What the run has evaluated already is not
    evaluated again. If the search is finished, its answer is one of them where its truth is known.

    Raises:
        UserError: fewer than three architectures have a truth.
        EvaluationError: one could not be evaluated.
    """
    if len(truth) < 3:
        raise UserError(f"{source}: {len(truth)} architectures; an order takes three or more")
    require_supernet(run)
    every = sorted(truth)
    rng = np.random.default_rng((run.job.seed, 0x7A2B))
    chosen = [every[row] for row in rng.permutation(len(every))[:number]]
    pick = _pick(run)
    candidates = _evaluated(run, chosen + ([pick] if pick in truth and pick not in chosen else []))
    true = np.array([truth[each.arch] for each in candidates])
    by_ranker = {
        "supernet": np.array([each.fitness for each in candidates]),
        "macs": np.array([each.costs["macs"] for each in candidates]),
        "params": np.array([each.costs["params"] for each in candidates]),
    }
    drawn = slice(len(chosen))  # the pick is not a random one
    found = {
        "truth": source,
        "num_archs": len(chosen),
        "rankers": {
            name: agreement(values[drawn], true[drawn], run.job.seed)
            for name, values in by_ranker.items()
        },
        "pick": _regret_of_pick(truth, true[drawn], pick),
        "archs": [list(each.arch) for each in candidates[drawn]],
        "true": true[drawn].tolist(),
        **{name: values[drawn].tolist() for name, values in by_ranker.items()},
    }
    storage.write_json(run.path(layout.RANK), found)
    return found


def train_some(run: Run, number: int, epochs: int) -> dict[Architecture, float]:
    """Train `number` random architectures within the limits, and the search's answer if there is
    one, from scratch for `epochs` each, with the first recipe of [retrain]; return their
    validation top-1. Under RUN/ranked/; those that are trained stay.
    """
    from nasray.training.retrain import retrain

    require_supernet(run)
    rng = np.random.default_rng((run.job.seed, 0x7A2C))
    archs = run.limits.draw(number, rng, set())
    pick = _pick(run)
    archs += [pick] if pick is not None and pick not in archs else []
    values = {key: _first(value) for key, value in run.job.retrain.model_dump().items()}
    values |= {"init": "scratch", "epochs": epochs, "num_trials": 1, "also": (), "num_winners": 1}
    values |= {"warmup_epochs": min(values["warmup_epochs"], epochs / 4), "distillation": 0.0}
    config = type(run.job.retrain).model_validate(values)
    job = run.job.model_copy(update={"retrain": config})
    named = {f"{epochs}-{'-'.join(map(str, arch))}": arch for arch in archs}
    results = dict(retrain(job, run.folder, run.data_path, named, into=layout.RANKED))
    return {named[name]: float(results[name]["val_top1"]) for name in named}


def _first(value: Any) -> Any:
    """Of a range that would be tuned, its geometric mean."""
    if isinstance(value, tuple) and len(value) == 2 and value[0] > 0:
        return (value[0] * value[1]) ** 0.5
    return sum(value) / 2 if isinstance(value, tuple) and len(value) == 2 else value


def read_truth(path: str, space: Space, value_key: str = "") -> dict[Architecture, float]:
    """Read a table of true values: CSV, or JSON with an object by architecture or a list of rows.

    Architectures are as `nasray evaluate` takes them, strings of digits, or lists of choices;
    several names of one network must agree or are averaged. `value_key` names the column, which
    is one of VALUE_KEYS without it.

    Raises:
        UserError: it is not there, is no such table, or an architecture is not one of the space.
    """
    if not storage.is_url(path) and not storage.exists(path):
        raise UserError(f"--truth {path} does not exist; give a CSV or JSON file")
    text = storage.read(path).decode("utf-8-sig")
    rows = _json_rows(path, text) if path.endswith(".json") else _csv_rows(text)
    if not rows:
        raise UserError(f"--truth {path} has no rows; give a CSV file with a header, or JSON")
    arch_key = _key(path, "architecture", list(rows[0]), ARCH_KEYS)
    value_key = value_key or _key(path, "true value", list(rows[0]), VALUE_KEYS)
    found: dict[Architecture, list[float]] = {}
    for number, row in enumerate(rows, 1):
        try:
            arch = _architecture(row[arch_key], space)
            value = float(row[value_key])
            if not math.isfinite(value):
                raise ValueError
        except UserError as error:
            raise UserError(f"--truth {path}, row {number}: {error}") from None
        except (KeyError, TypeError, ValueError):
            raise UserError(
                f"--truth {path}, row {number}: {value_key} = {row.get(value_key)!r} is no finite "
                f"number; columns are {', '.join(map(str, row))} (--value NAME chooses one)"
            ) from None
        found.setdefault(arch, []).append(value)
    return {arch: float(np.mean(values)) for arch, values in found.items()}


def _csv_rows(text: str) -> list[dict[str, Any]]:
    return list(csv.DictReader(io.StringIO(text)))


def _json_rows(path: str, text: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
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
    hint = "; --value NAME chooses one" if known is VALUE_KEYS else ""
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


def agreement(values: np.ndarray, true: np.ndarray, seed: int) -> dict[str, list[float]]:
    """How well `values` (n,) order the networks of these true values (n,), more being better.

    Each as [figure, low, high], of a 95 % interval by a bootstrap over the networks: Kendall's
    tau-b, Spearman's rho, the share of the true best tenth that is in the tenth ranked first,
    and by how much the network ranked first is below the best (regret, in units of the truth).
    """
    rng = np.random.default_rng((seed, 0xB007))
    rows = rng.integers(0, len(true), (RESAMPLES, len(true)))
    figures = {"kendall_tau": kendall_tau, "spearman": spearman, "top_tenth": top_tenth}
    return {name: _interval(of, values, true, rows) for name, of in figures.items()} | {
        "regret": _interval(regret, values, true, rows)
    }


def _interval(
    of: Callable[[np.ndarray, np.ndarray], float],
    values: np.ndarray,
    true: np.ndarray,
    rows: np.ndarray,
) -> list[float]:
    low, high = np.quantile([of(values[row], true[row]) for row in rows], (0.025, 0.975))
    return [float(each) for each in (of(values, true), low, high)]


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
    """The share of the best tenth by `true` (n,), one at least, in that by `values` (n,)."""
    number = max(1, round(len(true) / 10))
    first, second = (np.argsort(-each, kind="stable")[:number] for each in (values, true))
    return len(np.intersect1d(first, second)) / number


def regret(values: np.ndarray, true: np.ndarray) -> float:
    """How far the first by `values` (n,), the mean of equal ones, is below the best of `true`."""
    return float(true.max() - true[values == values.max()].mean())


def _pick(run: Run) -> Architecture | None:
    """The answer of the search, if it is finished."""
    if not is_finished(run):
        return None
    return tuple(storage.read_json(run.path(layout.SEARCH))["winner"]["genes"])


def _regret_of_pick(
    truth: dict[Architecture, float], sample: np.ndarray, pick: Architecture | None
) -> dict[str, Any] | None:
    """What the search's answer is worth, beside the best and the random ones."""
    if pick not in truth or pick is None:
        return None
    own = truth[pick]
    return {
        "genes": list(pick),
        "true": own,
        "regret": max(truth.values()) - own,
        "better_than": float(np.mean(sample < own)),
    }


def _evaluated(run: Run, archs: Sequence[Architecture]) -> list[Candidate]:
    """The evaluations of `archs`, in their order; those that are missing are done and recorded."""
    from nasray.evaluation.evaluator import Request

    history = History(run.path(layout.HISTORY), "ranked")
    before = [*run.candidates, *run.sample.candidates, *run.listed.candidates]
    known = {each.arch: each for each in fully_evaluated([*before, *history.candidates])}
    missing = [arch for arch in archs if arch not in known]
    if missing:
        size = max(SHOWN_AT_ONCE, 4 * run.job.compute.num_evaluators)
        done = len(archs) - len(missing)
        with evaluators(run) as pool, progress("rank", len(archs), done) as show:
            for start in range(0, len(missing), size):
                some = missing[start : start + size]
                found = pool.evaluate([Request(arch=arch) for arch in some])
                failed = [each.error for each in found if each.failed]
                if failed:
                    raise EvaluationError(f"an architecture cannot be evaluated: {failed[0]}")
                chunk = [
                    Candidate.of(each, arch=arch, costs=costs, generation=len(history))
                    for each, arch, costs in zip(found, some, run.limits.costs(some), strict=True)
                ]
                history.append(chunk, run.space.to_json)
                known |= {each.arch: each for each in chunk}
                show(done + start + len(some), "")
    return [known[arch] for arch in archs]
