"""The training loop: schedule, weight decay, what a step leaves alone, exact resume."""

import copy
import math
from contextlib import suppress

import pytest
import torch
from torch import nn

from nasray.config import SupernetConfig
from nasray.spaces.tiny import Tiny
from nasray.training.loop import LossNotFiniteError, Recipe, fit, learning_rate, make_optimizer
from nasray.training.sampler import sample

RECIPE = Recipe(
    epochs=4,
    learning_rate=0.1,
    warmup_epochs=1,
    momentum=0.9,
    weight_decay=1e-2,
    label_smoothing=0.1,
)
SPACE = Tiny(num_classes=4, resolution=32)


def batches(epoch, number=3):
    generator = torch.Generator().manual_seed(epoch)
    return [
        (
            torch.randint(0, 256, (8, 3, 32, 32), generator=generator, dtype=torch.uint8),
            torch.randint(0, 4, (8,), generator=generator),
        )
        for _ in range(number)
    ]


def train_supernet(recipe, *, resume=None, stop_after=None, networks=None):
    """Train a tiny supernet; return (its state, the last state() that was reported)."""
    supernet = SPACE.supernet()
    SPACE.initialize(supernet, torch.Generator().manual_seed(0))
    states = []

    class Stop(Exception):
        pass

    def report(curves, state):
        states.append(copy.deepcopy(state()))
        if len(curves) == stop_after:
            raise Stop

    config = SupernetConfig(channel_warmup_start=1, channel_warmup_epochs=2)
    try:
        fit(
            supernet,
            lambda images, epoch, step: torch.dropout(
                supernet(images, sample(SPACE, config, seed=0, epoch=epoch, step=step)), 0.5, True
            ),
            recipe,
            batches=batches,
            validate=lambda epoch: {},
            report=report,
            resume=resume,
            device="cpu",
            seed=0,
        )
    except Stop:
        pass
    return supernet.state_dict(), states[-1]


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    recipe = Recipe(**{**RECIPE.__dict__, "epochs": 11, "learning_rate": 2.0})
    assert [learning_rate(recipe, epoch) for epoch in (0, 0.5, 1)] == [0, 1, 2]
    assert learning_rate(recipe, 6) == pytest.approx(1.0)
    assert learning_rate(recipe, 3.5) == pytest.approx(1 + math.cos(math.pi / 4))
    assert learning_rate(recipe, 11) == pytest.approx(0, abs=1e-12)


def test_bn_and_biases_are_not_decayed():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    decayed, plain = make_optimizer(network, RECIPE).param_groups
    assert decayed["weight_decay"] == 1e-2 and plain["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(network[0].weight), id(network[3].weight)}
    assert len(plain["params"]) == 4
    assert decayed["nesterov"]


def test_blocks_that_are_not_chosen_get_no_decay_and_no_momentum():
    """Operation 0 is trained in the first epoch only, operation 1 in the others."""
    supernet = SPACE.supernet()
    SPACE.initialize(supernet, torch.Generator().manual_seed(0))
    states = [copy.deepcopy(supernet.state_dict())]
    fit(
        supernet,
        lambda images, epoch, step: supernet(images, (min(epoch, 1), 2) * 3),
        RECIPE,
        batches=batches,
        validate=lambda epoch: {},
        report=lambda curves, state: states.append(copy.deepcopy(supernet.state_dict())),
        resume=None,
        device="cpu",
        seed=0,
    )
    for epoch, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        for name, tensor in after.items():
            op = name.split(".")[2]  # positions.<row>.<op>.<layer>; the head has one only
            trained = name.startswith("positions.3") or op == str(min(epoch, 1))
            if "num_batches" not in name:
                assert torch.equal(tensor, before[name]) is not trained, (epoch, name)


@pytest.mark.parametrize("stop_after", [1, 3])
def test_a_resumed_run_is_the_same_run(stop_after):
    undisturbed, _ = train_supernet(RECIPE)
    _, kept = train_supernet(RECIPE, stop_after=stop_after)
    resumed, state = train_supernet(RECIPE, resume=kept)
    assert [epoch["epoch"] for epoch in state["curves"]] == [0, 1, 2, 3]
    for name, tensor in undisturbed.items():
        assert torch.equal(resumed[name], tensor), name


def train_with_copy(*, resume=None, stop_after=None):
    """Train three epochs; before the second, one weight is copied to another."""
    network, begun, states = nn.Linear(3 * 32 * 32, 4), [], []
    nn.init.constant_(network.weight, 0.01)
    nn.init.zeros_(network.bias)

    def begin_epoch(epoch):
        begun.append(epoch)
        if epoch == 1:
            with torch.no_grad():
                network.weight[1:] = network.weight[0]

    class Stop(Exception):
        pass

    def report(curves, state):
        states.append(copy.deepcopy(state()))
        if len(curves) == stop_after:
            raise Stop

    with suppress(Stop):
        fit(
            network,
            lambda images, epoch, step: network(images.flatten(1)),
            Recipe(**{**RECIPE.__dict__, "epochs": 3}),
            batches=batches,
            validate=lambda epoch: {},
            report=report,
            resume=resume,
            device="cpu",
            seed=0,
            begin_epoch=begin_epoch,
        )
    return begun, states


@pytest.mark.parametrize("stop_after", [1, 2])
def test_what_begins_an_epoch_happens_once_though_training_is_resumed(stop_after):
    begun, states = train_with_copy()
    assert begun == [0, 1, 2]
    assert not torch.equal(states[0]["state"]["weight"][0], states[0]["state"]["weight"][1])
    first, kept = train_with_copy(stop_after=stop_after)
    again, resumed = train_with_copy(resume=kept[-1])
    assert first + again == begun
    assert torch.equal(resumed[-1]["state"]["weight"], states[-1]["state"]["weight"])


def test_training_learns():
    """Memorise three batches: the loss must fall well below that of guessing."""
    recipe = Recipe(**{**RECIPE.__dict__, "epochs": 30, "learning_rate": 2e-3})
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4))
    curves = fit(
        network,
        lambda images, epoch, step: network(images),
        recipe,
        batches=lambda epoch: batches(0),
        validate=lambda epoch: {},
        report=lambda curves, state: None,
        resume=None,
        device="cpu",
        seed=0,
    )
    assert curves[-1]["train_top1"] == 1.0
    assert curves[-1]["loss"] < 0.7 < curves[0]["loss"]


def test_a_loss_that_is_not_finite_stops_the_training():
    supernet = SPACE.supernet()
    reported = []

    def forward(images, epoch, step):
        logits = supernet(images, (0, 2) * 3)
        return logits * float("nan") if epoch == 2 else logits

    with pytest.raises(LossNotFiniteError, match="epoch 3"):
        fit(
            supernet,
            forward,
            RECIPE,
            batches=batches,
            validate=lambda epoch: {},
            report=lambda curves, state: reported.append(len(curves)),
            resume=None,
            device="cpu",
            seed=0,
        )
    assert reported == [1, 2]
