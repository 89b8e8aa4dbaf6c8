"""A supernet's training ends in the same weights, whatever happens to it on the way."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray import cloudpickle
from ray.train import RunConfig
from ray.train.torch import TorchTrainer
from ray.util.state import list_actors

from nasray.cluster.worker import raise_user_error
from nasray.config import Job, Limit
from nasray.data.splits import JobImages
from nasray.errors import UserError
from nasray.search.limits import Limits
from nasray.spaces import space_by_name
from nasray.storage import files as storage
from nasray.training import supernet as trainer
from nasray.training import workers
from tests.conftest import (
    FinishedRun,
    MakeJob,
    assert_same_weights,
    ray_processes,
    seeded_chance,
    wait_for,
)

pytestmark = pytest.mark.ray


def train(job: Job, run_dir: Path) -> str:
    return trainer.train_supernet(job, str(run_dir), job.data.path)


def curves(run_dir: str | Path) -> list[dict[str, Any]]:
    path = f"{run_dir}/curves/supernet.json"
    return storage.read_json(path) if storage.exists(path) else []


def without_clock(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: epoch[key] for key in epoch if key != "seconds"} for epoch in epochs]


def num_workers_started() -> int:
    address = ray.get_runtime_context().gcs_address  # there may be other clusters
    filters = [("class_name", "=", "RayTrainWorker")]
    return len(list_actors(address=address, filters=filters, limit=1000))


def test_killed_workers_change_no_weight(
    finished_run: FinishedRun, make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    """More of them than are made good, since epochs completed before: nodes may be taken away."""
    job, chance, seen = make_job(compute={"max_failures": 1}), seeded_chance(), []

    def kill() -> None:
        wait_for(lambda: len(curves(tmp_path)) >= 5, "five of eight epochs are recorded")
        time.sleep(chance.uniform(0, 0.5))  # any moment of about two epochs
        seen.extend(curves(tmp_path))
        first = ray_processes("RayTrainWorker")
        os.kill(chance.choice(first), signal.SIGKILL)
        wait_for(lambda: set(ray_processes("RayTrainWorker")) - set(first), "others begin")
        before = curves(tmp_path)
        wait_for(lambda: curves(tmp_path) != before, "they train")  # to be killed before is no loss
        os.kill(chance.choice(ray_processes("RayTrainWorker")), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    path = train(job, tmp_path)
    killer.join()
    found = curves(tmp_path)
    assert len(seen) < len(found) == job.supernet.epochs
    # With their seconds: not trained again. Ray Train takes up to three epochs to hear of one:
    # its report waits for the one before, which waits to be polled on every worker.
    assert found[:2] == seen[:2]
    assert without_clock(found) == without_clock(curves(finished_run.folder))
    assert_same_weights(path, f"{finished_run.folder}/supernet.pt")


TINY, MACRO = {"name": "tiny"}, {"name": "nasbench_macro"}
WAYS = {
    "uniform": (TINY, {"clip_gradient_norm": 0.5, "ema": 0.9}),
    "sandwich": (TINY, {"distillation": 0.5, "distillation_loss": "alpha"}),
    "progressive": (TINY, {"channel_warmup_start": 1, "channel_warmup_epochs": 4}),
    "fair": (MACRO, {"rank_loss": 2.0, "schedule": "complexity", "channel_warmup_start": 0}),
    "banded": (TINY, {"channel_warmup_start": 0}),
}
BAND = (Limit(cost="macs", min=3e5, max=6e5),)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", WAYS)
def test_a_worker_killed_at_any_step_changes_no_weight_in_any_way_of_training(
    sampling: str, make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    space, changes = WAYS[sampling]
    job = make_job(space=space, supernet={"sampling": sampling, "epochs": 6, **changes})
    bands = []
    if sampling == "banded":
        bands = [Limits(space_by_name(num_classes=4, **job.space.model_dump()), BAND)]
    folders, chance = [tmp_path / name for name in ("undisturbed", "disturbed")], seeded_chance()

    def kill() -> None:
        wait_for(lambda: len(curves(folders[1])) >= 2, "two of six epochs are recorded")
        time.sleep(chance.uniform(0, 0.5))
        os.kill(chance.choice(ray_processes("RayTrainWorker")), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    paths = []
    for folder in folders:
        if folder is folders[1]:
            killer.start()
        paths.append(trainer.train_supernet(job, str(folder), job.data.path, bands))
    killer.join()
    assert without_clock(curves(folders[1])) == without_clock(curves(folders[0]))
    assert_same_weights(paths[1], paths[0])


def test_a_teacher_is_trained_first_and_once(make_job: MakeJob, ray_cluster: None, tmp_path: Path):
    job = make_job(
        space={"name": "mbconv", "base": "mobilenet_v3_small", "resolution": 64}
        | {"resolutions": [32]},
        supernet={"sampling": "sandwich", "sandwich_random": 0, "distillation": 1.0}
        | {"teacher_epochs": 1, "epochs": 1, "channel_warmup_start": 0, "num_val_archs": 1},
        compute={"num_workers": 1},
    )
    path = train(job, tmp_path)
    teacher = torch.load(tmp_path / "init/teacher.pt", weights_only=True)
    supernet = torch.load(path, weights_only=True)
    assert tuple(teacher["space"]["resolutions"]) == (64,)
    assert tuple(supernet["space"]["resolutions"]) == (32,)
    # The largest subnet alone was trained: matrices of smaller kernels are still identities.
    matrices = [name for name in teacher["state"] if "transform_" in name]
    assert matrices
    for name in matrices:
        assert torch.equal(teacher["state"][name], torch.eye(9))
    assert any(not torch.equal(supernet["state"][name], torch.eye(9)) for name in matrices)
    assert len(curves(tmp_path / "teacher")) == len(curves(tmp_path)) == 1


def test_training_goes_on_during_an_upload_and_one_cut_short_leaves_no_checkpoint(
    finished_run: FinishedRun,
    make_job: MakeJob,
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    monkeypatch.setattr(trainer, "_train_worker", worker_killed_in_an_upload)
    path = train(make_job(), tmp_path)
    assert (tmp_path / "went on").exists()
    whole, half = (tmp_path / name for name in ("whole.pt", "half.pt"))
    assert 0 < half.stat().st_size < whole.stat().st_size
    assert_same_weights(path, f"{finished_run.folder}/supernet.pt")


def worker_killed_in_an_upload(task: dict[str, Any]) -> None:
    """Train as training/supernet.py does; in the fourth epoch, once, die with half of the third
    epoch's checkpoint uploaded.
    """
    folder = Path(task["run_dir"])
    storage_type = type(ray.train.get_context().get_storage())
    epochs, uploads = [], []

    def batches(self: JobImages, batch_size: int, epoch: int, **kwargs: Any) -> Any:
        epochs.append(epoch)
        return training_batches(self, batch_size, epoch, **kwargs)

    def upload(self: Any, kept: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        uploads.append(name)
        if len(uploads) == 3 and not (folder / "whole.pt").exists():
            wait_for(lambda: epochs[-1] == 3, "the fourth epoch", timeout_s=60)
            (folder / "went on").touch()
            content = Path(kept.path, "state.pt").read_bytes()
            (folder / "whole.pt").write_bytes(content)
            target = Path(self.build_checkpoint_path_from_name(name), "state.pt")
            target.parent.mkdir()
            target.write_bytes(content[: len(content) // 2])
            os.link(target, folder / "half.pt")
            os.kill(os.getpid(), signal.SIGKILL)
        return plain_upload(self, kept, name)

    training_batches, JobImages.training_batches = JobImages.training_batches, batches
    plain_upload = storage_type.persist_current_checkpoint
    storage_type.persist_current_checkpoint = upload
    trainer._train_worker(task)


def test_a_loss_that_is_not_finite_ends_training_at_once(
    make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    # One step an epoch, and the first of them at a learning rate of 0.
    recipe = {"learning_rate": 1e30, "warmup_epochs": 2, "batch_size": 64}
    before = num_workers_started()
    with pytest.raises(UserError, match=r"supernet training: the loss became \w+ in epoch 3"):
        train(make_job(supernet=recipe), tmp_path)
    assert num_workers_started() == before + 2
    assert not (tmp_path / "supernet.pt").exists()
    kept = max((tmp_path / "train/supernet").glob("checkpoint_*/state.pt"))
    assert len(torch.load(kept, weights_only=True)["curves"]) == 2


def test_what_no_worker_can_do_is_said_before_any_starts(
    make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    before = num_workers_started()
    with pytest.raises(UserError, match="cannot feed 3 training workers"):
        train(make_job(supernet={"batch_size": 2}, compute={"num_workers": 3}), tmp_path)
    assert num_workers_started() == before


def test_workers_see_different_images_and_end_with_equal_weights(
    make_job: MakeJob, ray_cluster: None, tmp_path: Path
):
    recipe = {"epochs": 1, "channel_warmup_start": 0, "batch_size": 32}
    job, folder = make_job(supernet=recipe), str(tmp_path)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    TorchTrainer(
        spied_worker,
        train_loop_config={
            "job": job.model_dump(),
            "folder": folder,
            "run_dir": folder,
            "data_path": job.data.path,
        },
        scaling_config=workers.scaling(job.compute, 2, 1),
        run_config=RunConfig(name="spied", storage_path=folder),
    ).fit()
    one, other = (torch.load(f"{folder}/{rank}.pt", weights_only=True) for rank in range(2))
    assert [len(share) for share in one["shares"]] == [len(share) for share in other["shares"]]
    images = [image for share in one["shares"] + other["shares"] for image in share]
    assert len(images) == len(set(images)) == 2 * 32  # two steps
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name
    head = "positions.3.0.output.weight"
    assert not torch.equal(one["start"][head], one["weights"][head])


def spied_worker(task: dict[str, Any]) -> None:
    """Train as training/supernet.py does, and keep what came in and which weights went out."""
    shares, networks, starts = [], [], []

    def batches(self: JobImages, *args: Any, **kwargs: Any) -> Any:
        found = training_batches(self, *args, **kwargs)
        shares.extend(torch.from_numpy(np.concatenate(share)).tolist() for share in found.shares)
        return found

    def fit(network: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        networks.append(network)
        starts.append(weights_of(network))
        return plain_fit(network, *args, **kwargs)

    training_batches, JobImages.training_batches = JobImages.training_batches, batches
    plain_fit, trainer.fit = trainer.fit, fit
    trainer._train_worker(task)
    seen = {"shares": shares, "start": starts[0], "weights": weights_of(networks[0])}
    torch.save(seen, f"{task['run_dir']}/{ray.train.get_context().get_world_rank()}.pt")


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy what is learned: batch statistics are each worker's own."""
    return {name: weight.detach().clone() for name, weight in network.named_parameters()}


def test_a_storage_that_is_away_ends_training_in_one_line():
    error = ray.train.ControllerError(OSError("When uploading part for key 'x': no connection"))
    with pytest.raises(UserError, match=r"part for key 'x': no connection; finished work is kept"):
        raise_user_error(error)
    # These keep their tracebacks.
    raise_user_error(ray.train.ControllerError(ZeroDivisionError("ours")))
    raise_user_error(ray.exceptions.GetTimeoutError("of Ray, and an OSError by birth"))
