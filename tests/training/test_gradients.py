"""Averaging over data-parallel workers: what is sent, and that all workers trained the same."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from nasray.config import Limit, SpaceConfig, SupernetConfig
from nasray.search.limits import Limits
from nasray.spaces import make_space, space_by_name
from nasray.spaces.population import as_architectures, random_population
from nasray.training import gradients
from nasray.training.channels import sorting
from nasray.training.gradients import GradientAverager
from nasray.training.loop import fit, make_optimizer, make_scaler, train_epoch
from nasray.training.sampler import sample, sizes_of
from nasray.training.supernet import WorkersDifferError, check_same_on_all_workers, recipe_of

WORKERS = 2


def spawned(function, tmp_path, *arguments):
    """function(rank, *arguments) in two processes that reach each other; what they return."""
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        path = str(tmp_path / f"rendezvous-{function.__name__}")
        torch.multiprocessing.spawn(in_group, (function, path, results, *arguments), WORKERS)
        return [results[rank] for rank in range(WORKERS)]


def in_group(rank, function, path, results, *arguments):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORKERS)
    results[rank] = function(rank, *arguments)
    dist.destroy_process_group()


def averaged(rank, overlaps):
    """Gradients of two steps of a tiny supernet, and the numbers that were sent."""
    space = make_space(SpaceConfig(name="tiny", resolution=32), 4)
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    gradients.BUCKET_BYTES = 1 << 10  # several, though the network is tiny
    averager = GradientAverager(supernet)
    if overlaps:  # as on GPUs
        for param in supernet.parameters():
            param.register_post_accumulate_grad_hook(averager._computed)
    sent, all_reduce = [0], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sent[0] += tensor.numel()
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    drawn = random_population(space.genes, 2, np.random.default_rng(0))
    found = []
    for arch in as_architectures(drawn):
        supernet.zero_grad()
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
        averager.begin(lambda arch=arch: supernet.slices_of(arch))
        supernet.train()(images, arch).square().sum().backward()
        averager.finish()
        kept = [param.grad for param, _ in supernet.slices_of(arch)]
        found.append([grad.numpy().copy() for grad in kept])
    expected = sum(
        shape.numel() for arch in as_architectures(drawn) for _, shape in supernet.slices_of(arch)
    )
    return found, sent[0], expected, sum(param.numel() for param in supernet.parameters())


@pytest.mark.parametrize("overlaps", [False, True])
def test_workers_send_the_slices_that_a_step_uses_and_get_their_means(tmp_path, overlaps):
    (one, sent, expected, whole), (other, *_) = spawned(averaged, tmp_path, overlaps)
    for first, second in zip(one, other, strict=True):
        assert all(map(np.array_equal, first, second))
    assert sent == expected < 2 * whole

    alone = []  # the mean of both workers' gradients, without any communication
    space = make_space(SpaceConfig(name="tiny", resolution=32), 4)
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    for arch in as_architectures(random_population(space.genes, 2, np.random.default_rng(0))):
        supernet.zero_grad()
        for rank in range(WORKERS):
            images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(rank))
            (supernet.train()(images, arch).square().sum() / WORKERS).backward()
        alone.append([param.grad.numpy().copy() for param, _ in supernet.slices_of(arch)])
    for first, second in zip(one, alone, strict=True):
        for found, wanted in zip(first, second, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


SAME_OPS = [(0, 2) * 3, (0, 0) * 3, (0, 1) * 3]
OTHER_OPS = [(0, 2) * 3, (1, 0, 0, 0, 0, 0), (1, 1) * 3]


def averaged_step(rank, archs, overlaps=False):
    """Gradients, by name, of a step of several subnets on this worker's images."""
    space = make_space(SpaceConfig(name="tiny", resolution=32), 4)
    supernet = space.supernet().train()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    gradients.BUCKET_BYTES = 1  # one for each weight: sent as early as can be
    averager = GradientAverager(supernet)
    if overlaps:
        for param in supernet.parameters():
            param.register_post_accumulate_grad_hook(averager._computed)
    generator = torch.Generator().manual_seed(rank)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    recipe = recipe_of(SupernetConfig())
    train_epoch(
        lambda step: [partial(supernet, arch=arch) for arch in archs],
        [(images, torch.arange(4))],
        make_optimizer(supernet, recipe),
        make_scaler("cpu"),
        recipe,
        epoch=0,
        num_steps=1,
        device="cpu",
        averager=averager,
        slices=lambda step: gradients.union(supernet.slices_of(arch) for arch in archs),
    )
    return {
        name: None if param.grad is None else param.grad.numpy().copy()
        for name, param in supernet.named_parameters()
    }


@pytest.mark.parametrize(
    ("archs", "overlaps"), [(OTHER_OPS, False), (OTHER_OPS, True), (SAME_OPS, True)]
)
def test_a_step_of_several_subnets_is_averaged_once_over_what_they_use(tmp_path, archs, overlaps):
    one, other = spawned(averaged_step, tmp_path, archs, overlaps)
    alone = [averaged_step(rank, archs) for rank in range(WORKERS)]
    touched = {name for name, grad in one.items() if grad is not None}
    assert touched == {name for name, grad in alone[0].items() if grad is not None}
    for name in touched:
        assert np.array_equal(one[name], other[name])
        mean = sum(grads[name] for grads in alone) / WORKERS
        np.testing.assert_allclose(one[name], mean, rtol=1e-4, atol=1e-5)


def compared(rank, digests):
    try:
        check_same_on_all_workers(digests[rank], "cpu")
    except WorkersDifferError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("digests, said", [((b"same", b"same"), ""), ((b"one", b"two"), "drew")])
def test_workers_find_out_if_they_trained_different_architectures(tmp_path, digests, said):
    for message in spawned(compared, tmp_path, digests):
        assert said in message and bool(message) is bool(said)


AT_ONCE = {
    "epochs": 2,
    "warmup_epochs": 0,
    "momentum": 0.5,
    "channel_warmup_start": 0,
    "channel_warmup_epochs": 0,
}
TINY, MACRO = {"name": "tiny", "resolution": 32}, {"name": "nasbench_macro", "resolution": 8}
BAND = (Limit(cost="macs", min=1.5e6, max=4e6),)


def trained(rank, space, values):
    """The weights, by name, after two epochs of three steps on this worker's share of images."""
    space, config = space_by_name(num_classes=4, **space), SupernetConfig(**AT_ONCE | values)
    bands = [Limits(space, BAND)] if config.sampling == "banded" else []
    supernet = space.supernet()
    space.initialize(supernet, torch.Generator().manual_seed(0))
    # In eval mode always: what BN takes from a batch differs by the worker's share.
    supernet.train = lambda mode=True: torch.nn.Module.train(supernet, False)
    side = space.resolution
    share = slice(rank, None, dist.get_world_size() if dist.is_initialized() else 1)
    images = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 8, 3, side, side), generator=images, dtype=torch.uint8)
    labels = torch.arange(8) % 4

    def archs(epoch, step):
        return sample(space, config, seed=0, epoch=epoch, step=step, bands=bands)

    fit(
        supernet,
        lambda epoch, step: [partial(supernet, arch=arch) for arch in archs(epoch, step)],
        recipe_of(config),
        batches=lambda epoch: [(batch[share], labels[share]) for batch in images],
        sizes=lambda epoch, step: sizes_of(space, archs(epoch, step)),
        begin_epoch=lambda epoch: sorting(supernet, config, epoch),
        slices=lambda epoch, step: gradients.union(map(supernet.slices_of, archs(epoch, step))),
        validate=lambda epoch: {},
        report=lambda curves, state: None,
        resume=None,
        device="cpu",
        seed=0,
    )
    return {name: param.detach().numpy().copy() for name, param in supernet.named_parameters()}


WAYS = [
    (TINY, {"sampling": "uniform"}),
    (TINY, {"sampling": "sandwich", "distillation": 0.5, "distillation_loss": "alpha"}),
    (TINY, {"sampling": "progressive", "channel_warmup_epochs": 2}),
    (MACRO, {"sampling": "fair", "clip_gradient_norm": 0.5}),
    (MACRO, {"sampling": "fair", "rank_loss": 2.0, "schedule": "complexity"}),
    (MACRO, {"sampling": "banded"}),
]


def trained_in_every_way(rank, rate):
    return [trained(rank, space, {**values, "learning_rate": rate}) for space, values in WAYS]


def test_two_workers_end_with_the_weights_of_one_in_every_way_of_training(tmp_path):
    workers = spawned(trained_in_every_way, tmp_path, 0.05)
    alone, initial = (trained_in_every_way(0, rate) for rate in (0.05, 1e-12))
    for way, one, other, wanted, before in zip(WAYS, *workers, alone, initial, strict=True):
        assert max(np.abs(wanted[name] - before[name]).max() for name in wanted) > 1e-3, way
        for name, weight in wanted.items():
            assert np.array_equal(one[name], other[name]), (way, name)
            np.testing.assert_allclose(one[name], weight, rtol=1e-3, atol=1e-5, err_msg=name)
