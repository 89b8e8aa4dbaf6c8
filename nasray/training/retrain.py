"""Weights for the answers of a search: Ray Tune over the recipe, with ASHA; or the supernet's.

Each trial (trial.py) writes a checkpoint of its own every epoch. A run that was killed starts a
new experiment whose trials first report what they had recorded. So ASHA sees the same results in
the same order and makes the same decisions, and no state of Tune itself has to survive.
"""

import time
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from nasray import checkpoint
from nasray.cluster.placement import on_gpu, worker_labels
from nasray.cluster.worker import raise_user_error
from nasray.config import Job, RetrainConfig, parse_job
from nasray.data.shards import read_info
from nasray.errors import UserError
from nasray.progress import following, progress
from nasray.spaces.space import Architecture
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.training.trial import (
    latest_state,
    measure_on_validation,
    run_trial,
    run_trial_worker,
)
from nasray.training.workers import check_batches, resumed, scaling

TUNED = ("learning_rate", "weight_decay", "label_smoothing")


def retrain(
    job: Job,
    run_dir: str,
    data_path: str,
    arch: Architecture,
    name: str,
    *,
    into: str = layout.RETRAIN,
) -> dict:
    """Give `arch` weights in the way of job.retrain; return the result.

    Trains under each recipe of the job, from scratch or from the supernet's weights on, or takes
    these. Writes RUN/<into>/<name>/: model.pt, result.json, curves.json and the trials' state.
    The validation images are used once, on the best model; recipes compete on the hold-out.

    Raises:
        UserError: the folder is of another architecture, or no recipe trained to the end.
    """
    folder, config = storage.join(run_dir, into, name), job.retrain
    result_path = storage.join(folder, layout.RESULT)
    _check_same_arch(folder, arch)
    if storage.exists(result_path):
        return storage.read_object(result_path, "genes", "val_top1", "num_val_images")
    supernet = storage.join(run_dir, layout.SUPERNET)
    teacher = storage.join(run_dir, layout.TEACHER) if job.supernet.has_teacher else supernet
    task = {"job": job.model_dump(), "data_path": data_path, "arch": list(arch)}
    task |= {"supernet": supernet, "teacher": teacher, "folder": folder}
    task["fingerprint"] = read_info(data_path).fingerprint
    if config.epochs:
        result = _train(job, task, name)
    else:
        started = time.monotonic()
        with progress(f"ship {name}", 1) as show:
            result = _measure(job, task, folder)
            show(1, f"validation {result['val_top1']:.1%}")
        result["seconds"] = time.monotonic() - started
    storage.write_json(result_path, result)
    return result


def _train(job: Job, task: dict[str, Any], name: str) -> dict[str, Any]:
    """Train by each recipe of the job; return the result of the best."""
    folder, config = task["folder"], job.retrain
    check_batches(job, task["data_path"], config.batch_size, job.compute.workers_per_trial)
    recipes = draw_recipes(config, job.seed)
    trials = [
        task | {"folder": storage.join(folder, f"{layout.TRIAL}{index}"), "recipe": recipe}
        for index, recipe in enumerate(recipes)
    ]
    total = len(trials) * config.epochs  # an upper bound: ASHA stops some
    with following(f"retrain {name}", total, lambda: _progress(trials)):
        lengths = resumed(lambda: _run(job, trials), lambda: _progress(trials)[0])
    curves = [
        _read_trial(trial, length, config.epochs)
        for trial, length in zip(trials, lengths, strict=True)
    ]
    storage.write_json(storage.join(folder, layout.CURVES), curves)
    finished = [index for index, curve in enumerate(curves) if not curve["stopped"]]
    if not finished:
        reasons = {str(curve.get("failure", "it was stopped")) for curve in curves}
        raise UserError(
            f"{folder}: no recipe trained to the end: {'; '.join(sorted(reasons))}; change "
            "[retrain] in the job and run the same command again"
        )
    key = f"holdout_{job.search.fitness}"
    best = max(finished, key=lambda index: (curves[index]["epochs"][-1][key], -index))
    result = _measure(job, trials[best], folder) | {"trial": best, "recipe": recipes[best]}
    result["seconds"] = sum(epoch["seconds"] for curve in curves for epoch in curve["epochs"])
    return result


def _measure(job: Job, task: dict[str, Any], folder: str) -> dict[str, Any]:
    """Write model.pt into `folder`; return its top-1, measured on a node for training."""
    compute = job.compute
    gpu = on_gpu(compute, 1)
    measure = measure_on_validation.options(
        num_cpus=compute.cpus_per_trial,
        num_gpus=1 if gpu else 0,
        max_retries=compute.max_failures,
        label_selector=worker_labels(compute, gpu=gpu),
    )
    try:
        return ray.get(measure.remote(task, storage.join(folder, layout.MODEL)))
    except RayTaskError as error:
        raise_user_error(error)
        raise


def _check_same_arch(folder: str, arch: Architecture) -> None:
    """Refuse the folder of another architecture; write this one's genes into a new folder."""
    path = storage.join(folder, layout.GENES)
    if not storage.exists(path):
        storage.write_json(path, list(arch))
    elif storage.read_json(path) != list(arch):
        raise UserError(f"{folder} holds another architecture's training; remove it")


def draw_recipes(config: RetrainConfig, seed: int) -> list[dict[str, float]]:
    """Draw the recipes that compete, `config.num_trials` of them, as a function of the seed.

    A pair [low, high] in the job is a range: log-uniform, or uniform if it begins at 0 or is of
    label smoothing. Any other value is the same in all recipes.
    """
    rng = np.random.default_rng((seed, 0x7E57))
    recipes = []
    for _ in range(config.num_trials):
        recipe = {}
        for key in TUNED:
            value = getattr(config, key)
            if not isinstance(value, tuple):
                recipe[key] = float(value)
            elif value[0] > 0 and key != "label_smoothing":
                recipe[key] = float(np.exp(rng.uniform(*np.log(value))))
            else:
                recipe[key] = float(rng.uniform(*value))
        recipes.append(recipe)
    return recipes


def _run(job: Job, trials: list[dict[str, Any]]) -> list[int]:
    """Run Tune in this process, or, for data-parallel trials, in a task that has RAY_ADDRESS.

    Ray Train frees the workers of a stopped trial by asking the cluster's dashboard. Without
    RAY_ADDRESS it finds none on a machine with two clusters, and retraining waits for ever.

    Returns how many epochs of each trial ASHA has seen. Data-parallel workers may have trained
    some more before they heard that their trial was stopped; how many is a matter of timing, so
    these are left out of the results.
    """
    if job.compute.workers_per_trial == 1:
        return _tune(job, trials)
    address = ray.get_runtime_context().gcs_address
    task = ray.remote(
        num_cpus=0,
        label_selector=worker_labels(job.compute, gpu=False),
        max_retries=job.compute.max_failures,
        runtime_env={"env_vars": {"RAY_ADDRESS": address}},
    )(_tune)
    return ray.get(task.remote(job, trials))


def _tune(job: Job, trials: list[dict[str, Any]]) -> list[int]:
    """Run the trials under ASHA, each as a plain function or as a data-parallel training.

    Returns the epochs that each trial had reported when it ended or was stopped.
    """
    config, compute = job.retrain, job.compute
    if compute.workers_per_trial == 1:
        gpu = on_gpu(compute, 1)  # trials that find no GPU wait for one
        needs = {"CPU": compute.cpus_per_trial, **({"GPU": 1} if gpu else {})}
        trial: Any = run_trial
    else:
        # It only waits for its workers, but Tune requires a request of some resource.
        gpu, needs, trial = False, {"CPU": 0, "memory": 256 << 20}, _data_parallel_trial
    labels = worker_labels(compute, gpu=gpu)
    trainable = tune.with_resources(
        trial, tune.PlacementGroupFactory([needs], bundle_label_selector=[labels])
    )
    grace = min(config.grace_epochs, config.epochs)
    storage_path = storage.join(trials[0]["folder"].rsplit("/", 1)[0], layout.TUNE)
    storage.remove(storage_path)  # of a run that was killed; trials keep their own state
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(
            metric=f"holdout_{job.search.fitness}",
            mode="max",
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=config.epochs + 1,  # a trial that reaches the last epoch ends by itself
                grace_period=grace,
                reduction_factor=config.reduction_factor,
            ),
            max_concurrent_trials=compute.concurrent_trials,
            # The default names contain every value that a trial is given.
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=layout.TUNE,
            storage_path=trials[0]["folder"].rsplit("/", 1)[0],
            failure_config=tune.FailureConfig(max_failures=compute.max_failures),
            verbose=0,
        ),
    )
    results = tuner.fit()
    for error in results.errors:
        raise error
    seen = {found.config["trial"]["folder"]: found.metrics["epoch"] for found in results}
    return [seen[trial["folder"]] for trial in trials]


def _trial_name(trial: Any) -> str:
    return trial.config["trial"]["folder"].rsplit("/", 1)[1]


def _data_parallel_trial(config: dict[str, Any]) -> None:
    trial = config["trial"]
    job = parse_job(trial["job"], trial["folder"])
    compute = job.compute
    TorchTrainer(
        run_trial_worker,
        train_loop_config=trial,
        scaling_config=scaling(compute, compute.workers_per_trial, compute.cpus_per_trial),
        run_config=RunConfig(
            name=f"workers-{tune.get_context().get_trial_id()}",
            storage_path=storage.join(trial["folder"], layout.TRAIN),
            failure_config=FailureConfig(max_failures=compute.max_failures),
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def _read_trial(trial: dict[str, Any], length: int, epochs: int) -> dict[str, Any]:
    """A trial's first `length` epochs as RUN/retrain/<name>/curves.json keeps them."""
    path = latest_state(trial["folder"])
    curves = checkpoint.load(path)["curves"][:length] if path else []
    index = int(trial["folder"].rsplit("-", 1)[1])
    found = {"trial": index, "recipe": trial["recipe"], "stopped": len(curves) < epochs}
    failure = storage.join(trial["folder"], layout.FAILURE)
    if storage.exists(failure):
        found["failure"] = storage.read_json(failure)
    return found | {"epochs": curves}


def _progress(trials: list[dict[str, Any]]) -> tuple[int, str]:
    """How many epochs all trials have trained, and the hold-out top-1 of the latest trial."""
    paths = [storage.join(trial["folder"], layout.CURVES) for trial in trials]
    curves = {index: storage.read_rows(p) for index, p in enumerate(paths) if storage.exists(p)}
    if not any(curves.values()):
        return 0, ""
    last = max(index for index, epochs in curves.items() if epochs)
    top1 = curves[last][-1]["holdout_top1"]
    return sum(map(len, curves.values())), f"trial {last}, hold-out {top1:.1%}"
