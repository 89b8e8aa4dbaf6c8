"""A teacher's logits: those of a retrained network, or of a supernet's largest subnet."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nasray import checkpoint
from nasray.config import Job, parse_job
from nasray.data.splits import JobImages
from nasray.data.transforms import normalize, resized
from nasray.evaluation.evaluate import recalibrate_bn
from nasray.spaces.ofa_mobilenetv3 import OfaMobileNetV3
from nasray.spaces.space import largest
from nasray.training.supernet import teacher_job
from nasray.training.teacher import load_teacher
from tests.conftest import MakeJob


def test_a_teacher_sees_images_at_its_own_resolution(make_job: MakeJob, tmp_path: Path):
    job = make_job()
    space = OfaMobileNetV3(num_classes=4, width=0.25, resolution=64, resolutions=(32, 48))
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    images = JobImages(job, job.data.path)
    batch = normalize(torch.from_numpy(images.first_validation(4)[0].copy()))

    checkpoint.save_supernet(str(tmp_path / "supernet.pt"), supernet)
    subnet = supernet.extract(largest(space))
    calibration = replace(images, other_resolution=48).calibration(40)
    recalibrate_bn(subnet, calibration, batch_size=job.search.batch_size)
    checkpoint.save_subnet(str(tmp_path / "model.pt"), space, largest(space), subnet)
    with torch.no_grad():
        expected = subnet.eval()(resized(batch, 48))
    for file in ("supernet.pt", "model.pt"):
        teacher = load_teacher(str(tmp_path / file), images, "cpu")
        found = teacher(batch)
        assert not found.requires_grad
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "supernet",
    [
        {},
        {"channel_warmup_start": 10, "shared_start_epochs": 8},
        {"init": "a.pt", "sampling": "uniform", "ema": 0.9},
    ],
)
def test_a_teacher_may_be_trained_for_any_number_of_epochs(supernet: dict):
    """The warm-up, which it has none of, may begin later than it ends."""
    values = {"epochs": 70, "teacher_epochs": 6, "distillation": 0.5} | supernet
    job = Job.model_validate({"data": {"source": "synthetic"}, "supernet": values})
    found = parse_job(teacher_job(job).model_dump(), "run").supernet
    assert (found.epochs, found.sampling, found.has_teacher) == (6, "largest", False)
    assert found.shared_start_epochs == 0  # its operations are not those that a shared start has
