"""Retraining of the winners from scratch: Ray Tune over the recipe, with ASHA.

Each trial writes a checkpoint of its own every epoch. A killed run is started afresh as an
experiment whose trials first report what they had recorded, so ASHA sees the same results
in the same order and decides the same; no state of Tune itself has to survive.
"""

import io
import logging
import os
import shutil
import sysconfig
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray import tune
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from nasray import checkpoint
from nasray.cluster.placement import on_gpu, worker_labels
from nasray.cluster.worker import raise_user_error, worker_device
from nasray.config import Job, RetrainConfig, parse_job
from nasray.data.splits import JobImages
from nasray.errors import UserError
from nasray.evaluation.evaluate import top1
from nasray.progress import following
from nasray.spaces import make_space
from nasray.spaces.space import Architecture, Space
from nasray.spaces.supernet import build_subnet
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.training.loop import LossNotFiniteError, Recipe, fit
from nasray.training.workers import check_batches, scaling, use_own_gpu

logger = logging.getLogger(__name__)
TUNED = ("learning_rate", "weight_decay", "label_smoothing")
COMPILE_STEPS = 3000  # training steps from which on compilation pays


def retrain(job: Job, run_dir: str, data_path: str, arch: Architecture, name: str) -> dict:
    """Train `arch` from scratch under each recipe of the job; return the winner's result.

    Writes RUN/retrain/<name>/: model.pt, result.json, curves.json and the trials' state.
    The validation folder is used once, on the best model; recipes compete on the hold-out.
    """
    folder = storage.join(run_dir, layout.retrained(name))
    result_path = storage.join(folder, layout.RESULT)
    _check_same_arch(folder, arch)
    if storage.exists(result_path):
        return storage.read_json(result_path)
    check_batches(job, data_path, job.retrain.batch_size, job.compute.workers_per_trial)
    recipes = draw_recipes(job.retrain, job.seed)
    trials = [
        {
            "job": job.model_dump(),
            "data_path": data_path,
            "arch": list(arch),
            "folder": storage.join(folder, f"{layout.TRIAL}{index}"),
            "recipe": recipe,
        }
        for index, recipe in enumerate(recipes)
    ]
    total = len(trials) * job.retrain.epochs  # an upper bound: ASHA stops some
    with following(f"retrain {name}", total, lambda: _look(trials)):
        lengths = _run(job, trials)
    curves = [
        _read_trial(trial, length, job.retrain.epochs)
        for trial, length in zip(trials, lengths, strict=True)
    ]
    storage.write_json(storage.join(folder, layout.CURVES), curves)
    whole = [index for index, curve in enumerate(curves) if not curve["stopped"]]
    if not whole:
        reasons = {str(curve.get("failure", "it was stopped")) for curve in curves}
        raise UserError(f"{folder}: no recipe trained to the end: {'; '.join(sorted(reasons))}")
    best = max(whole, key=lambda index: (curves[index]["epochs"][-1]["holdout_top1"], -index))
    compute = job.compute
    gpu = on_gpu(compute, 1)
    test = _test.options(
        num_cpus=compute.cpus_per_trial,
        num_gpus=1 if gpu else 0,
        max_retries=compute.max_failures,
        label_selector=worker_labels(compute, gpu=gpu),
    )
    result = ray.get(test.remote(trials[best], storage.join(folder, layout.MODEL)))
    result |= {"trial": best, "recipe": recipes[best]}
    result["seconds"] = sum(epoch["seconds"] for curve in curves for epoch in curve["epochs"])
    storage.write_json(result_path, result)
    return result


def _check_same_arch(folder: str, arch: Architecture) -> None:
    """Refuse to go on in the folder of another architecture; note this one in a new one."""
    path = storage.join(folder, layout.GENES)
    if not storage.exists(path):
        storage.write_json(path, list(arch))
    elif storage.read_json(path) != list(arch):
        raise UserError(f"{folder} holds another architecture's training; remove it")


def draw_recipes(config: RetrainConfig, seed: int) -> list[dict[str, float]]:
    """The recipes that compete: pairs [low, high] drawn log-uniformly, or evenly from 0."""
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
    """Run Tune here, or, for data-parallel trials, where it hands on the cluster's address.

    Returns how many epochs of each trial ASHA has seen: workers that train data-parallel may
    have done some more before they heard that their trial was stopped, and those count for
    nothing, since how many there are is a matter of timing.

    Ray Train frees the workers of a stopped trial by asking the cluster's dashboard. Without
    RAY_ADDRESS it finds none on a machine with two clusters, and retraining waits for ever.
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
    try:
        return ray.get(task.remote(job, trials))
    except RayTaskError as error:
        raise_user_error(error)
        raise


def _tune(job: Job, trials: list[dict[str, Any]]) -> list[int]:
    """Run the trials under ASHA, each as a plain function or as a data-parallel training.

    Returns the epochs that each trial had reported when it ended or was stopped.
    """
    config, compute = job.retrain, job.compute
    if compute.workers_per_trial == 1:
        gpu = on_gpu(compute, compute.concurrent_trials)
        needs = {"CPU": compute.cpus_per_trial, **({"GPU": 1} if gpu else {})}
        trial: Any = _trial
    else:
        # It only waits for its workers, but Tune wants it to ask for something.
        gpu, needs, trial = False, {"CPU": 0, "memory": 256 << 20}, _data_parallel_trial
    labels = worker_labels(compute, gpu=gpu)
    trainable = tune.with_resources(
        trial, tune.PlacementGroupFactory([needs], bundle_label_selector=[labels])
    )
    grace = min(config.grace_epochs, config.epochs)
    storage_path = storage.join(trials[0]["folder"].rsplit("/", 1)[0], "tune")
    storage.remove(storage_path)  # of a killed run; the trials keep what matters themselves
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(
            metric="holdout_top1",
            mode="max",
            scheduler=ASHAScheduler(
                time_attr="epoch",
                max_t=config.epochs + 1,  # who comes to the end, ends by himself
                grace_period=grace,
                reduction_factor=config.reduction_factor,
            ),
            max_concurrent_trials=compute.concurrent_trials,
            # By default names are made of all that a trial is given.
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=trials[0]["folder"].rsplit("/", 1)[0],
            failure_config=tune.FailureConfig(max_failures=compute.max_failures),
            verbose=0,
        ),
    )
    results = tuner.fit()
    for error in results.errors:
        raise_user_error(error)
        raise error
    seen = {found.config["trial"]["folder"]: found.metrics["epoch"] for found in results}
    return [seen[trial["folder"]] for trial in trials]


def _trial_name(trial: Any) -> str:
    return trial.config["trial"]["folder"].rsplit("/", 1)[1]


def _trial(config: dict[str, Any]) -> None:
    _train_subnet(config["trial"], rank=0, world_size=1, report=tune.report)


def _data_parallel_trial(config: dict[str, Any]) -> None:
    trial = config["trial"]
    job = parse_job(trial["job"], trial["folder"])
    compute = job.compute
    TorchTrainer(
        _trial_worker,
        train_loop_config=trial,
        scaling_config=scaling(compute, compute.workers_per_trial, compute.cpus_per_trial),
        run_config=RunConfig(
            name=f"workers-{tune.get_context().get_trial_id()}",
            storage_path=storage.join(trial["folder"], layout.TRAIN),
            failure_config=FailureConfig(max_failures=compute.max_failures),
            callbacks=[TuneReportCallback()],
        ),
    ).fit()


def _trial_worker(trial: dict[str, Any]) -> None:
    use_own_gpu()
    context = ray.train.get_context()
    _train_subnet(
        trial,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        report=ray.train.report,
    )


def _train_subnet(trial: dict[str, Any], *, rank: int, world_size: int, report: Any) -> None:
    """Train one subnet by one recipe, or go on with it; report every epoch, old ones too."""
    job = parse_job(trial["job"], trial["folder"])
    config = job.retrain
    device = worker_device(job.compute.cpus_per_trial, deterministic=job.compute.deterministic)
    space, arch, images = _subject(job, trial)
    subnet = build_subnet(space.decode(arch))
    space.initialize(subnet, torch.Generator().manual_seed(job.seed))
    subnet.to(device)

    # Replay: what an earlier run of this trial reported, in the same order.
    state_path = storage.join(trial["folder"], layout.STATE)
    resume = checkpoint.load(state_path, device) if storage.exists(state_path) else None
    for epoch in resume["curves"] if resume else []:
        report(_metrics(epoch))

    def record(curves: list[dict], state: Any) -> None:
        if rank == 0:
            buffer = io.BytesIO()
            torch.save(state(), buffer)
            storage.write(state_path, buffer.getvalue())
            storage.write_json(storage.join(trial["folder"], layout.CURVES), curves)
        report(_metrics(curves[-1]))

    def validate(epoch: int) -> dict[str, float | None]:
        subnet.eval()
        size = job.search.batch_size
        return {"holdout_top1": top1(subnet, *images.holdout, batch_size=size, device=device)}

    steps = len(images.training_batches(config.batch_size, 0, rank=rank, world_size=world_size))
    compiles = device == "cuda" and should_compile(config.compile, steps * config.epochs)
    network = torch.compile(subnet) if compiles else subnet
    try:
        fit(
            subnet,
            lambda batch, epoch, step: network(batch),
            Recipe(
                epochs=config.epochs,
                warmup_epochs=config.warmup_epochs,
                momentum=config.momentum,
                **trial["recipe"],
            ),
            batches=lambda epoch: images.training_batches(
                config.batch_size, epoch, rank=rank, world_size=world_size
            ),
            validate=validate,
            report=record,
            resume=resume,
            device=device,
            seed=job.seed * world_size + rank,
        )
    except LossNotFiniteError as error:  # this recipe fails; the others go on
        if rank == 0:
            storage.write_json(storage.join(trial["folder"], layout.FAILURE), str(error))
        report({"epoch": config.epochs, "holdout_top1": 0.0})


def should_compile(wanted: str, num_steps: int) -> bool:
    """Whether a network is compiled for `num_steps` training steps on this GPU."""
    if wanted == "off":
        return False
    needs = {
        "Triton": find_spec("triton"),
        "a C compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "Python.h": os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")),
    }
    lacks = [name for name, found in needs.items() if not found]
    if lacks and wanted == "on":
        logger.warning('retrain.compile = "on", but %s is missing here: off', " and ".join(lacks))
    return not lacks and (wanted == "on" or num_steps >= COMPILE_STEPS)


@ray.remote
def _test(trial: dict[str, Any], path: str) -> dict[str, Any]:
    """Save the best trial's subnet at `path` and measure it on the validation folder, once."""
    job = parse_job(trial["job"], trial["folder"])
    device = worker_device(job.compute.cpus_per_trial, deterministic=job.compute.deterministic)
    space, arch, images = _subject(job, trial)
    subnet = build_subnet(space.decode(arch))
    state = checkpoint.load(storage.join(trial["folder"], layout.STATE))["state"]
    subnet.load_state_dict(state)
    checkpoint.save_subnet(path, space, arch, subnet, classes=list(images.dataset.classes))
    accuracy = top1(
        subnet.to(device).eval(),
        *images.validation,
        batch_size=job.search.batch_size,
        device=device,
    )
    return {
        "arch": space.to_json(arch),
        "genes": list(arch),
        "val_top1": accuracy,
        "num_val_images": images.dataset.num("val"),
    }


def _subject(job: Job, trial: dict[str, Any]) -> tuple[Space, Architecture, JobImages]:
    """What a trial trains, and the images at the side that it takes."""
    images = JobImages(job, trial["data_path"])
    space, arch = make_space(job.space, len(images.dataset.classes)), tuple(trial["arch"])
    return space, arch, replace(images, other_resolution=space.resolution_of(arch))


def _read_trial(trial: dict[str, Any], length: int, epochs: int) -> dict[str, Any]:
    """A trial's first `length` epochs as RUN/retrain/<name>/curves.json keeps them."""
    path = storage.join(trial["folder"], layout.STATE)
    curves = checkpoint.load(path)["curves"][:length] if storage.exists(path) else []
    index = int(trial["folder"].rsplit("-", 1)[1])
    found = {"trial": index, "recipe": trial["recipe"], "stopped": len(curves) < epochs}
    failure = storage.join(trial["folder"], layout.FAILURE)
    if storage.exists(failure):
        found["failure"] = storage.read_json(failure)
    return found | {"epochs": curves}


def _look(trials: list[dict[str, Any]]) -> tuple[int, str]:
    """How many epochs the trials have done together, and how the last of them fares."""
    paths = [storage.join(trial["folder"], layout.CURVES) for trial in trials]
    curves = {index: storage.read_json(p) for index, p in enumerate(paths) if storage.exists(p)}
    if not curves:
        return 0, ""
    last = max(curves)
    top1 = curves[last][-1]["holdout_top1"]
    return sum(map(len, curves.values())), f"trial {last}, hold-out {top1:.1%}"


def _metrics(epoch: dict[str, Any]) -> dict[str, Any]:
    # "epoch" counts for ASHA: a restarted trial reports its old epochs once more.
    return {
        "epoch": epoch["epoch"] + 1,
        "holdout_top1": epoch["holdout_top1"],
        "loss": epoch["loss"],
    }
