"""Supernet training on a cluster: Ray Train around loop.py.

Every worker draws the same architectures from (seed, epoch, step), sees its own part of each
batch, and averages gradients. Ray Train restarts lost workers from the last checkpoint that was
reported to it, which is one whose upload is complete; training goes on meanwhile. Ray polls for
reports, so where epochs take less than an upload or than the time between two polls, that
checkpoint may be some epochs old. The same run directory continues the same run.
"""

import dataclasses
import hashlib
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import chain
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    CheckpointUploadMode,
    FailureConfig,
    RunConfig,
)
from ray.train.torch import TorchTrainer
from torch import Tensor

from nasray import checkpoint
from nasray.cluster import metrics as ray_metrics
from nasray.cluster.worker import worker_device
from nasray.config import Job, SpaceConfig, SupernetConfig, parse_job
from nasray.data.loader import TrainBatches
from nasray.data.shards import read_info
from nasray.data.splits import JobImages
from nasray.data.transforms import resized
from nasray.devices import choose_kernels
from nasray.errors import UserError
from nasray.evaluation.evaluate import evaluate
from nasray.progress import following
from nasray.search.limits import Limits
from nasray.spaces import make_space, space_class
from nasray.spaces.space import Architecture
from nasray.spaces.supernet import Supernet
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.training.channels import sorting
from nasray.training.gradients import Slices, union
from nasray.training.loop import Forward, LossNotFiniteError, Recipe, Reorder, Size, fit
from nasray.training.sampler import fixed_architectures, lowest_scale, sample, sizes_of
from nasray.training.teacher import load_teacher
from nasray.training.workers import resumed, scaling, use_own_gpu


def train_supernet(job: Job, run_dir: str, data_path: str, bands: Sequence[Limits] = ()) -> str:
    """Train the supernet of `job` into RUN/supernet.pt, or resume that; return the path.

    `bands` is what the job draws within, if it does, by sampler.bands_of().

    Raises:
        UserError: the loss is not finite, or the job's batches do not fit its images or workers.
    """
    path = storage.join(run_dir, layout.SUPERNET)
    if storage.exists(path):
        return path
    JobImages(job, data_path).check_batches()
    teacher = storage.join(run_dir, layout.TEACHER)
    if job.supernet.teacher_epochs and not storage.exists(teacher):
        trained = storage.join(run_dir, layout.TEACHER_RUN, layout.SUPERNET)
        if not storage.exists(trained):
            _train(teacher_job(job), run_dir, data_path, teacher=True)
        storage.write(teacher, storage.read(trained))
    _train(job, run_dir, data_path, bands)
    return path


def teacher_job(job: Job) -> Job:
    """The training of the largest subnet of `job`, at the resolution of the images it loads."""
    config, space = job.supernet, job.space
    if "resolutions" in {field.name for field in dataclasses.fields(space_class(space.name))}:
        values = space.model_dump() | {"resolutions": [space.resolution]}
        space = SpaceConfig.model_validate(values)
    update = {
        "epochs": config.teacher_epochs,
        "learning_rate": config.teacher_learning_rate,
        "sampling": "largest",  # of which there is no warm-up
        "sandwich_within_limits": False,
        "channel_warmup_start": 0,
        "shared_start_epochs": 0,
        "distillation": 0.0,
        "distillation_loss": "kl",
        "schedule": "cosine",
        "rank_loss": 0.0,
        "teacher_epochs": 0,
    }
    return job.model_copy(update={"space": space, "supernet": config.model_copy(update=update)})


def _train(
    job: Job,
    run_dir: str,
    data_path: str,
    bands: Sequence[Limits] = (),
    *,
    teacher: bool = False,
) -> None:
    """Train the supernet, or its `teacher` in a folder of its own, with what RUN/init/ holds."""
    folder = storage.join(run_dir, layout.TEACHER_RUN) if teacher else run_dir
    curves = storage.join(folder, layout.SUPERNET_CURVES)

    def progress() -> tuple[int, str]:
        epochs = storage.read_rows(curves) if storage.exists(curves) else []
        return len(epochs), _summary(epochs[-1]) if epochs else ""

    task = {"job": job.model_dump(), "folder": folder, "run_dir": run_dir, "data_path": data_path}
    task["fingerprint"] = read_info(data_path).fingerprint
    task["bands"] = list(bands)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config=task,
        scaling_config=scaling(job.compute, job.compute.num_workers, job.compute.cpus_per_worker),
        run_config=RunConfig(
            name="supernet",
            storage_path=storage.join(folder, layout.TRAIN),
            failure_config=FailureConfig(max_failures=job.compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    name = "teacher" if teacher else "supernet"
    with following(name, job.supernet.epochs, progress), _keyboard_interrupts():
        result = resumed(trainer.fit, lambda: progress()[0])
    if (reason := result.return_value) is not None:
        if teacher:
            reason = reason.replace("learning_rate", "supernet.teacher_learning_rate")
        raise UserError(f"{run_dir}: {name} training: {reason}")


@contextmanager
def _keyboard_interrupts() -> Iterator[None]:
    """Make Ctrl-C raise KeyboardInterrupt, and restore the handler of SIGINT afterwards.

    Ray Train installs a handler that exits instead, and leaves it installed.
    """
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)


def recipe_of(config: SupernetConfig) -> Recipe:
    """The part of [supernet] that says how to optimise."""
    keys = Recipe.__dataclass_fields__
    return Recipe(**{key: getattr(config, key) for key in keys})


def _train_worker(task: dict[str, Any]) -> str | None:
    """Train as one data-parallel worker, from the start or the last checkpoint.

    Returns None, or why training ended early where a restart would only end the same.
    """
    job = parse_job(task["job"], task["run_dir"])
    use_own_gpu()
    choose_kernels(deterministic=job.compute.deterministic)
    device = worker_device(job.compute.cpus_per_worker)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()

    images = JobImages(job, task["data_path"], fingerprint=task.get("fingerprint", ""))

    # The same supernet on all workers.
    space = make_space(job.space, len(images.dataset.classes))
    supernet = space.supernet()
    if job.supernet.init:
        # Of the same weights, if not of the same resolutions.
        start = checkpoint.load_supernet(storage.join(task["run_dir"], layout.INIT))
        supernet.load_state_dict(start.state_dict())
    else:
        space.initialize(supernet, torch.Generator().manual_seed(job.seed))
    supernet.to(device)
    teacher = None
    if job.supernet.has_teacher:
        path = storage.join(task["run_dir"], layout.TEACHER)
        teacher = load_teacher(path, images, device)

    # The last checkpoint, if it has run before.
    resume = None
    if (found := ray.train.get_checkpoint()) is not None:
        with found.as_directory() as folder:
            resume = torch.load(
                os.path.join(folder, layout.STATE), map_location=device, weights_only=True
            )

    def begin_epoch(epoch: int) -> Reorder | None:
        if epoch == job.supernet.shared_start_epochs > 0:
            space.copy_to_siblings(supernet)
        return sorting(supernet, job.supernet, epoch)

    drawn = hashlib.blake2b(digest_size=7)  # of the architectures of all steps so far
    metrics_of = _validator(job, supernet, images, device=device)

    def validate(epoch: int) -> dict[str, float | None]:
        check_same_on_all_workers(drawn.digest(), device)
        return metrics_of(epoch)

    batch_size, num_steps = job.supernet.batch_size, 0

    def epoch_batches(epoch: int) -> TrainBatches:
        nonlocal num_steps
        found = images.training_batches(batch_size, epoch, rank=rank, world_size=world_size)
        num_steps = len(found)
        return found

    sent = ""  # the folder of the latest checkpoint, which Ray removes once it is uploaded

    def report(curves: list[dict], state: Any) -> None:
        nonlocal sent
        kept = None
        if rank == 0:
            # Training goes on during an upload, but waits for it before the next one.
            while os.path.exists(sent):
                time.sleep(0.05)
            storage.write_json(storage.join(task["folder"], layout.SUPERNET_CURVES), curves)
            sent = tempfile.mkdtemp(dir=os.getcwd())  # removed with Ray's session, if not before
            torch.save(state(), os.path.join(sent, layout.STATE))
            kept = Checkpoint.from_directory(sent)
            network = "supernet" if task["folder"] == task["run_dir"] else layout.TEACHER_RUN
            rate = num_steps * batch_size / curves[-1]["seconds"]
            ray_metrics.training(task["run_dir"].rsplit("/", 1)[-1], network, rate)
        ray.train.report(
            curves[-1], checkpoint=kept, checkpoint_upload_mode=CheckpointUploadMode.ASYNC
        )

    bands = task.get("bands", ())

    @lru_cache(maxsize=1)  # a step asks for its architectures up to three times
    def archs_of(epoch: int, step: int) -> list[Architecture]:
        return sample(space, job.supernet, seed=job.seed, epoch=epoch, step=step, bands=bands)

    def forward(arch: Architecture, batch: Tensor) -> Tensor:
        return supernet(resized(batch, space.resolution_of(arch)), arch)

    def passes(epoch: int, step: int) -> list[Forward]:
        archs = archs_of(epoch, step)
        drawn.update(bytes(chain.from_iterable(archs)))
        return [partial(forward, arch) for arch in archs]

    def slices(epoch: int, step: int) -> Slices:
        return union(supernet.slices_of(arch) for arch in archs_of(epoch, step))

    def sizes(epoch: int, step: int) -> Sequence[Size]:
        return sizes_of(space, archs_of(epoch, step))

    try:
        fit(
            supernet,
            passes,
            recipe_of(job.supernet),
            begin_epoch=begin_epoch,
            batches=epoch_batches,
            slices=slices,
            sizes=sizes if job.supernet.needs_sizes else None,
            teacher=teacher,
            class_weights=images.class_weights,
            validate=validate,
            report=report,
            resume=resume,
            device=device,
            seed=job.seed * world_size + rank,
        )
    except LossNotFiniteError as error:  # a restart would only repeat it, as after the next one
        return f"{error}, and use a new run directory"
    except WorkersDifferError as error:
        return str(error)
    if rank == 0:
        path = storage.join(task["folder"], layout.SUPERNET)
        # Not by a worker that was given up for lost, after its successor's, which may be in use.
        if not storage.exists(path):
            checkpoint.save_supernet(path, supernet, classes=list(images.dataset.classes))
    return None


class WorkersDifferError(RuntimeError):
    """Data-parallel workers trained different architectures."""


def check_same_on_all_workers(digest: bytes, device: str) -> None:
    """Compare what the workers trained so far: `digest`, at most 7 bytes, of its architectures.

    Raises:
        WorkersDifferError: on every worker, if one of them has another digest.
    """
    if not dist.is_initialized():
        return
    number = int.from_bytes(digest)
    bounds = torch.tensor([number, -number], device=device)  # int64
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if bounds.tolist() != [number, -number]:
        raise WorkersDifferError(
            "training workers drew different architectures, so their gradients do not belong "
            "together: install the same versions of nasray and numpy on all nodes"
        )


def _validator(
    job: Job, supernet: Supernet, images: JobImages, *, device: str
) -> Callable[[int], dict[str, float | None]]:
    """Make a function of the epoch: mean top-1 of fixed architectures on the hold-out images.

    Each worker evaluates a part of the architectures. None in epochs without validation.
    """
    config, space = job.supernet, supernet.space
    archs = fixed_architectures(space, config, job.seed)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def validate(epoch: int) -> dict[str, float | None]:
        metrics: dict[str, float | None] = {"lowest_scale": lowest_scale(space, config, epoch)}
        if (epoch + 1) % config.val_every and epoch + 1 < config.epochs:
            return metrics | {"val_top1": None}
        calibration = images.calibration(config.val_calibration_images)
        total = torch.zeros(1, dtype=torch.float64, device=device)
        for arch in archs[rank::world_size]:
            total += evaluate(
                supernet.extract(arch),
                calibration,
                *images.holdout,
                batch_size=job.search.batch_size,
                device=device,
                resolution=space.resolution_of(arch),
            ).mean()
        if dist.is_initialized():
            dist.all_reduce(total)
        return metrics | {"val_top1": total.item() / len(archs)}

    return validate


def _summary(epoch: dict) -> str:
    val = epoch["val_top1"]
    shown = "" if val is None else f", hold-out {val:.1%}"
    return f"loss {epoch['loss']:.3f}, training {epoch['train_top1']:.1%}{shown}"
