"""What a network says of each validation image is what its top-1 counts."""

import io

import numpy as np
import torch
from PIL import Image
from torch import nn

from nasray.data.splits import JobImages
from nasray.data.transforms import normalize
from nasray.evaluation.evaluate import correct_mask, predictions
from nasray.evaluation.validation import on_validation
from nasray.spaces import make_space
from tests.conftest import MakeJob


def test_each_image_has_its_name_its_class_and_the_worst_a_picture(make_job: MakeJob):
    job = make_job()
    images = JobImages(job, job.data.path)
    supernet = make_space(job.space, 4).supernet().eval()
    subnet = supernet.extract((0, 1) * 3)
    said = on_validation(subnet, images, "cpu")
    pixels, labels = images.validation
    assert np.array_equal(said.correct, correct_mask(subnet, pixels, labels, batch_size=20))
    with torch.no_grad():
        expected = subnet(normalize(torch.from_numpy(pixels.copy()))).softmax(1).max(1).values
    np.testing.assert_allclose(said.probability, expected.numpy(), atol=1e-5)
    assert said.classes == images.dataset.classes and len(set(said.names)) == len(labels) == 32
    wrong = said.most_confident_errors(24).tolist()
    assert [row for row in range(32) if said.thumbnails[row]] == sorted(wrong)
    picture = Image.open(io.BytesIO(said.thumbnails[wrong[0]] or b""))
    shown = np.asarray(picture).astype(int).mean((0, 1))
    np.testing.assert_allclose(shown, pixels[wrong[0]].mean((1, 2)), atol=3)


def test_outputs_that_are_not_finite_are_no_class():
    class Odd(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            outputs = torch.tensor([[1.0, 2.0], [torch.nan, 0.0], [torch.inf, 0.0], [3.0, 0.0]])
            return outputs[: len(images)]

    pixels = np.zeros((4, 3, 8, 8), np.uint8)
    classes, probability = predictions(Odd(), pixels, batch_size=4)
    assert classes.tolist() == [1, -1, -1, 0]
    assert probability[3] > probability[0] > 0.5
