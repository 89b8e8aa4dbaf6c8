"""Weights for the answers of a search: Ray Tune over the recipe, with ASHA; or the supernet's.

Each trial (trial.py) writes a checkpoint of its own every epoch. A run that was killed starts a
new experiment whose trials first report what they had recorded. So ASHA sees the same results in
the same order and makes the same decisions, and no state of Tune itself has to survive.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import ray
from ray import tune
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from nasray import checkpoint
from nasray.cluster.placement import num_places, on_gpu, worker_labels
from nasray.cluster.worker import user_mistake
from nasray.config import ComputeConfig, Job, RetrainConfig, parse_job
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

logger = logging.getLogger(__name__)

CANCEL_S = 10.0  # that tasks are given to end
TUNED = ("learning_rate", "weight_decay", "label_smoothing")
WAY_OUT = (
    "change [retrain] in the job and run the same command again, or, once another network is "
    "done, `nasray retrain JOB RUN_DIR --again`"
)


def retrain(
    job: Job,
    run_dir: str,
    data_path: str,
    archs: Mapping[str, Architecture],
    *,
    into: str = layout.RETRAIN,
    way_out: str = WAY_OUT,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give architectures weights in the way of job.retrain; yield names and results as they come.

    Trains each under the recipes of the job, from scratch or from the supernet's weights on, or
    takes these. Writes RUN/<into>/<name>/ of each: model.pt, result.json, curves.json and the
    trials' state. The validation images are used once, on the best model; recipes compete on the
    hold-out. `way_out` tells the user what to do if none of them trains to the end.

    Raises:
        UserError: a folder is of another architecture, before anything is trained; or, after all
            the others have ended, no recipe trained an architecture to the end.
        ray.exceptions.RayError: likewise, another error ended the training of an architecture.
    """
    supernet = storage.join(run_dir, layout.SUPERNET)
    teacher = storage.join(run_dir, layout.TEACHER) if job.supernet.has_teacher else supernet
    shared = {"job": job.model_dump(), "data_path": data_path, "way_out": way_out}
    shared |= {"supernet": supernet, "teacher": teacher}
    shared["fingerprint"] = read_info(data_path).fingerprint
    tasks = {
        name: shared | {"arch": list(arch), "folder": storage.join(run_dir, into, name)}
        for name, arch in archs.items()
    }
    for task in tasks.values():
        _check_same_arch(task)
    for name, task in list(tasks.items()):
        path = storage.join(task["folder"], layout.RESULT)
        if storage.exists(path):
            del tasks[name]
            yield name, storage.read_object(path, "genes", "val_top1", "num_val_images")
    if tasks and job.retrain.epochs:
        num_workers = job.compute.workers_per_trial
        check_batches(job, data_path, job.retrain.batch_size, num_workers)
        yield from _train_all(job, tasks)
    elif tasks:
        yield from _ship_all(job, tasks)


def _ship_all(job: Job, tasks: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Take the supernet's weights, of as many at the same time as Ray finds room for."""
    starting = ((_measure(job, task, task["folder"]), name) for name, task in tasks.items())
    with progress(_label("ship", tasks), len(tasks)) as show:
        completed = _as_completed(starting, len(tasks))
        for number, (name, result) in enumerate(completed, 1):
            storage.write_json(storage.join(tasks[name]["folder"], layout.RESULT), result)
            show(number, f"{name}: validation {result['val_top1']:.1%}")
            yield name, result


def _train_all(job: Job, tasks: dict[str, dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train each by Tune in a Ray task of its own, on this node.

    Tune is made for one experiment in a process. Ray keeps trainables by the job and the
    function's name, which is the same for all, so everything that differs goes through `config`.
    """
    context = ray.get_runtime_context()
    train = ray.remote(
        num_cpus=0,
        scheduling_strategy=NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False),
        # Ray frees what the trials of a lost task hold when this process ends, not before, so that
        # another attempt would wait for it; the same command run again goes on.
        max_retries=0,
        runtime_env={
            "env_vars": {
                # Ray Train frees the workers of a stopped trial by asking the cluster's dashboard.
                # Without an address it finds none on a machine with two clusters, and waits.
                "RAY_ADDRESS": context.gcs_address,
                "TUNE_DISABLE_SIGINT_HANDLER": "1",  # as in cluster.connect
            }
        },
    )(_train)
    trials = {name: _trials(job, task) for name, task in tasks.items()}
    total = sum(map(len, trials.values())) * job.retrain.epochs  # at most: ASHA stops some
    starting = ((train.remote(job, task, trials[name]), name) for name, task in tasks.items())
    at_once = _num_at_once(job.compute, len(trials[next(iter(trials))]))
    with following(_label("retrain", tasks), total, _looking_at(trials)):
        yield from _as_completed(starting, at_once)


def _label(verb: str, tasks: Collection[str]) -> str:
    return f"{verb} {next(iter(tasks))}" if len(tasks) == 1 else verb


def _num_at_once(compute: ComputeConfig, num_trials: int) -> int:
    """How many architectures are trained at the same time: what the job says, or what the nodes
    for training have room for now.
    """
    gpu = on_gpu(compute, compute.workers_per_trial)
    places = num_places(worker_labels(compute, gpu=gpu), compute.cpus_per_trial, int(gpu))
    if places < compute.workers_per_trial:
        what = f"{compute.cpus_per_trial} CPUs{' and a GPU' if gpu else ''}"
        logger.warning(
            "retraining needs %d workers with %s each, off spot nodes unless [compute] says "
            "otherwise; the cluster has room for %d now: waiting for more nodes",
            compute.workers_per_trial,
            what,
            places,
        )
    needed = compute.workers_per_trial * min(compute.concurrent_trials, num_trials)
    return compute.concurrent_winners or max(1, places // needed)


def _as_completed(
    starting: Iterable[tuple[ray.ObjectRef, str]], at_once: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Results of Ray tasks, with their names, as they come.

    Args:
        starting: starts a task whenever the next one is asked of it.
        at_once: how many run at the same time.

    Raises:
        UserError: a user's or a storage's mistake ended a task; the others have ended.
        ray.exceptions.RayError: likewise, another error.
    """
    starting, running, errors = iter(starting), {}, []
    try:
        while True:
            running |= dict(islice(starting, at_once - len(running)))
            if not running:
                break
            [task], _ = ray.wait(list(running))
            name = running.pop(task)
            try:
                result = ray.get(task)
            except RayError as error:
                errors.append(user_mistake(error) or error)
                reason = str(errors[-1]).strip().rsplit("\n", 1)[-1]
                logger.warning("%s could not be given weights: %s", name, reason)
            else:
                yield name, result
    finally:  # a process that outlives this must not leave them running
        for task in running:
            ray.cancel(task)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=CANCEL_S)
    if errors:
        raise errors[0]


def _trials(job: Job, task: dict[str, Any]) -> list[dict[str, Any]]:
    """The task of each recipe that competes for one architecture."""
    return [
        task | {"folder": storage.join(task["folder"], f"{layout.TRIAL}{index}"), "recipe": recipe}
        for index, recipe in enumerate(draw_recipes(job.retrain, job.seed))
    ]


def _train(job: Job, task: dict[str, Any], trials: list[dict[str, Any]]) -> dict[str, Any]:
    """Train one architecture by each of its recipes; write and return the result of the best."""
    folder, epochs = task["folder"], job.retrain.epochs
    storage.write_json(storage.join(folder, layout.GENES), task["arch"])
    lengths = resumed(lambda: _tune(job, trials), lambda: _progress(trials)[0])
    curves = [
        _read_trial(trial, length, epochs) for trial, length in zip(trials, lengths, strict=True)
    ]
    storage.write_json(storage.join(folder, layout.CURVES), curves)
    finished = [index for index, curve in enumerate(curves) if not curve["stopped"]]
    if not finished:
        reasons = {str(curve.get("failure", "it was stopped")) for curve in curves}
        raise UserError(
            f"{folder}: no recipe trained to the end: {'; '.join(sorted(reasons))}; "
            f"{task['way_out']}"
        )
    key = f"holdout_{job.search.accuracy}"
    best = max(finished, key=lambda index: (curves[index]["epochs"][-1][key], -index))
    result = ray.get(_measure(job, trials[best], folder))
    result |= {"trial": best, "recipe": trials[best]["recipe"]}
    result["seconds"] = sum(epoch["seconds"] for curve in curves for epoch in curve["epochs"])
    storage.write_json(storage.join(folder, layout.RESULT), result)
    return result


def _measure(job: Job, task: dict[str, Any], folder: str) -> ray.ObjectRef:
    """Have model.pt written into `folder`, and its top-1 measured, on a node for training."""
    compute = job.compute
    gpu = on_gpu(compute, 1)
    measure = measure_on_validation.options(
        num_cpus=compute.cpus_per_trial,
        num_gpus=1 if gpu else 0,
        max_retries=compute.max_failures,
        label_selector=worker_labels(compute, gpu=gpu),
    )
    return measure.remote(task, storage.join(folder, layout.MODEL))


def _check_same_arch(task: dict[str, Any]) -> None:
    """Refuse the folder of another architecture."""
    path = storage.join(task["folder"], layout.GENES)
    if storage.exists(path) and storage.read_json(path) != task["arch"]:
        raise UserError(f"{task['folder']} holds another architecture's training; remove it")


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


def _tune(job: Job, trials: list[dict[str, Any]]) -> list[int]:
    """Run the trials under ASHA, each as a plain function or as a data-parallel training.

    Returns how many epochs of each trial ASHA has seen. Data-parallel workers may have trained
    some more before they heard that their trial was stopped; how many is a matter of timing, so
    these are left out of the results.
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
    folder = trials[0]["folder"].rsplit("/", 1)[0]
    # Ray keeps files of all experiments of one name that begin in one second in one folder.
    name = f"{layout.TUNE}-{folder.rsplit('/', 1)[1]}"
    storage.remove(storage.join(folder, name))  # of a run that was killed; trials keep their state
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(trials)},
        tune_config=tune.TuneConfig(
            metric=f"holdout_{job.search.accuracy}",
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
            name=name,
            storage_path=folder,
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


def _looking_at(trials: dict[str, list[dict[str, Any]]]) -> Callable[[], tuple[int, str]]:
    """Make a function that says how many epochs all networks have trained, and how far they are.

    Of a network that is done, nothing is read again.
    """
    done: dict[str, int] = {}  # epochs, by name

    def look() -> tuple[int, str]:
        for name, of_one in trials.items():
            result = storage.join(of_one[0]["folder"].rsplit("/", 1)[0], layout.RESULT)
            if name not in done and storage.exists(result):
                done[name] = _progress(of_one)[0]
        number, text = _progress([t for n, each in trials.items() if n not in done for t in each])
        number += sum(done.values())
        if len(trials) == 1:
            return number, text
        return number, f"{len(done)} of {len(trials)} done{', ' if text else ''}{text}"

    return look


def _progress(trials: list[dict[str, Any]]) -> tuple[int, str]:
    """How many epochs trials have trained, and the hold-out top-1 of the last that has begun."""
    paths = {trial["folder"]: storage.join(trial["folder"], layout.CURVES) for trial in trials}
    curves = {folder: storage.read_rows(p) for folder, p in paths.items() if storage.exists(p)}
    begun = [folder for folder, epochs in curves.items() if epochs]
    if not begun:
        return 0, ""
    where = "/".join(begun[-1].rsplit("/", 2)[1:])
    top1 = curves[begun[-1]][-1]["holdout_top1"]
    return sum(map(len, curves.values())), f"{where}, hold-out {top1:.1%}"
