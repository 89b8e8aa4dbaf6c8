"""BN recalibration is exact, and accuracy counts exactly the images it is given."""

import numpy as np
import pytest
import torch
from torch import nn

from nasray.data.transforms import normalize
from nasray.evaluation.evaluate import (
    LOWEST,
    correct_mask,
    evaluate,
    fold_bn,
    outcomes,
    recalibrate_bn,
    top1,
)


def pictures(number, side=8, seed=0):
    rng = np.random.default_rng(seed)
    # Batches that differ a lot: an average of their variances would be far off.
    brightness = np.linspace(0, 200, number)[:, None, None, None]
    return (brightness + rng.uniform(0, 55, (number, 3, side, side))).astype(np.uint8)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


@pytest.mark.parametrize("batch_size", [7, 16, 100])
def test_statistics_of_the_first_layer_are_those_of_all_images(batch_size):
    net, images = network(), pictures(50)
    recalibrate_bn(net, images, batch_size=batch_size)
    values = net[0](normalize(torch.from_numpy(images)))
    expected_var = values.double().var((0, 2, 3), unbiased=False).float()
    torch.testing.assert_close(net[1].running_mean, values.mean((0, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(net[1].running_var, expected_var, rtol=1e-4, atol=1e-5)


def test_deeper_layers_see_batches_normalised_as_in_training():
    """Law of total variance over the very values that the layer was given."""
    net, images = network(), pictures(40)
    given = []
    handle = net[4].register_forward_pre_hook(lambda norm, inputs: given.append(inputs[0]))
    recalibrate_bn(net, images, batch_size=16)
    handle.remove()
    values = torch.cat(given).double()
    torch.testing.assert_close(
        net[4].running_mean.double(), values.mean((0, 2, 3)), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        net[4].running_var.double(), values.var((0, 2, 3), unbiased=False), rtol=1e-4, atol=1e-6
    )


def test_what_was_there_before_does_not_matter():
    net, images = network(), pictures(30)
    recalibrate_bn(net, images, batch_size=10)
    first = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        net[1].running_mean.fill_(1e3)
        net[4].running_var.fill_(0.0)
    recalibrate_bn(net, images, batch_size=10)
    for name in ("1.running_mean", "1.running_var", "4.running_mean", "4.running_var"):
        assert torch.equal(net.state_dict()[name], first[name])


def test_a_module_is_as_before_when_a_batch_fails():
    net = network()
    net[1].momentum = 0.25
    with pytest.raises(RuntimeError):
        recalibrate_bn(net, pictures(20)[:, :2], batch_size=10)
    assert net[1].momentum == 0.25
    assert not net[1].training
    assert not net[1]._forward_pre_hooks


def test_dropout_is_off_and_the_net_is_left_in_eval_mode():
    net, images = network().train(), pictures(20)
    recalibrate_bn(net, images, batch_size=10)
    assert not any(module.training for module in net.modules())


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_top1_counts_exactly_the_given_images(batch_size):
    class Brightness(nn.Module):
        def forward(self, images):
            mean = images.mean((1, 2, 3))
            return torch.stack((-mean, mean), 1)

    images = np.zeros((11, 3, 4, 4), np.uint8)
    images[::2] = 255
    labels = np.array([1, 0] * 5 + [0])  # the last one is wrong
    assert top1(Brightness(), images, labels, batch_size=batch_size) == pytest.approx(10 / 11)


def test_outputs_that_are_no_numbers_are_no_answer():
    class Broken(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) * torch.tensor([1.0, float("nan"), 1.0])

    labels = np.repeat(np.arange(3), 2)
    assert top1(Broken(), np.zeros((6, 3, 4, 4), np.uint8), labels, batch_size=2) == 0.0


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_outcomes_are_what_the_softmax_gives_to_the_right_class(batch_size):
    class Gains(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) * torch.tensor([1.0, -2.0, 40.0])

    images = np.random.default_rng(0).integers(0, 256, (9, 3, 4, 4), np.uint8)
    images[8] = 255  # of whose first class the probability is next to none
    labels = np.array([0, 1, 2] * 2 + [1, 2, 0])
    found = outcomes(Gains(), images, labels, batch_size=batch_size)
    logits = Gains()(normalize(torch.from_numpy(images))).double()
    expected = logits.log_softmax(1)[range(9), labels].clamp(min=LOWEST)
    assert expected[8] == LOWEST
    torch.testing.assert_close(torch.from_numpy(found[:, 1]), expected.float())
    assert np.array_equal(found[:, 0], correct_mask(Gains(), images, labels, batch_size=batch_size))


def test_outcomes_of_outputs_that_are_no_numbers_are_the_lowest():
    class Broken(nn.Module):
        def forward(self, images):
            return images.mean((2, 3)) * torch.tensor([1.0, float("nan"), 1.0])

    labels = np.repeat(np.arange(3), 2)
    found = outcomes(Broken(), np.zeros((6, 3, 4, 4), np.uint8), labels, batch_size=2)
    assert found.tolist() == [[0.0, LOWEST]] * 6


@pytest.mark.parametrize("number, batch_size", [(11, 10), (5, 2), (3, 2), (7, 3)])
def test_no_batch_of_one_image_spoils_the_statistics(number, batch_size):
    net = nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten())  # one pixel each
    recalibrate_bn(net, pictures(number), batch_size=batch_size)
    assert torch.isfinite(net[1].running_var).all()


def test_read_only_images_are_not_touched():
    images = pictures(20)
    images.flags.writeable = False
    before = images.copy()
    correct = evaluate(network(), images, images, np.zeros(20, int), batch_size=8)
    assert correct.shape == (20,) and correct.dtype == bool
    assert np.array_equal(images, before)


class Bypassed(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, images):
        return self.used(images)


def test_a_bn_layer_that_sees_no_images_is_a_mistake():
    with pytest.raises(ValueError, match="saw no images"):
        recalibrate_bn(Bypassed(), pictures(4), batch_size=2)


def test_bn_layers_that_still_learn_are_not_folded():
    with pytest.raises(ValueError, match="only BN layers in eval mode"):
        fold_bn(network().train())


def test_a_network_without_bn_needs_no_images():
    recalibrate_bn(nn.Sequential(nn.Flatten()), pictures(2), batch_size=2)


def test_a_network_without_bn_is_left_in_eval_mode_too():
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.5)).train()
    recalibrate_bn(net, pictures(4), batch_size=2)
    assert not net.training


def test_statistics_may_be_inherited_or_those_of_each_batch():
    images, labels = pictures(40), np.arange(40) % 2
    found = {
        way: evaluate(network(), way, images, labels, batch_size=8)
        for way in ("inherited", "batch")
    }
    with torch.inference_mode():
        batch = normalize(torch.from_numpy(images))
        inherited = network().eval()(batch).argmax(1).numpy() == labels
        by_batch = network().eval()
        for index in (1, 4):
            by_batch[index].train()
        parts = [by_batch(part).argmax(1) for part in batch.split(8)]
    np.testing.assert_array_equal(found["inherited"], inherited)
    np.testing.assert_array_equal(found["batch"], torch.cat(parts).numpy() == labels)


@pytest.mark.gpu
def test_a_gpu_finds_what_a_cpu_does():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    images, labels = pictures(400, side=32), np.arange(400) % 4
    net = network()
    recalibrate_bn(net, images, batch_size=32)
    on_gpu = network().to("cuda")
    # Copies run ahead: what they bring must wait for the computation, and be kept for it.
    on_gpu.register_forward_pre_hook(lambda *_: torch.cuda._sleep(10_000_000))
    recalibrate_bn(on_gpu, images, batch_size=32, device="cuda")
    # bfloat16 has 8 bits; no batch is left out, none counted twice.
    for index in (1, 4):
        for name in ("running_mean", "running_var"):
            found, expected = getattr(on_gpu[index], name).cpu(), getattr(net[index], name)
            torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
    found = correct_mask(on_gpu, images, labels, batch_size=32, device="cuda")
    expected = correct_mask(net, images, labels, batch_size=32)
    assert (found == expected).mean() > 0.95
