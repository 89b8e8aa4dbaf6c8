"""The stages of a run, in order, on one run directory: the database of everything found.

RUN/job.json, data/, supernet.pt, curves/, history/, front.json, top.json, search.json,
retrain/, export/, report.html. Each stage reads what the earlier ones wrote, and does
nothing if its own result is there: the same command again continues where it stopped.
"""

import logging
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import numpy as np

import nasray
from nasray import checkpoint, cost, storage
from nasray.config import DataConfig, Job, parse_job
from nasray.datasets import Dataset, DatasetInfo, import_dataset, open_dataset
from nasray.errors import UserError
from nasray.images import JobImages
from nasray.progress import progress
from nasray.sampler import check_trained_widths
from nasray.search.candidate import Candidate, best_first, pareto_front
from nasray.search.driver import run_search
from nasray.search.history import History
from nasray.search.limits import Limits
from nasray.spaces import make_space
from nasray.spaces.space import Architecture, Space

logger = logging.getLogger(__name__)

# What may differ when a run is continued: where the data lies, and how much of the cluster
# is used for work whose results do not depend on it.
FREE_KEYS = {
    ("data", "path"),
    ("data", "loader_workers"),
    ("compute", "num_evaluators"),
    ("compute", "gpus_per_evaluator"),
    ("compute", "max_failures"),
}


@dataclass(frozen=True)
class Run:
    """A run directory and the job it is for."""

    folder: str
    job: Job

    @property
    def data_path(self) -> str:
        if self.job.data.source == "parquet":
            return storage.absolute(self.job.data.path)
        return storage.join(self.folder, "data")

    @cached_property
    def dataset(self) -> Dataset:
        """The run's data set; refused if it is not the one that the run began with."""
        dataset = open_dataset(self.data_path)
        recorded = self.path("fingerprint.json")
        if not storage.exists(recorded):
            storage.write_json(recorded, dataset.fingerprint)
        elif storage.read_json(recorded) != dataset.fingerprint:
            raise UserError(
                f"{self.folder} was begun with another data set than {self.data_path}; "
                "give that one (data.path, --data), or use another run directory"
            )
        return dataset

    @cached_property
    def space(self) -> Space:
        return make_space(self.job.space, len(self.dataset.classes))

    @cached_property
    def limits(self) -> Limits:
        return Limits(self.space, self.job.search.limits)

    @property
    def supernet_path(self) -> str:
        return storage.join(self.folder, "supernet.pt")

    @property
    def history(self) -> History:
        return History(storage.join(self.folder, "history"))

    def path(self, *names: str) -> str:
        return storage.join(self.folder, *names)


@contextmanager
def opened(folder: str, job: Job | None = None, data_path: str | None = None) -> Iterator[Run]:
    """Open a run directory for work on it, alone; with a `job`, begin one or continue it.

    Without a job, `data_path` says where the data set lies now, if it has moved.
    """
    folder = storage.absolute(folder)
    recorded_path = storage.join(folder, "job.json")
    if job is None and not storage.exists(recorded_path):
        raise UserError(f"{folder} is not a run directory: it has no job.json")
    with storage.held(folder):
        recorded = _recorded_job(recorded_path, data_path)
        if job is None:
            job = recorded
        elif _begun(folder) and recorded is not None:
            _check_same(recorded, job, folder)
        elif recorded != job:
            storage.write_json(recorded_path, {"job": job.model_dump(), **_circumstances()})
        yield Run(folder, job)


def check_names(job: Job, origin: str) -> None:
    """Refuse names in [space] and in limits that no space and no cost has, before any work."""
    try:
        make_space(job.space, 10)
        for limit in job.search.limits:
            cost.check_cost(limit.cost)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def prepare_data(run: Run) -> None:
    """Import the data set into RUN/data, unless the job names an imported one."""
    if run.job.data.source == "parquet":
        run.dataset  # noqa: B018  opened to be checked
        return
    info = import_shown(run.job.data, run.data_path, seed=run.job.seed)
    logger.info(
        "data: %d training and %d validation images of %d classes",
        info.num_train,
        info.num_val,
        len(info.classes),
    )


def import_shown(config: DataConfig, destination: str, *, seed: int) -> DatasetInfo:
    """Import a data set behind a progress bar."""
    with progress("data", 100) as show:
        return import_dataset(
            config,
            destination,
            seed=seed,
            show=lambda done, total: show(100 * done // max(total, 1), f"{done} images"),
        )


def train(run: Run) -> None:
    """Train the supernet into RUN/supernet.pt."""
    from nasray.trainer import train_supernet

    # Limits that nothing meets, and widths that nothing trains, should be known before hours
    # of training.
    run.limits.draw(1, np.random.default_rng(0), set())
    check_trained_widths(run.space, run.job.supernet)
    train_supernet(run.job, run.folder, run.data_path)


def search(run: Run) -> list[Candidate]:
    """Search the supernet; write the history, the Pareto front, the top k and a summary."""
    from nasray.evaluator import EvaluationTask, EvaluatorPool

    config, history = run.job.search, run.history
    done = storage.exists(run.path("search.json"))
    if done:
        return history.candidates
    _require_supernet(run)
    task = EvaluationTask(supernet=run.supernet_path, data_path=run.data_path, job=run.job)
    num_done, num_all = len(history), config.num_generations
    with EvaluatorPool(task) as pool, progress("search", num_all, num_done) as show:
        candidates = run_search(
            run.space, config, run.limits, pool, history, seed=run.job.seed, show=show
        )
    ranked = best_first(candidates)
    front = pareto_front(candidates, front_cost(run.job))
    storage.write_json(run.path("front.json"), [_entry(run, found) for found in front])
    storage.write_json(run.path("top.json"), [_entry(run, c) for c in ranked[: config.top_k]])
    storage.write_json(
        run.path("search.json"),
        {
            "winner": _entry(run, ranked[0]),
            "num_evaluations": len(candidates),
            "seconds": sum(candidate.seconds for candidate in candidates),
            "limits": [limit.model_dump() for limit in config.limits],
            "front_cost": front_cost(run.job),
            "baseline": _compare_with_random(run, ranked[0].arch),
        },
    )
    return candidates


def front_cost(job: Job) -> str:
    """The cost that the Pareto front is drawn over: the first limited one, else MACs."""
    return job.search.limits[0].cost if job.search.limits else "macs"


def evaluate(run: Run, archs: Sequence[Architecture]) -> list[dict[str, Any]]:
    """BN-recalibrated hold-out top-1 and costs of `archs`, in their order."""
    from nasray.evaluator import EvaluationTask, EvaluatorPool

    _require_supernet(run)
    task = EvaluationTask(supernet=run.supernet_path, data_path=run.data_path, job=run.job)
    with EvaluatorPool(task) as pool:
        evaluations = pool(archs)
    return [
        {"arch": run.space.to_json(arch), "top1": found.fitness, **costs}
        for arch, found, costs in zip(archs, evaluations, run.limits.costs(archs), strict=True)
    ]


def retrain(run: Run) -> list[dict[str, Any]]:
    """Train the best candidates from scratch, and profile each."""
    from nasray.tuner import retrain as tune

    winners = best_first(run.history.candidates)[: run.job.retrain.num_winners]
    if not winners:
        raise UserError(f"{run.folder} has no search history; run `nasray search` first")
    results = []
    for index, winner in enumerate(winners):
        name = str(index)
        ops = cost.profile(run.space, winner.arch)
        result = tune(run.job, run.folder, run.data_path, winner.arch, name)
        storage.write_json(run.path("retrain", name, "profile.json"), profile_json(ops))
        results.append(result | {"costs": cost.total(ops)})
        storage.write_json(run.path("retrain", name, "result.json"), results[-1])
    return results


def export(run: Run) -> list[dict[str, Any]]:
    """Write each retrained winner as ONNX, checked against torch on validation images."""
    from nasray.export import export_onnx

    exported = []
    for name in storage.list_names(run.path("retrain")):
        if not storage.exists(run.path("retrain", name, "result.json")):
            continue  # still being trained
        done, model = run.path("export", f"{name}.json"), run.path("export", f"{name}.onnx")
        if not (storage.exists(done) and storage.exists(model)):
            space, arch, subnet, extra = checkpoint.load_subnet(
                run.path("retrain", name, "model.pt")
            )
            images, _ = JobImages(run.job, run.data_path).validation(64)
            found = export_onnx(
                subnet,
                model,
                resolution=space.resolution,
                classes=extra["classes"],
                metadata={"space": space.name, "arch": str(space.to_json(arch))},
                check_images=images,
            )
            storage.write_json(done, found)
        exported.append(storage.read_json(done))
    if not exported:
        raise UserError(f"{run.folder} has no retrained model; run `nasray retrain` first")
    return exported


def profile_json(ops: Sequence[cost.OpCount]) -> dict[str, Any]:
    """A profile as RUN/retrain/<k>/profile.json keeps it."""
    keys = ("op_name", "inp_size", "kernel_size", "cin", "cout", "params", "macs")
    return {
        "rows": [
            {key: getattr(op, key) for key in (*keys, "micronet_params", "mults", "adds")}
            for op in ops
            if op.listed
        ],
        "totals": cost.total(ops),
        "micronet": [{**asdict(row), "score": row.score} for row in cost.micronet_rows(ops)],
    }


def _compare_with_random(run: Run, winner: Architecture) -> dict[str, Any] | None:
    """Winner and random feasible subnets on the validation folder, which search never saw.

    For the report only: nothing is chosen by it.
    """
    from nasray.evaluator import EvaluationTask, EvaluatorPool

    number = run.job.search.num_baseline
    if number == 0:
        return None
    others = run.limits.draw(number, np.random.default_rng((run.job.seed, 0xBA5E)), {winner})
    task = EvaluationTask(
        supernet=run.supernet_path, data_path=run.data_path, job=run.job, split="val"
    )
    with EvaluatorPool(task) as pool:
        winner_top1, *random_top1 = (found.fitness for found in pool([winner, *others]))
    return {
        "winner_top1": winner_top1,
        "random_top1": random_top1,
        "random_mean_top1": float(np.mean(random_top1)) if others else None,
        "num_images": run.dataset.num("val"),
    }


def _entry(run: Run, candidate: Candidate) -> dict[str, Any]:
    return {
        "arch": run.space.to_json(candidate.arch),
        "genes": list(candidate.arch),
        "fitness": candidate.fitness,
        "generation": candidate.generation,
        **candidate.costs,
    }


def _require_supernet(run: Run) -> None:
    """Refuse here what an actor would refuse: a supernet not trained, or of another space."""
    if not storage.exists(run.supernet_path):
        raise UserError(f"{run.folder} has no trained supernet; run `nasray train` first")
    checkpoint.load_supernet(run.supernet_path, run.space)


def _recorded_job(path: str, data_path: str | None) -> Job | None:
    """The job that RUN/job.json records, or none if there is no such file."""
    if not storage.exists(path):
        return None
    content = storage.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("job"), dict):
        raise UserError(f"{path}: not written by nasray; restore or remove it")
    values = content["job"]
    if data_path:
        values["data"]["path"] = storage.absolute(data_path)
    return parse_job(values, path)


def _begun(folder: str) -> bool:
    """Whether anything has been computed that another job would contradict."""
    made = ("supernet.pt", "train", "history", "retrain")
    return any(storage.exists(storage.join(folder, name)) for name in made)


def _check_same(recorded: Job, job: Job, folder: str) -> None:
    """Refuse to continue a run with another job; name the first difference."""
    old, new = recorded.model_dump(), job.model_dump()
    for section, value in new.items():
        pairs = (
            [
                ((section, key), old[section].get(key), value.get(key))
                for key in {**old[section], **value}
            ]
            if isinstance(value, dict)
            else [((section,), old[section], value)]
        )
        for keys, before, after in pairs:
            if keys not in FREE_KEYS and before != after:
                raise UserError(
                    f"{folder} was recorded with {'.'.join(keys)} = {before!r}, the job says "
                    f"{after!r}; use another run directory, or the recorded value"
                )


def _circumstances() -> dict[str, Any]:
    import ray
    import torch

    return {
        "versions": {
            "nasray": nasray.__version__,
            "ray": ray.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "started": datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds"),
    }
