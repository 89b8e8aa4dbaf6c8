"""What two data-parallel workers send in a step of a supernet, and how long the step takes.

    python benchmarks/communication.py [--json FILE] [--side 64] [--batch 16] [--steps 12]

Ours sends the gradients of the subnet that a step trains, as slices of the stored weights. Beside
it: DistributedDataParallel of the whole supernet with find_unused_parameters, and a step that
sends nothing. Two processes on this machine, gloo, one thread each, the same architectures.
Bytes are counted where they are handed to all_reduce, not derived.
"""

import argparse
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from supernet_step import RECIPE
from table import Row, median_ratio, show
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from nasray.config import SpaceConfig
from nasray.data.transforms import normalize
from nasray.spaces import make_space
from nasray.spaces.population import as_architectures, random_population
from nasray.training.gradients import GradientAverager
from nasray.training.loop import clear_gradients, make_optimizer

WORKERS = 2
SPACES = ("shufflenet", "ofa_mobilenetv3")


class Whole(nn.Module):
    """A supernet as DistributedDataParallel wants it: everything it calls is forward()."""

    def __init__(self, supernet: nn.Module) -> None:
        super().__init__()
        self.supernet = supernet

    def forward(self, images, arch):
        return self.supernet(images, arch)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="of each worker")
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    rows = []
    for name in SPACES:
        with tempfile.TemporaryDirectory() as folder, torch.multiprocessing.Manager() as manager:
            results = manager.dict()
            arguments = (name, f"{folder}/rendezvous", options, results)
            torch.multiprocessing.spawn(work, arguments, nprocs=WORKERS)
            seconds, sent, parameters = results[0]
        where = f"{name}, {options.side} px, batch {WORKERS} x {options.batch}"
        aims = ("<= 0.35", "<= 0.8") if name == "shufflenet" else (None, None)
        rows += [
            Row(f"{where}: bytes sent a step", statistics.mean(sent["ours"]) / 1e6, "MB"),
            Row(f"{where}: the same, whole supernet", statistics.mean(sent["ddp"]) / 1e6, "MB"),
            Row(f"{name}: parameters of the whole supernet", parameters / 1e6, "MB"),
            Row(
                f"{name}: bytes sent, ours / whole supernet, mean",
                statistics.mean(sent["ours"]) / statistics.mean(sent["ddp"]),
                "ratio",
                aims[0],
            ),
            Row(f"{where}: a step", 1e3 * statistics.median(seconds["ours"]), "ms"),
            Row(
                f"{name}: a step, ours / DistributedDataParallel, median",
                median_ratio(seconds["ours"], seconds["ddp"]),
                "ratio",
                aims[1],
            ),
            Row(
                f"{name}: a step, ours / one that sends nothing, median",
                median_ratio(seconds["ours"], seconds["alone"]),
                "ratio",
            ),
        ]
    show(rows, options.json)


def work(rank, name, path, options, results):
    """One worker: the same step in four ways, in turn, on the same architectures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORKERS)
    sent = {"ours": [], "ddp": []}
    space = make_space(SpaceConfig(name=name, resolution=224), 1000)
    networks = {way: space.supernet() for way in ("ours", "ddp", "alone")}
    for network in networks.values():
        space.initialize(network, torch.Generator().manual_seed(0))
    wrapped = DistributedDataParallel(Whole(networks["ddp"]), find_unused_parameters=True)
    counting = [0]
    wrapped.register_comm_hook(None, allreduce_hook)  # as it does by itself, by dist.all_reduce
    optimizers = {way: make_optimizer(network, RECIPE) for way, network in networks.items()}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = 1e-4
    averager = GradientAverager(networks["ours"])
    generator = torch.Generator().manual_seed(rank)
    shape = (options.batch, 3, options.side, options.side)
    images = normalize(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
    labels = torch.randint(0, 1000, (options.batch,), generator=generator)
    drawn = random_population(space.genes, options.steps + 2, np.random.default_rng(0))
    all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        counting[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    def step(way, arch):
        torch.manual_seed(0)  # for dropout
        clear_gradients(optimizers[way])
        if way == "ddp":
            logits = wrapped(images, arch)
        else:
            logits = networks[way](images, arch)
        if way == "ours":
            averager.begin(lambda: networks[way].slices_of(arch))
        F.cross_entropy(logits, labels).backward()
        if way == "ours":
            averager.finish()
        optimizers[way].step()

    seconds = {way: [] for way in networks}
    dist.all_reduce = counted
    for number, arch in enumerate(as_architectures(drawn)):
        for way in networks:
            dist.barrier()
            counting[0] = 0
            started = time.perf_counter()
            step(way, arch)
            if number >= 2:  # untimed: DistributedDataParallel rebuilds its buckets after the first
                seconds[way].append(time.perf_counter() - started)
                if way in sent:
                    sent[way].append(counting[0])
        if number == 0:  # later ones decay and move weights that ours leaves alone
            check_same_gradients(networks["ours"], networks["ddp"])
    parameters = sum(param.numel() * param.element_size() for param in networks["ddp"].parameters())
    results[rank] = seconds, sent, parameters
    dist.destroy_process_group()


def check_same_gradients(ours, ddp):
    for param, other in zip(ours.parameters(), ddp.parameters(), strict=True):
        if param.grad is not None:
            torch.testing.assert_close(param.grad, other.grad, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    main()
