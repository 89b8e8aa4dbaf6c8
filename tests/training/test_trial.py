"""What a trial begins with and learns from; a whole one runs in test_retrain.py."""

from pathlib import Path
from typing import Any

import pytest
import torch

from nasray import checkpoint
from nasray.config import Job
from nasray.evaluation.evaluate import bn_layers
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.space import largest
from nasray.storage import files as storage
from nasray.training import trial as trials
from tests.conftest import MakeJob


@pytest.fixture
def fitted(make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a trial gives fit(): of the smallest subnet, at 32 pixels, taught by one at 64."""
    values = make_job().model_dump()
    options = {"width": 0.25, "resolution": 64, "resolutions": [32, 64]}
    values["space"] = {"name": "ofa_mobilenetv3", **options}
    values["retrain"] = {"init": "supernet", "epochs": 1, "batch_size": 8}
    job = Job.model_validate(values)
    space = OfaMobileNetV3(num_classes=4, width=0.25, resolution=64, resolutions=(32, 64))
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    checkpoint.save_supernet(str(tmp_path / "supernet.pt"), supernet)
    found: dict[str, Any] = {"supernet": supernet, "arch": (0,) * len(largest(space))}

    def fit(network: torch.nn.Module, passes: Any, recipe: Any, **others: Any) -> None:
        found.update(network=network, passes=passes, recipe=recipe, **others)

    monkeypatch.setattr(trials, "fit", fit)
    monkeypatch.setattr(trials, "worker_device", lambda cpus: "cpu")
    task = {"job": job.model_dump(), "data_path": job.data.path, "arch": found["arch"]}
    task |= {"folder": str(tmp_path / "trial-0")}
    task |= {"supernet": str(tmp_path / "supernet.pt"), "teacher": str(tmp_path / "supernet.pt")}
    recipe = {"learning_rate": 0.01, "weight_decay": 0.0, "label_smoothing": 0.1}
    task |= {"recipe": recipe}
    trials._train_subnet(task, rank=0, world_size=1, report=lambda metrics: None)
    return found


def test_fine_tuning_begins_with_the_supernets_weights_and_recalibrated_bn(fitted: dict):
    inherited = fitted["supernet"].extract(fitted["arch"])
    for name, weight in fitted["network"].named_parameters():
        assert torch.equal(weight, inherited.get_parameter(name)) and weight.requires_grad
    assert all((norm.running_var != 1).all() for norm in bn_layers(fitted["network"]))
    assert fitted["recipe"].distillation == 0.5


def test_a_teacher_and_its_subnet_see_the_same_images_at_their_own_resolutions(fitted: dict):
    seen = []
    for network in (fitted["network"], fitted["teacher"].network):
        network[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    images, _ = next(iter(fitted["batches"](0)))
    assert images.shape[1:] == (3, 64, 64)
    [forward] = fitted["passes"](0, 0)
    for each in (forward, fitted["teacher"]):
        assert each(images.float()).shape == (8, 4)
    assert seen == [32, 64]
    fitted["validate"](0)  # as it is exported: on images of its own resolution
    assert set(seen[2:]) == {32}


def test_a_process_that_was_given_up_replaces_nothing_newer(tmp_path: Path):
    """A node that was cut off goes on training, while another one has begun its trial anew."""
    folder = str(tmp_path)
    epochs = [{"epoch": epoch} for epoch in range(4)]
    storage.write(f"{folder}/state.pt", b"of an older version")
    assert trials.latest_state(folder) == f"{folder}/state.pt"
    for number in (1, 2, 3):
        trials.keep_state(folder, epochs[:number], lambda number=number: {"curves": number})
        assert checkpoint.load(trials.latest_state(folder)) == {"curves": number}
    trials.keep_state(folder, epochs[:2], lambda: {"curves": "late"})
    assert checkpoint.load(trials.latest_state(folder)) == {"curves": 3}
    assert storage.read_json(f"{folder}/curves.json") == epochs[:3]
    assert storage.list_names(folder) == ["curves.json", "state-000003.pt"]
