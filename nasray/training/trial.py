"""What one trial of retraining does: it trains a subnet by one recipe, on one worker or several.

It begins with random weights, or with the supernet's.

Ray calls these functions where it has placed the trial. A trial writes a checkpoint of its own
after every epoch and goes on from it when it is started again.
"""

import io
import time
from dataclasses import replace
from typing import Any

import ray
import ray.train
import torch
from ray import tune
from torch import Tensor, nn

from nasray import checkpoint
from nasray.cluster import metrics as ray_metrics
from nasray.cluster.worker import worker_device
from nasray.config import Job, parse_job
from nasray.data.loader import TrainBatches
from nasray.data.splits import JobImages
from nasray.data.transforms import resized
from nasray.devices import Compiled, can_compile, choose_kernels
from nasray.evaluation.evaluate import recalibrate_bn
from nasray.evaluation.validation import on_holdout, on_validation
from nasray.spaces import make_space
from nasray.spaces.space import Architecture, Space
from nasray.spaces.supernet import build_subnet
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.training.loop import LossNotFiniteError, Recipe, fit
from nasray.training.teacher import load_teacher
from nasray.training.workers import use_own_gpu


def run_trial(config: dict[str, Any]) -> None:
    """Train as a trial of Tune with one worker, this process."""
    _train_subnet(config["trial"], rank=0, world_size=1, report=tune.report)


def run_trial_worker(trial: dict[str, Any]) -> None:
    """Train as one of the data-parallel workers of a trial."""
    use_own_gpu()
    context = ray.train.get_context()
    _train_subnet(
        trial,
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        report=ray.train.report,
    )


def _train_subnet(trial: dict[str, Any], *, rank: int, world_size: int, report: Any) -> None:
    """Train one subnet by one recipe, or resume that; report every epoch, recorded ones too."""
    job = parse_job(trial["job"], trial["folder"])
    config = job.retrain
    choose_kernels(deterministic=job.compute.deterministic)
    device = worker_device(job.compute.cpus_per_trial)
    space, arch, images = _arch_and_images(job, trial)
    latest = latest_state(trial["folder"])
    resume = checkpoint.load(latest, device) if latest else None
    if config.init == "supernet" and resume is None:
        subnet = _with_supernet_weights(trial["supernet"], space, arch, images, device)
    else:
        subnet = build_subnet(space.decode(arch))
        space.initialize(subnet, torch.Generator().manual_seed(job.seed))
    subnet.to(device)
    teacher = load_teacher(trial["teacher"], images, device) if config.distillation else None
    # A teacher sees what the subnet sees, at a resolution of its own.
    shown = max(images.resolution, teacher.resolution if teacher else 0)

    # Replay what an earlier run of this trial reported, in the same order.
    for epoch in resume["curves"] if resume else []:
        report(_metrics(epoch))

    num_steps = 0

    def epoch_batches(epoch: int) -> TrainBatches:
        nonlocal num_steps
        found = replace(images, other_resolution=shown).training_batches(
            config.batch_size, epoch, rank=rank, world_size=world_size
        )
        num_steps = len(found)
        return found

    def record(curves: list[dict], state: Any) -> None:
        if rank == 0:
            keep_state(trial["folder"], curves, state)
            run, *network = trial["folder"].rsplit("/", 4)[1:]  # RUN/retrain/<k>/trial-<n>
            rate = num_steps * config.batch_size / curves[-1]["seconds"]
            ray_metrics.training(run, "/".join(network), rate)
        report(_metrics(curves[-1]))

    def validate(epoch: int) -> dict[str, float | None]:
        return on_holdout(subnet, images, device)

    compiles = config.compile and device == "cuda" and can_compile()
    network = Compiled(subnet) if compiles else subnet

    def forward(batch: Tensor) -> Tensor:
        return network(resized(batch, images.resolution))

    try:
        fit(
            subnet,
            lambda epoch, step: [forward],
            Recipe(
                epochs=config.epochs,
                warmup_epochs=config.warmup_epochs,
                momentum=config.momentum,
                distillation=config.distillation,
                **trial["recipe"],
            ),
            batches=epoch_batches,
            validate=validate,
            report=record,
            resume=resume,
            device=device,
            seed=job.seed * world_size + rank,
            teacher=teacher,
            class_weights=images.class_weights,
        )
    except LossNotFiniteError as error:  # only this recipe has failed
        if rank == 0:
            storage.write_json(storage.join(trial["folder"], layout.FAILURE), str(error))
        report({"epoch": config.epochs, f"holdout_{job.search.accuracy}": 0.0})


def keep_state(folder: str, curves: list[dict], state: Any) -> None:
    """Write state() and the curves of a trial's epochs, unless the trial is further already.

    That is so if its node was cut off and given up, and another one goes on.
    """
    name = layout.trial_state(len(curves))
    if any(other > name for other in _states(folder) if other != layout.STATE):
        return
    buffer = io.BytesIO()
    torch.save(state(), buffer)
    storage.write(storage.join(folder, name), buffer.getvalue())
    storage.write_json(storage.join(folder, layout.CURVES), curves)
    for other in _states(folder):
        if other < name or other == layout.STATE:
            storage.remove(storage.join(folder, other))


def latest_state(folder: str) -> str:
    """The path of what a trial goes on from; empty if it has not completed an epoch."""
    names = _states(folder)
    return storage.join(folder, names[-1]) if names else ""


def _states(folder: str) -> list[str]:
    """The names of a trial's states, the latest last; before all, that of older versions."""
    names = storage.list_names(folder)
    numbered = [name for name in names if name.startswith("state-") and name.endswith(".pt")]
    return [name for name in names if name == layout.STATE] + numbered


@ray.remote
def measure_on_validation(trial: dict[str, Any], path: str) -> dict[str, Any]:
    """Save at `path` the subnet of the best trial, or without epochs the supernet's subnet.

    Beside it, what it says of each validation image. Returns its top-1 on all of them, that of
    the supernet's, if there is one, and the seconds that this took.
    """
    started = time.monotonic()
    job = parse_job(trial["job"], trial["folder"])
    storage.write_json(storage.join(path.rpartition("/")[0], layout.GENES), trial["arch"])
    choose_kernels(deterministic=job.compute.deterministic)
    device = worker_device(job.compute.cpus_per_trial)
    space, arch, images = _arch_and_images(job, trial)
    found = {"arch": space.to_json(arch), "genes": list(arch), "shipped": job.retrain.way}
    if job.retrain.init == "supernet" or storage.exists(trial["supernet"]):
        subnet = _with_supernet_weights(trial["supernet"], space, arch, images, device)
        said = on_validation(subnet, images, device)
        found["supernet_top1"] = said.top1
    if job.retrain.epochs:
        subnet = build_subnet(space.decode(arch))
        state = checkpoint.load(latest_state(trial["folder"]))["state"]
        subnet.load_state_dict(state)
        said = on_validation(subnet.to(device), images, device)
    said.write(storage.join(path.rpartition("/")[0], layout.PREDICTIONS))
    extra = {"classes": list(said.classes), "background": job.data.background}
    checkpoint.save_subnet(path, space, arch, subnet.cpu(), **extra)
    return found | {
        "val_top1": said.top1,
        "val_balanced_top1": said.balanced_top1,
        "num_val_images": len(said.labels),
        "seconds": time.monotonic() - started,
    }


def _with_supernet_weights(
    path: str, space: Space, arch: Architecture, images: JobImages, device: str
) -> nn.Sequential:
    """The subnet of the supernet at `path`, its BN recalibrated as for the search."""
    job = images.job
    subnet = checkpoint.load_supernet(path, space, device).extract(arch)
    calibration = images.calibration(job.search.calibration_images)
    recalibrate_bn(subnet, calibration, batch_size=job.search.batch_size, device=device)
    return subnet


def _arch_and_images(job: Job, trial: dict[str, Any]) -> tuple[Space, Architecture, JobImages]:
    """The space, the architecture, and the images at the resolution that it takes."""
    images = JobImages(job, trial["data_path"], fingerprint=trial.get("fingerprint", ""))
    space, arch = make_space(job.space, len(images.dataset.classes)), tuple(trial["arch"])
    return space, arch, replace(images, other_resolution=space.resolution_of(arch))


def _metrics(epoch: dict[str, Any]) -> dict[str, Any]:
    # ASHA goes by "epoch", not by the number of reports: a resumed trial repeats old ones.
    found = {key: value for key, value in epoch.items() if key.startswith("holdout_")}
    return {"epoch": epoch["epoch"] + 1, "loss": epoch["loss"], **found}
