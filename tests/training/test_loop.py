"""The training loop: schedule, weight decay, what a step leaves alone, exact resume."""

import copy
import math
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from nasray.config import SupernetConfig
from nasray.data.transforms import normalize
from nasray.errors import UserError
from nasray.spaces.tiny import Tiny
from nasray.training.channels import sorting
from nasray.training.loop import (
    ALPHA_CLIP,
    LossNotFiniteError,
    Recipe,
    agreed_precision,
    alpha_divergence,
    fit,
    learning_rate,
    loss_of,
    make_optimizer,
    make_scaler,
    train_epoch,
)
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


WARMUP = SupernetConfig(channel_warmup_start=1, channel_warmup_epochs=2)
FAIR = SupernetConfig(sampling="fair", smallest_scale=2.0)
SANDWICH = SupernetConfig(
    channel_warmup_start=0, channel_warmup_epochs=2, sampling="sandwich", distillation=0.5
)


def train_supernet(recipe, config=WARMUP, *, resume=None, stop_after=None):
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

    try:
        fit(
            supernet,
            lambda epoch, step: [
                lambda images, arch=arch: torch.dropout(supernet(images, arch), 0.5, True)
                for arch in sample(SPACE, config, seed=0, epoch=epoch, step=step)
            ],
            recipe,
            batches=batches,
            validate=lambda epoch: {},
            report=report,
            resume=resume,
            device="cpu",
            seed=0,
            begin_epoch=lambda epoch: sorting(supernet, config, epoch),
        )
    except Stop:
        pass
    return supernet.state_dict(), states[-1] if states else resume


def test_learning_rate_rises_linearly_then_falls_as_a_cosine():
    recipe = Recipe(**{**RECIPE.__dict__, "epochs": 11, "learning_rate": 2.0})
    assert [learning_rate(recipe, epoch) for epoch in (0, 0.5, 1)] == [0, 1, 2]
    assert learning_rate(recipe, 6) == pytest.approx(1.0)
    assert learning_rate(recipe, 3.5) == pytest.approx(1 + math.cos(math.pi / 4))
    assert learning_rate(recipe, 11) == pytest.approx(0, abs=1e-12)


def test_small_subnets_rates_fall_sooner():
    """(1 - t)^g, g = 4 for the smallest, 1/4 for the largest, after the same warm-up."""
    recipe = replace(RECIPE, epochs=11, learning_rate=2.0, schedule="complexity")
    for place, power in ((0, 4), (0.5, 2.125), (1, 0.25)):
        assert learning_rate(recipe, 0.5, place) == 1
        assert learning_rate(recipe, 6, place) == pytest.approx(2 * 0.5**power)
        assert learning_rate(recipe, 11, place) == 0


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
        lambda epoch, step: [lambda images: supernet(images, (min(epoch, 1), 2) * 3)],
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


def test_what_a_step_cuts_off_a_used_tensor_goes_on_with_momentum_and_decay():
    """As the masked channels of the original (docs/spec.md, OneShot 2.2)."""
    supernet = SPACE.supernet()
    SPACE.initialize(supernet, torch.Generator().manual_seed(0))
    optimizer = make_optimizer(supernet, RECIPE)
    arch = (0, 0) * 3
    param, shape = supernet.slices_of(arch)[0]
    assert shape != param.shape  # it uses a part only
    before = param.detach().clone()
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    supernet(torch.zeros(2, 3, 32, 32), arch).sum().backward()
    optimizer.step()
    cut_off = tuple(slice(length, None) for length in shape[:1])
    decay = 0.1 * 1e-2 * (1 + RECIPE.momentum)  # the first step of Nesterov's
    torch.testing.assert_close(param[cut_off], before[cut_off] * (1 - decay))


@pytest.mark.parametrize(
    ("changes", "config", "stop_after"),
    [
        ({}, WARMUP, 1),
        ({}, WARMUP, 3),
        ({"distillation": 0.5, "ema": 0.9}, SANDWICH, 2),
        ({"distillation": 0.5, "distillation_loss": "alpha"}, SANDWICH, 2),
        ({"clip_gradient_norm": 0.1}, FAIR, 2),
        ({"ema": 0.9}, WARMUP.model_copy(update={"sampling": "progressive"}), 1),
        ({"ema": 0.9}, WARMUP.model_copy(update={"sampling": "progressive"}), 2),
    ],
)
def test_a_resumed_run_is_the_same_run(changes, config, stop_after):
    recipe = replace(RECIPE, **changes)
    undisturbed, _ = train_supernet(recipe, config)
    _, kept = train_supernet(recipe, config, stop_after=stop_after)
    resumed, state = train_supernet(recipe, config, resume=kept)
    assert [epoch["epoch"] for epoch in state["curves"]] == [0, 1, 2, 3]
    ended, _ = train_supernet(recipe, config, resume=state)  # stopped before it was saved
    for name, tensor in undisturbed.items():
        assert torch.equal(resumed[name], tensor), name
        assert torch.equal(ended[name], tensor), name


def gradients_of(passes, recipe, *, teacher=None, sizes=None, epoch=0):
    """The gradients of one step on one batch, by name, and the metrics of that step."""
    supernet = SPACE.supernet().train()
    SPACE.initialize(supernet, torch.Generator().manual_seed(0))
    optimizer = make_optimizer(supernet, recipe)
    metrics = train_epoch(
        lambda step: [partial(supernet, arch=arch) for arch in passes],
        batches(0, number=1),
        optimizer,
        make_scaler("cpu"),
        recipe,
        epoch=epoch,
        num_steps=1,
        device="cpu",
        teacher=teacher,
        sizes=sizes and (lambda step: sizes),
    )
    return {name: param.grad for name, param in supernet.named_parameters()}, metrics


LARGE, SMALL = (1, 2) * 3, (0, 0) * 3
ARCHS = [LARGE, SMALL, (0, 1, 1, 0, 0, 2), (1, 1, 0, 1, 1, 0)]


def summed(*each):
    """Sum gradients by name; None where all are None."""
    found = {}
    for name in each[0]:
        grads = [grads[name] for grads in each if grads[name] is not None]
        found[name] = sum(grads) if grads else None
    return found


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        if grad is None:
            assert found[name] is None, name
        else:
            torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_step_sums_the_gradients_of_its_passes():
    each = [gradients_of([arch], RECIPE) for arch in ARCHS]
    found, metrics = gradients_of(ARCHS, RECIPE)
    assert_close(found, summed(*(grads for grads, _ in each)))
    for key in ("loss", "train_top1"):
        assert metrics[key] == pytest.approx(sum(one[key] for _, one in each) / len(each))


def test_the_first_pass_teaches_the_others_with_its_soft_labels():
    """Against the loss written out: (1 - w) CE(smoothed labels) + w CE(the first one's softmax)."""
    recipe = replace(RECIPE, distillation=0.3)
    [(images, labels)] = batches(0, number=1)
    supernet = SPACE.supernet().train()
    SPACE.initialize(supernet, torch.Generator().manual_seed(0))
    inputs = normalize(images)
    smoothed = torch.nn.functional.one_hot(labels, 4) * 0.9 + 0.1 / 4
    first, *others = (supernet(inputs, arch).log_softmax(1) for arch in ARCHS)
    loss = -(smoothed * first).sum(1).mean()
    for logits in others:
        loss = loss - 0.7 * (smoothed * logits).sum(1).mean()
        loss = loss - 0.3 * (first.detach().exp() * logits).sum(1).mean()
    loss.backward()
    found, metrics = gradients_of(ARCHS, recipe)
    assert_close(found, {name: param.grad for name, param in supernet.named_parameters()})
    assert metrics["loss"] == pytest.approx(loss.item() / len(ARCHS), rel=1e-5)


def test_a_teacher_teaches_all_passes():
    teacher, recipe = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), RECIPE
    nn.init.normal_(teacher[1].weight, generator=torch.Generator().manual_seed(1))
    [(images, _)] = batches(0, number=1)
    soft_labels = teacher(normalize(images)).softmax(1).detach()
    supernet = SPACE.supernet().train()
    SPACE.initialize(supernet, torch.Generator().manual_seed(0))
    for arch in (LARGE, SMALL):
        logits = supernet(normalize(images), arch)
        (-(soft_labels * logits.log_softmax(1)).sum(1).mean()).backward()
    recipe = replace(RECIPE, distillation=1.0)
    found, _ = gradients_of([LARGE, SMALL], recipe, teacher=teacher)
    assert_close(found, {name: param.grad for name, param in supernet.named_parameters()})
    assert all(param.grad is None for param in teacher.parameters())


def divergence(p, q, alpha):
    """As its definition has it, by alpha = 1 or -1: (n,) of (n, classes)."""
    w = p / q
    return (q * (w * w.log() if alpha == 1 else (1 / w - 1) / 2)).sum(1)


@pytest.mark.parametrize("alpha", [1, -1])
def test_an_image_counts_by_the_larger_alpha_divergence(alpha):
    """Its value and its gradient are those of the definition, where nothing is clipped."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 5, generator=generator)
    soft_labels = (logits + 0.5 * torch.randn(64, 5, generator=generator)).softmax(1)
    both = [divergence(soft_labels, logits.softmax(1), each) for each in (1, -1)]
    chosen = (both[0] > both[1]) == (alpha == 1)
    assert 10 < chosen.sum() < 54
    logits = logits[chosen].requires_grad_()
    plain = divergence(soft_labels[chosen], logits.softmax(1), alpha).mean()
    found = alpha_divergence(logits, soft_labels[chosen])
    torch.testing.assert_close(found, plain)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (found, plain)))


def test_the_weight_of_a_class_in_the_alpha_divergence_is_clipped():
    """The student has 25 times the teacher's probability of the second class; 5 of it count."""
    logits = torch.zeros(1, 2, requires_grad=True)
    alpha_divergence(logits, torch.tensor([[0.98, 0.02]])).backward()
    weights = 0.5 * torch.tensor([[0.5 - 0.5 / 0.98, 0.5 - ALPHA_CLIP]])
    torch.testing.assert_close(logits.grad, 0.5 * weights.sum() - weights)


def test_soft_labels_of_nothing_or_all_have_finite_gradients():
    logits = torch.tensor([[90.0, 0.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    loss = alpha_divergence(logits, torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0]]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and logits.grad.any()


def test_a_pass_of_a_lower_rate_counts_less():
    recipe = replace(RECIPE, epochs=10, warmup_epochs=0, schedule="complexity")
    each = [gradients_of([arch], RECIPE)[0] for arch in (LARGE, SMALL)]
    found, metrics = gradients_of([LARGE, SMALL], recipe, sizes=[(1.0, 2e6), (0.0, 1e6)], epoch=5)
    share = 0.5**4 / 0.5**0.25
    scaled = {name: None if grad is None else share * grad for name, grad in each[1].items()}
    assert_close(found, summed(each[0], scaled))
    plain = gradients_of([LARGE, SMALL], RECIPE)[1]
    assert metrics == pytest.approx(plain)  # of losses that are not scaled


@pytest.mark.parametrize("macs", [(1e6, 2e6), (2e6, 2e6)])
def test_a_larger_subnet_of_a_higher_loss_has_the_difference_added(macs):
    recipe = replace(RECIPE, epochs=10, rank_loss=2.0)
    alone = [gradients_of([arch], RECIPE) for arch in (LARGE, SMALL)]
    (better, _), (worse, _) = sorted(alone, key=lambda found: found[1]["loss"])
    order = [LARGE, SMALL] if better is alone[0][0] else [SMALL, LARGE]
    sizes = [(0.5, each) for each in macs]
    weight = 2 * math.sin(0.8 * math.pi * 5 / 10) if macs[0] < macs[1] else 0
    added = {name: None if g is None else (1 + weight) * g for name, g in worse.items()}
    assert_close(gradients_of(order, recipe, sizes=sizes, epoch=5)[0], summed(better, added))
    other_way, _ = gradients_of(order[::-1], recipe, sizes=sizes, epoch=5)
    assert_close(other_way, summed(worse, better))
    assert_close(gradients_of(order, recipe, sizes=sizes)[0], summed(better, worse))  # at first


def test_the_norm_of_a_steps_summed_gradients_is_clipped():
    plain, _ = gradients_of(ARCHS, RECIPE)
    norm = torch.stack([grad.norm() for grad in plain.values() if grad is not None]).norm().item()
    clipped, _ = gradients_of(ARCHS, replace(RECIPE, clip_gradient_norm=norm / 4))
    quarter = {name: None if grad is None else grad / 4 for name, grad in plain.items()}
    assert_close(clipped, quarter)
    untouched, _ = gradients_of(ARCHS, replace(RECIPE, clip_gradient_norm=2 * norm))
    assert_close(untouched, plain)


def test_averaged_weights_are_what_is_validated_and_kept():
    recipe = replace(RECIPE, epochs=2, ema=0.5, learning_rate=1e-3)
    network, raw, validated = nn.Linear(3 * 32 * 32, 4), [], []
    nn.init.zeros_(network.bias)
    nn.init.constant_(network.weight, 0.01)
    mean = network.bias.detach().clone()

    def forward(images):
        raw.append(network.bias.detach().clone())  # before the step
        return network(images.flatten(1))

    def report(curves, state):
        assert not torch.equal(state()["state"]["bias"], state()["ema"]["bias"])
        raw.append(network.bias.detach().clone())

    fit(
        network,
        lambda epoch, step: [forward],
        recipe,
        batches=batches,
        validate=lambda epoch: validated.append(network.bias.detach().clone()) or {},
        report=report,
        resume=None,
        device="cpu",
        seed=0,
    )
    after = [*raw[1:4], *raw[5:8]]  # of each step
    for step, weights in enumerate(after):
        decay = min(0.5, (1 + step) / (10 + step))
        mean = decay * mean + (1 - decay) * weights
        if step in (2, 5):
            torch.testing.assert_close(validated[step // 3], mean)
    assert torch.equal(network.bias, validated[-1])
    assert not torch.equal(network.bias, raw[-1])


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
            lambda epoch, step: [lambda images: network(images.flatten(1))],
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
        lambda epoch, step: [network],
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

    def forward(images, factor):
        return supernet(images, (0, 2) * 3) * factor

    def passes(epoch, step):
        return [partial(forward, factor=float("nan") if epoch == 2 else 1.0)]

    with pytest.raises(LossNotFiniteError, match="epoch 3"):
        fit(
            supernet,
            passes,
            RECIPE,
            batches=batches,
            validate=lambda epoch: {},
            report=lambda curves, state: reported.append(len(curves)),
            resume=None,
            device="cpu",
            seed=0,
        )
    assert reported == [1, 2]


def test_a_training_goes_on_in_the_precision_in_which_it_began(monkeypatch):
    """Whichever GPU it is resumed on; if that does not compute it, one line says so."""
    _, state = train_supernet(RECIPE, stop_after=1)
    assert state["precision"] == "float32"
    with pytest.raises(
        UserError, match="^this training began in bfloat16, which this worker's CPU"
    ):
        train_supernet(RECIPE, resume=state | {"precision": "bfloat16"})
    monkeypatch.setattr("nasray.training.loop.precisions", lambda device: ["float16", "float32"])
    assert agreed_precision("cuda", state) == "float32"
    assert agreed_precision("cpu", None) == "float16"
    with pytest.raises(UserError, match="bfloat16, which this worker's GPU does not compute"):
        agreed_precision("cuda", {"precision": "bfloat16"})


@pytest.mark.parametrize("distillation", [0.0, 0.5])
def test_weights_of_classes_count_the_same_however_a_batch_is_shared(distillation):
    generator = torch.Generator().manual_seed(0)
    logits, soft = torch.randn(2, 12, 4, generator=generator)
    labels = torch.tensor([0] * 9 + [1, 2, 3])
    recipe = replace(RECIPE, distillation=distillation)
    soft_labels = soft.softmax(1) if distillation else None
    weights = torch.tensor([0.5, 2.0, 1.5, 4.0])

    def loss(part: slice, weights: torch.Tensor | None) -> torch.Tensor:
        own = None if soft_labels is None else soft_labels[part]
        return loss_of(logits[part], labels[part], own, recipe, weights)

    parts = [slice(0, 6), slice(6, 12)]
    whole = loss(slice(0, 12), weights)
    torch.testing.assert_close(sum(loss(part, weights) for part in parts) / 2, whole)
    each = torch.stack([loss(slice(i, i + 1), None) for i in range(12)])
    torch.testing.assert_close((each * weights[labels]).mean(), whole)
    torch.testing.assert_close(loss(slice(0, 12), torch.ones(4)), loss(slice(0, 12), None))
