"""What two data-parallel workers send in a step of a supernet, and how long the step takes.

    python benchmarks/communication.py [--json FILE] [--side 64] [--batch 16] [--steps 12]

Ours sends the gradients of the subnet that a step trains, as slices of the stored weights. Beside
it: DistributedDataParallel of the whole supernet with find_unused_parameters, and a step that
sends nothing. Two processes on this machine, gloo, one thread each, the same architectures.
Each way has processes of its own: oneDNN builds its kernels when it first meets a shape, which
whoever meets it first would pay for all (half of a forward pass here). The ways take turns.
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
WAYS = ("ours", "ddp", "alone")
ROUNDS = 2
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
        seconds, sent, parameters = measure(name, options)
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


def measure(name, options):
    """Seconds of each step and bytes that it sent, by way, and the bytes of all parameters."""
    seconds, sent = {way: [] for way in WAYS}, {way: [] for way in WAYS}
    for _ in range(ROUNDS):
        gradients = {}
        for way in WAYS:
            with tempfile.TemporaryDirectory() as folder:
                arguments = (name, way, folder, options)
                torch.multiprocessing.spawn(work, arguments, nprocs=WORKERS)
                found = torch.load(f"{folder}/found.pt")
            seconds[way] += found["seconds"]
            sent[way] += found["sent"]
            gradients[way] = found["gradients"]
        check_same_gradients(gradients["ours"], gradients["ddp"])
    return seconds, sent, found["parameters"]


def work(rank, name, way, folder, options):
    """One worker: the steps in one way."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORKERS)
    space = make_space(SpaceConfig(name=name, resolution=224), 1000)
    network = space.supernet()
    space.initialize(network, torch.Generator().manual_seed(0))
    forward = network
    if way == "ddp":
        forward = DistributedDataParallel(Whole(network), find_unused_parameters=True)
        forward.register_comm_hook(None, allreduce_hook)  # as by itself, by dist.all_reduce
    optimizer = make_optimizer(network, RECIPE)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    averager = GradientAverager(network)
    generator = torch.Generator().manual_seed(rank)
    shape = (options.batch, 3, options.side, options.side)
    images = normalize(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
    labels = torch.randint(0, 1000, (options.batch,), generator=generator)
    drawn = random_population(space.genes, options.steps + 2, np.random.default_rng(0))
    counting = [0]
    all_reduce = dist.all_reduce

    def counted(tensor, *args, **kwargs):
        counting[0] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    def step(arch):
        torch.manual_seed(0)  # for dropout
        clear_gradients(optimizer)
        logits = forward(images, arch)
        if way == "ours":
            averager.begin(lambda: network.slices_of(arch))
        F.cross_entropy(logits, labels).backward()
        if way == "ours":
            averager.finish()
        optimizer.step()

    dist.all_reduce = counted
    seconds, sent, gradients = [], [], []
    for number, arch in enumerate(as_architectures(drawn)):
        dist.barrier()
        counting[0] = 0
        started = time.perf_counter()
        step(arch)
        if number >= 2:  # untimed: DistributedDataParallel rebuilds its buckets after the first
            seconds.append(time.perf_counter() - started)
            sent.append(counting[0])
        if number == 0:  # later ones decay and move weights that ours leaves alone
            gradients = [param.grad for param in network.parameters()]
            gradients = [None if grad is None else grad.clone() for grad in gradients]
    if rank == 0:
        parameters = sum(param.numel() * param.element_size() for param in network.parameters())
        found = {"seconds": seconds, "sent": sent, "gradients": gradients, "parameters": parameters}
        torch.save(found, f"{folder}/found.pt")
    dist.destroy_process_group()


def check_same_gradients(ours, ddp):
    for grad, other in zip(ours, ddp, strict=True):
        if grad is not None:
            torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    main()
