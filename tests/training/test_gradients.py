"""Averaging over data-parallel workers: what is sent, and that all workers trained the same."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from nasray.config import SpaceConfig
from nasray.spaces import make_space
from nasray.spaces.population import as_architectures, random_population
from nasray.training import gradients
from nasray.training.gradients import GradientAverager
from nasray.training.supernet import WorkersDifferError, check_same_on_all_workers

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
