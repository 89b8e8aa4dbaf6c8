"""From trained weights to networks for several limits, shipped without further training."""

from pathlib import Path

import onnxruntime
import pytest
import torch

import nasray
from nasray.checkpoint import load_subnet, load_supernet
from nasray.config import Job
from nasray.data.splits import JobImages
from nasray.errors import UserError
from nasray.evaluation.evaluate import top1
from nasray.pipeline.run import opened
from nasray.storage import files as storage
from tests.conftest import MakeJob
from tests.pipeline.test_start import save_supernet

pytestmark = pytest.mark.ray

LIMITS = [0.3e6, 0.5e6, 0.8e6, 1.2e6, 2.0e6]  # MACs
SCRATCH = {"epochs": 1, "batch_size": 16, "learning_rate": 0.05}
FINE_TUNED = {"init": "supernet", "epochs": 1, "batch_size": 16, "num_winners": 1}


def job_of(make_job: MakeJob, init: str, *also: dict) -> Job:
    keys = ("epochs", "batch_size", "learning_rate", "warmup_epochs")
    keys += ("num_trials", "grace_epochs")
    job = make_job(
        supernet={"init": init, "epochs": 2, "channel_warmup_epochs": 0, "ema": 0.5},
        search={
            "algorithm": "front",
            "prefer": "best",
            "limits": [{"cost": "macs", "max": limit} for limit in LIMITS],
        },
    ).model_dump(exclude={"retrain"})
    return Job.model_validate(job | {"retrain": {"also": also}})


@pytest.fixture(scope="module")
def run_dir(make_job: MakeJob, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run that begins with the weights of a supernet of seven classes, for four."""
    folder = tmp_path_factory.mktemp("pretrained")
    init = save_supernet(folder / "seven.pt", num_classes=7)
    nasray.run(job_of(make_job, init), folder / "run")
    return str(folder / "run")


def test_each_limit_has_a_network_with_the_weights_of_the_supernet(make_job: MakeJob, run_dir: str):
    answers = storage.read_json(f"{run_dir}/search.json")["answers"]
    assert [answer["limit"]["max"] for answer in answers] == LIMITS
    tops = [answer["fitness"] for answer in answers]
    assert tops == sorted(tops)  # a higher limit allows all that a lower one does
    archs = list(dict.fromkeys(tuple(answer["genes"]) for answer in answers))
    results = nasray.open(run_dir).results()
    assert [tuple(result["genes"]) for result in results] == archs
    job, supernet = make_job(), load_supernet(f"{run_dir}/supernet.pt")
    for index, result in enumerate(results):
        assert result["shipped"] == "supernet"
        assert result["supernet_top1"] == result["val_top1"]
        assert result["costs"]["macs"] <= LIMITS[-1]
        _, arch, subnet, extra = load_subnet(f"{run_dir}/retrain/{index}/model.pt")
        images = JobImages(job, job.data.path)
        assert result["val_top1"] == top1(subnet, *images.validation, batch_size=20)
        assert extra["classes"] == list(images.dataset.classes)
        inherited = dict(supernet.extract(arch).named_parameters())
        assert all(torch.equal(inherited[name], each) for name, each in subnet.named_parameters())
        assert storage.read_json(f"{run_dir}/retrain/{index}/profile.json")["totals"]["macs"]


def test_every_network_is_exported_and_checked(run_dir: str):
    exports, results = nasray.open(run_dir).exports(), nasray.open(run_dir).results()
    assert len(exports) == len(results) >= 2
    for export in exports:
        assert export["num_images"] == 32 and export["top1_agreement"] == 1.0
        onnxruntime.InferenceSession(export["file"], providers=["CPUExecutionProvider"])
    assert {stage.name: stage.state for stage in nasray.open(run_dir).status()}["export"] == "done"


def test_the_same_run_again_does_nothing_anew_and_adds_other_ways(
    make_job: MakeJob, run_dir: str, tmp_path: Path
):
    init = storage.read_json(f"{run_dir}/job.json")["job"]["supernet"]["init"]
    before = nasray.open(run_dir).results()
    handle = nasray.run(job_of(make_job, init, FINE_TUNED, SCRATCH), run_dir)
    found = handle.results()
    assert found[: len(before)] == before
    assert [result["shipped"] for result in found[len(before) :]] == ["scratch", "fine-tuned"]
    for result in found[len(before) :]:
        assert result["genes"] == before[0]["genes"]
        assert result["supernet_top1"] == before[0]["val_top1"]
    names = {Path(export["file"]).stem for export in handle.exports()}
    assert {"0", "0-scratch", "0-fine-tuned"} <= names
    with pytest.raises(UserError, match=r"was recorded with retrain\.also"):
        nasray.run(job_of(make_job, init, SCRATCH), run_dir)
    with opened(run_dir) as run:
        assert [way.way for way in run.job.retrain.ways] == ["supernet", "fine-tuned", "scratch"]
    # Fine-tuning began with the supernet's weights: one epoch at a low rate moves them a little.
    weights = [
        load_subnet(f"{run_dir}/retrain/{name}/model.pt")[2].state_dict()["block0.conv0.weight"]
        for name in ("0", "0-fine-tuned", "0-scratch")
    ]
    near, far = ((weights[0] - other).norm() / weights[0].norm() for other in weights[1:])
    assert 0 < near < 0.2 < far


def test_a_supernet_is_taken_as_it_is_without_a_cluster(
    make_job: MakeJob, run_dir: str, tmp_path: Path
):
    job = make_job(supernet={"init": f"{run_dir}/supernet.pt", "epochs": 0})
    path = nasray.open(tmp_path / "run", job).train()
    state = torch.load(path, weights_only=True)["state"]
    known = torch.load(f"{run_dir}/supernet.pt", weights_only=True)["state"]
    assert all(torch.equal(state[name], known[name]) for name in known)
