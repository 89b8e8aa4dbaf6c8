"""A training step of the sliced supernet, beside its extracted subnet and a masked supernet.

    python benchmarks/supernet_step.py [--json FILE] [--archs 8] [--repeats 15] [--side 64]

One process, one batch, one thread. The masked form is the original's: the widest block,
its middle channels multiplied by a 0/1 mask before BN (OneShot 1.7), with images channels
first as the original has them, and once more channels last as nasray has them. What
slicing alone can save is bounded by the ratio of the multiply-accumulates.
"""

import argparse
import statistics

import numpy as np
import torch
from table import Row, interleaved, median_ratio, show
from torch.nn import functional as F

from nasray.costs.table import CostTable
from nasray.data.transforms import normalize
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.shufflenet import SCALES, ShuffleNet
from nasray.spaces.supernet import build_subnet
from nasray.training.loop import Recipe, clear_gradients, make_optimizer

RECIPE = Recipe(
    epochs=1,
    learning_rate=0.1,
    warmup_epochs=0,
    momentum=0.9,
    weight_decay=3e-5,
    label_smoothing=0.1,
)


def stepper(network, forward, images, labels):
    """One whole training step: forward, backward, optimiser."""
    optimizer = make_optimizer(network.train(), RECIPE)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4

    def step():
        clear_gradients(optimizer)
        F.cross_entropy(forward(images), labels, label_smoothing=0.1).backward()
        optimizer.step()

    return step


def masked_network(space, arch):
    """The chosen operations at full width, masked to the widths of `arch` before BN."""
    wide = tuple(len(SCALES) - 1 if index % 2 else gene for index, gene in enumerate(arch))
    network = build_subnet(space.decode(wide))
    space.initialize(network, torch.Generator().manual_seed(0))
    for row in space.decode(arch)[1:-1]:
        main = getattr(network, row.name).main
        convs = (main.conv1, main.conv3) if row.op == "xception3" else (main.conv0,)
        for conv in convs:
            mask = torch.zeros(1, conv.out_channels, 1, 1)
            mask[:, : row.mid_channels] = 1
            conv.register_forward_hook(lambda module, inputs, output, mask=mask: output * mask)
    return network


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--archs", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    space = ShuffleNet(num_classes=10, resolution=options.side)
    shape = (options.batch, 3, options.side, options.side)
    images = normalize(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))
    labels = torch.randint(0, 10, (options.batch,), generator=generator)
    supernet = space.supernet()
    space.initialize(supernet, generator)
    rng = np.random.default_rng(0)
    archs = random_population(space.genes, options.archs, rng)
    ratios: dict[str, list[float]] = {"subnet": [], "masked": [], "masked, channels last": []}
    seconds = []
    for arch in as_architectures(archs):
        subnet, masked = supernet.extract(arch), masked_network(space, arch)
        times = interleaved(
            {
                "supernet": stepper(
                    supernet, lambda batch, arch=arch: supernet(batch, arch), images, labels
                ),
                "subnet": stepper(subnet, subnet, images, labels),
                "masked": stepper(masked, masked, images.contiguous(), labels),
                "masked, channels last": stepper(masked, masked, images, labels),
            },
            options.repeats,
        )
        for name, found in ratios.items():
            found.append(median_ratio(times[name], times["supernet"]))
        seconds.append(statistics.median(times["supernet"]))
    table = CostTable(space)
    wide = archs.copy()
    wide[:, 1::2] = len(SCALES) - 1
    macs = table(wide)["macs"] / table(archs)["macs"]
    where = f"{options.side} px, batch {options.batch}, 1 thread, {options.archs} architectures"
    show(
        [
            Row(f"supernet step, {where}", statistics.median(seconds) * 1e3, "ms"),
            Row(
                "supernet step / extracted subnet's step, median",
                1 / statistics.median(ratios["subnet"]),
                "ratio",
                "<= 1.05",
            ),
            Row(
                "masked full-width step / supernet step, mean",
                statistics.mean(ratios["masked"]),
                "ratio",
                ">= 1.7",
            ),
            Row(
                "the same, masked form channels last too, mean",
                statistics.mean(ratios["masked, channels last"]),
                "ratio",
            ),
            Row("MACs at full width / MACs of the subnet, mean", float(macs.mean()), "ratio"),
        ],
        options.json,
    )


if __name__ == "__main__":
    main()
