"""What a full ImageNet job would take and cost on 1, 8, 64 and 512 GPUs: a model, not a run.

    python benchmarks/scale.py [--quick] [--json FILE] [--card t4] [--training-gpus 16] ...

The job is jobs/oneshot_imagenet.toml with steady-state search. Measured here, in CPU time of one
thread so that other programs disturb it little: passes of the network, decoding. All else is in
ASSUMPTIONS, each an option. GPUs are taken to be bound by their memory, all at the rates measured
on one H200 (benchmarks/on_gpu.py): MACs of a forward pass for each byte that the card's memory
could move meanwhile, by its data sheet. EfficientNet-B0 trains on Titan RTX, V100 and RTX 3090 at
0.67 to 0.68 (timm's author, gist bb59f9e245162cee0e38bd66bd8cd77f).
"""

import argparse
import heapq
import io
import math
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from table import Row, show
from torch.nn import functional as F

from nasray.config import load_job
from nasray.costs.table import CostTable
from nasray.data.decoding import decode
from nasray.data.importing import ROW_GROUP_BYTES, write_shards
from nasray.data.loader import train_batches
from nasray.data.shards import open_dataset
from nasray.data.source import Pictures, Record
from nasray.data.transforms import eval_transform, normalize
from nasray.evaluation.evaluate import correct_mask, fold_bn, recalibrate_bn
from nasray.search.limits import Limits
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.shufflenet import PUBLISHED, SCALES, ShuffleNet
from nasray.training.sampler import sample

JOB = load_job(str(Path(__file__).parent.parent / "jobs" / "oneshot_imagenet.toml"))
SIDE = JOB.space.resolution
HOLDOUT = 1000 * JOB.data.holdout_per_class
IMAGES = 1_281_167 - HOLDOUT  # of ImageNet, to train on
CLUSTERS = (1, 8, 64, 512)
ROUNDS = 6  # of each measurement, of which the quickest counts

# Data sheets of the cards; their instances at AWS, us-east-1, on demand: g4dn.12xlarge,
# g6.12xlarge, p3.8xlarge, p4d.24xlarge (since June 2025).
CARD_KEYS = ("bandwidth", "tflops", "gpus_per_node", "vcpus", "network", "dollars")
CARDS = {
    "t4": dict(zip(CARD_KEYS, (320, 65, 4, 12, 50, 3.912 / 4), strict=True)),
    "l4": dict(zip(CARD_KEYS, (300, 121, 4, 12, 40, 4.602 / 4), strict=True)),
    "v100": dict(zip(CARD_KEYS, (900, 125, 4, 8, 10, 12.24 / 4), strict=True)),
    "a100": dict(zip(CARD_KEYS, (1555, 312, 8, 12, 400, 21.958 / 8), strict=True)),
}

# Option, value (None: the card's, or measured here), unit, kind, source.
ASSUMPTIONS = (
    ("bandwidth", None, "GB/s", "published", "a card's memory, data sheet"),
    ("tflops", None, "TFLOPS", "published", "fp16 peak, the same; shown, not used"),
    ("gpus_per_node", None, "GPUs", "published", "the card's instance, see CARDS"),
    ("vcpus", None, "a GPU", "published", "the same"),
    ("network", None, "Gb/s a node", "published", "the same"),
    ("dollars", None, "a GPU-hour", "published", "the same, on demand"),
    ("training_macs", 0.47, "MACs/byte", "measured", "an H200, batch 1,024: docs/results.md"),
    ("evaluation_macs", 1.5, "MACs/byte", "measured", "the same card, batch 250"),
    ("recalibration", 1.47, "evaluations", "measured", "of an image: the same card, batch 250"),
    ("dispatch_ms", None, "ms a step", "measured", "2 images of 32 px: mostly Python"),
    ("decode_training", None, "a core-second", "measured", "JPEGs of 500 x 375, augmented"),
    ("decode_crops", None, "a core-second", "measured", "the same, evaluation crop"),
    ("vcpu_share", 0.6, "cores", "assumed", "a vCPU is a hyper-thread"),
    ("loader_workers", JOB.data.loader_workers, "a GPU", "the job's", "[data]"),
    ("image_kb", 108, "KB", "published", "ImageNet: 138 GB of training images"),
    ("rereads", 0.05, "a process", "published", "row groups read again, nasray/data/loader.py"),
    ("storage", 0.5, "GB/s a GPU", "assumed", "object store or shared folder"),
    ("network_share", 0.7, "of its rate", "assumed", "all-reduce, also inside a node"),
    ("hop_us", 20, "us", "assumed", "each of the ring's 2 (n - 1) hops"),
    ("epoch_s", 10, "s an epoch", "assumed", "checkpoint, new loader processes"),
    ("startup_s", 300, "s", "assumed", "from asking for a node until it works"),
    ("training_gpus", 16, "GPUs", "chosen", "or all, of a smaller cluster"),
    ("failures", 2.2e-5, "a GPU-hour", "published", "Llama 3: 466 in 54 days of 16,384 GPUs"),
    ("training_price", 1.0, "of on demand", "chosen", "training on demand"),
    ("spot_price", 0.4, "of on demand", "assumed", "evaluators; it changes by the hour"),
    ("spot_losses", 0.02, "an hour", "assumed", "of an evaluator; AWS: mostly below 0.2 a month"),
    ("head_dollars", 0.384, "an hour", "published", "the driver's node, m5.2xlarge"),
    ("candidates", 1000, "", "the job's", "population x generations"),
    ("calibration", JOB.search.calibration_images, "images", "the job's", "of a candidate"),
    ("lag", 100, "candidates", "chosen", "under way at once"),
    ("sigma", 0.3, "", "assumed", "log-normal spread of evaluations, as for benchmarks/pool.py"),
    ("driver_ms", 3.0, "ms", "measured", "python benchmarks/pool.py --steady-only --sigma 0.3"),
)

CHANGES = (  # for the sensitivity table
    ("as above", {}),
    ("GPUs as MobileNetV2 in timm", {"training_macs": 0.77, "evaluation_macs": 3.2}),
    ("GPUs as the published original's", {"training_macs": 0.15, "evaluation_macs": 0.32}),
    ("L4 cards", CARDS["l4"]),
    ("A100 cards, training on 8", CARDS["a100"] | {"training_gpus": 8}),
    ("the same, data copied to their disks", CARDS["a100"] | {"training_gpus": 8, "storage": 2}),
    ("T4 cards, data copied to their nodes' disks", {"storage": 2}),
    ("training on 8 GPUs", {"training_gpus": 8}),
    ("training on 64 GPUs", {"training_gpus": 64}),
    ("training on spot, a loss in 200 GPU-hours", {"training_price": 0.4, "failures": 0.005}),
    ("decoding half as quick", {"vcpu_share": 0.3}),
    ("storage of 0.1 GB/s a GPU", {"storage": 0.1}),
    ("nodes start in 15 minutes", {"startup_s": 900}),
    ("lag 16", {"lag": 16}),
    ("2,000 calibration images", {"calibration": 2000}),
    ("spot losses 0.2 an hour", {"spot_losses": 0.2}),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--quick", action="store_true", help="a quarter of the measurements")
    parser.add_argument("--card", choices=CARDS, default="t4")
    for name, value, unit, _, source in ASSUMPTIONS:
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=value, help=f"{unit}: {source}")
    options = parser.parse_args()
    nets = count_networks()
    measured, rows = measure(nets, 2 if options.quick else 8)
    known = measured | CARDS[options.card]
    given = {name: getattr(options, name) for name, *_ in ASSUMPTIONS}
    a = SimpleNamespace(**{k: known[k] if v is None else v for k, v in given.items()})
    show(rows + conclude(a, nets), options.json)
    own = any(getattr(options, key) is not None for key in CARD_KEYS)
    print_tables(a, nets, f"cards of {a.bandwidth:g} GB/s" if own else f"{options.card} cards")


# ---- Counted and measured here.


def count_networks():
    """Mean MACs of what each stage runs, and the parameters whose gradients are averaged."""
    space, rng = ShuffleNet(resolution=SIDE), np.random.default_rng(0)
    table = CostTable(space)
    drawn = [
        np.array([sample(space, JOB.supernet, seed=0, epoch=e, step=s)[0] for s in range(50)])
        for e in range(JOB.supernet.epochs)
    ]
    feasible = np.array(Limits(space, JOB.search.limits).draw(500, rng, set()))
    winner = table(np.stack(PUBLISHED["oneshot-s+"], axis=1).reshape(1, -1))
    return SimpleNamespace(
        space=space,
        schedule=[float(table(epoch)["macs"].mean()) for epoch in drawn],
        supernet_params=float(table(np.concatenate(drawn))["params"].mean()),
        validated=float(table(random_population(space.genes, 500, rng))["macs"].mean()),
        candidate=float(table(feasible)["macs"].mean()),
        winner=float(winner["macs"][0]),
        winner_params=float(winner["params"][0]),
    )


def measure(nets, repeats):
    """What the model takes from this machine, and the rows that show it."""
    torch.set_num_threads(1)
    spent, macs = time_passes(nets.space, repeats, side=SIDE, size=8)
    small, _ = time_passes(nets.space, repeats, side=32, size=2)
    decoding, kilobytes = time_decoding(20 * repeats)
    nets.kept = kept_bytes(nets.space, repeats)
    step = spent["forward"] + spent["backward"]
    measured = {
        "dispatch_ms": 2e3 * (small["forward"] + small["backward"]),
        "decode_training": 1 / decoding["augmented"],
        "decode_crops": 1 / decoding["cropped"],
    }
    cores = IMAGES * (sum(nets.schedule) + JOB.retrain.epochs * nets.winner) * step / macs
    return measured, [
        Row("MACs an image, supernet training, mean", np.mean(nets.schedule) / 1e6, "M"),
        Row("MACs of a candidate, mean of 500 in the limits", nets.candidate / 1e6, "M"),
        Row("supernet, random architectures: forward, backward", 1e3 * step, "ms/image"),
        Row("backward / forward", spent["backward"] / spent["forward"], "ratio"),
        Row("extracted subnet: BN recalibration", 1e3 * spent["recalibration"], "ms/image"),
        Row("extracted subnet: evaluation", 1e3 * spent["evaluation"], "ms/image"),
        Row("forward, backward / evaluation (timm: 4.1)", step / spent["evaluation"], "ratio"),
        Row("forward, backward of 2 images of 32 px", measured["dispatch_ms"], "ms"),
        Row(f"JPEGs of {kilobytes:.0f} KB, augmented", measured["decode_training"], "images/s"),
        Row("the same, evaluation crop", measured["decode_crops"], "images/s"),
        Row("kept of an image for the backward pass, full width, fp16", nets.kept / 1e6, "MB"),
        Row("both trainings on such cores alone", cores / 3.156e7, "core-years"),
    ]


def time_passes(space, repeats, *, side, size):
    """CPU seconds an image of each kind of pass, at random architectures, and their MACs."""
    generator = torch.Generator().manual_seed(0)
    supernet = space.supernet()
    space.initialize(supernet, generator)
    drawn = random_population(space.genes, repeats, np.random.default_rng(0))
    archs = as_architectures(drawn)
    pixels = torch.randint(0, 256, (size, 3, side, side), generator=generator, dtype=torch.uint8)
    batch, pixels = normalize(pixels), pixels.numpy()
    labels, whole = torch.arange(size), {"batch_size": size}
    rounds = []
    for _ in range(ROUNDS):
        rounds.append(spent := Counter())
        for arch in archs:
            logits = timed(spent, "forward", supernet.train(), batch, arch)
            timed(spent, "backward", F.cross_entropy(logits, labels).backward)
            supernet.zero_grad()
            subnet = supernet.extract(arch).eval()
            timed(spent, "recalibration", partial(recalibrate_bn, **whole), subnet, pixels)
            fold_bn(subnet)
            timed(
                spent, "evaluation", partial(correct_mask, **whole), subnet, pixels, labels.numpy()
            )
    return quickest(rounds, repeats * size), CostTable(space)(drawn)["macs"].mean()


def kept_bytes(space, number):
    """What a full-width network keeps of an image until the backward pass, in fp16, at most."""
    supernet, batch, kept = space.supernet(), torch.zeros(2, 3, SIDE, SIDE), []
    weights = {param.untyped_storage().data_ptr() for param in supernet.parameters()}
    drawn = random_population(space.genes, number, np.random.default_rng(0))
    drawn[:, 1::2] = len(SCALES) - 1

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for arch in as_architectures(drawn):
        found = {}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = supernet(batch, arch)
        kept.append(sum(size for place, size in found.items() if place not in weights))
        del logits  # until here, so that no memory is used twice
    return max(kept) / len(batch) / 2


def time_decoding(number):
    """CPU seconds an image, as loaders and as evaluators decode it, and its KB."""
    every, crop, rounds = np.arange(number), eval_transform(SIDE), []
    records = (Record("train", 0, f"{i}.jpg", partial(draw_picture, i)) for i in range(number))
    about = {"source": "noise", "seed": 0, "options": {}, "show": lambda done, total: None}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(folder, Pictures(("noise",), number, records), **about)
        dataset = open_dataset(folder)
        config = JOB.data.model_copy(update={"loader_workers": 0})  # in this process
        whole = {"batch_size": 20, "rank": 0, "world_size": 1, "seed": 0, "epoch": 0}
        batches = train_batches(dataset, every, config, resolution=SIDE, **whole)
        encoded = dataset.read("train", every)
        for _ in range(ROUNDS):
            rounds.append(spent := Counter())
            timed(spent, "augmented", lambda: [len(images) for images, _ in batches])
            timed(spent, "cropped", lambda: [crop(decode(image)) for image in encoded])
        return quickest(rounds, number), dataset.image_bytes("train") / number / 1e3


def quickest(rounds, number):
    """Seconds of each kind for one of so many; what else runs can only slow a round down."""
    return {name: min(spent[name] for spent in rounds) / number for name in rounds[0]}


def timed(spent, name, call, *arguments):
    started = time.process_time()
    result = call(*arguments)
    spent[name] += time.process_time() - started
    return result


def draw_picture(seed):
    """Noise of four scales, 500 x 375: about the bytes of one of ImageNet's photographs."""
    rng, total = np.random.default_rng(seed), np.full((375, 500, 3), 128.0)
    for cells, strength in ((4, 40), (16, 25), (64, 33), (256, 33)):
        coarse = rng.normal(128, strength, (cells * 3 // 4, cells, 3)).clip(0, 255)
        picture = Image.fromarray(coarse.astype(np.uint8))
        total += np.asarray(picture.resize((500, 375), Image.Resampling.BICUBIC)) - 128.0
    buffer = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ---- The model: seconds, bytes, images; `a` are the assumptions.


def step_seconds(a, gpus, macs, params, batch):
    """Seconds of a training step, and what it waits for. Loading and computing overlap."""
    cores = min(a.loader_workers, a.vcpus) * a.vcpu_share
    reads = 1 + a.rereads * min(gpus * a.loader_workers, batch)  # of each row group, an epoch
    loading = 1 / cores / a.decode_training + a.image_kb * 1e3 * reads / (a.storage * 1e9)
    waits = {
        "GPU": batch / gpus * macs / (a.training_macs * a.bandwidth * 1e9),
        "Python": a.dispatch_ms / 1e3,
        "loading": batch / gpus * loading,
    }
    longest = max(waits, key=waits.get)
    ring_rate = a.network / 8 * 1e9 * a.network_share
    ring = 2 * (gpus - 1) * (4 * params / gpus / ring_rate + a.hop_us / 1e6)
    return waits[longest] + ring, longest if waits[longest] > ring else "network"


def forward_seconds(a, macs, images, recalibrate=0):
    """Evaluation on so many images, after recalibration on some others."""
    image = macs / (a.evaluation_macs * a.bandwidth * 1e9)
    return image * (images + recalibrate * a.recalibration)


def ready_seconds(a, gpus, *kinds):
    """From asking for a node until so many images of each kind are decoded on it."""
    gpus = min(gpus, a.gpus_per_node)
    groups = IMAGES * a.image_kb * 1e3 / ROW_GROUP_BYTES
    touched = sum(groups * (1 - (1 - 1 / groups) ** number) for number in kinds)
    read = touched * ROW_GROUP_BYTES / (gpus * a.storage * 1e9)
    return a.startup_s + read + sum(kinds) / (gpus * a.vcpus * a.vcpu_share * a.decode_crops)


def trained(a, gpus, epochs, *kinds):
    """(GPUs, hours, dollars) of a training; a lost worker costs half an epoch and a node."""
    ready = ready_seconds(a, gpus, *kinds)
    seconds = ready + sum(epochs)
    seconds += a.failures * gpus * seconds / 3600 * (ready + sum(epochs) / len(epochs) / 2)
    return gpus, seconds / 3600, seconds / 3600 * gpus * a.dollars * a.training_price


def train_supernet(a, nets, gpus):
    some, batch = JOB.supernet.val_calibration_images, JOB.supernet.batch_size
    shared = math.ceil(JOB.supernet.num_val_archs / gpus)  # validated by the busiest worker
    rest = shared * forward_seconds(a, nets.validated, HOLDOUT, some) + a.epoch_s
    steps = [step_seconds(a, gpus, m, nets.supernet_params, batch)[0] for m in nets.schedule]
    return trained(a, gpus, [IMAGES // batch * step + rest for step in steps], some, HOLDOUT)


def retrain(a, nets, gpus):
    batch = JOB.retrain.batch_size
    rest = forward_seconds(a, nets.winner, HOLDOUT) + a.epoch_s  # every worker judges them all
    step = step_seconds(a, gpus, nets.winner, nets.winner_params, batch)[0]
    return trained(a, gpus, JOB.retrain.epochs * [IMAGES // batch * step + rest], HOLDOUT)


def search(a, nets, gpus, generations=False):
    gpus = int(min(gpus, 50 if generations else a.lag))  # the pool starts as many as have work
    hours = simulate(a, evaluation_seconds(a, nets), gpus, generations)[0] / 3600
    return gpus, hours, hours * gpus * a.dollars * a.spot_price


def evaluation_seconds(a, nets):
    return forward_seconds(a, nets.candidate, HOLDOUT, a.calibration)


def simulate(a, mean, evaluators, generations=False):
    """A search, evaluation by evaluation: (seconds, share of their time evaluators are busy).

    Steady: candidate n waits until 0 ... n - lag are told, in order. Generations: of 50 first,
    then 36 new ones each, as about 14 of the published genetic search stay parents.
    """
    rng, ready = np.random.default_rng(0), ready_seconds(a, evaluators, a.calibration, HOLDOUT)
    free, told, done, spans, born = [ready] * evaluators, 0.0, [], [], 0
    for position in range(int(a.candidates)):
        if generations and position == born + (36 if born else 50):
            born = position
        needed = born if generations else max(position - int(a.lag) + 1, 0)  # results
        begin = done[needed - 1] if needed else 0.0
        while True:
            begin = max(heapq.heappop(free), begin)
            seconds = mean * rng.lognormal(-(a.sigma**2) / 2, a.sigma)
            if rng.random() > a.spot_losses * seconds / 3600:
                break
            begin += seconds / 2  # half an evaluation for nothing, then a new node
            heapq.heappush(free, begin + ready)
        heapq.heappush(free, begin + seconds)
        spans.append((begin, begin + seconds))
        told = max(told, begin + seconds) + a.driver_ms / 1e3
        done.append(told)
    inside = sum(min(end, begin) - started for started, end in spans)
    return told, inside / evaluators / max(begin - ready, 1e-9)


def plan(a, nets, size):
    """On a cluster of so many GPUs: {stage: (GPUs, hours, dollars)}, hours and dollars in all."""
    gpus = int(min(size, a.training_gpus))
    stages = {
        "supernet": train_supernet(a, nets, gpus),
        "search": search(a, nets, size),
        "retraining": retrain(a, nets, gpus),
    }
    hours = sum(hours for _, hours, _ in stages.values())
    return stages, hours, sum(paid for *_, paid in stages.values()) + hours * a.head_dollars


def changed(a, **values):
    return SimpleNamespace(**vars(a) | values)


# ---- What is printed.


def conclude(a, nets):
    """The model beside what was measured or published, one card, and the sums."""
    many = changed(a, candidates=8000, lag=4000, sigma=0.3, spot_losses=0)
    v100, rate = changed(a, **CARDS["v100"]), a.training_macs * a.bandwidth * 1e9
    ready = ready_seconds(a, a.gpus_per_node, a.calibration, HOLDOUT)
    after = forward_seconds(a, nets.winner, HOLDOUT)
    rows = [
        Row(
            "simulated: busy, 1,000 evaluators (pool.py, sigma 0.3: 0.994)",
            simulate(many, 5, 1000)[1],
            "",
        ),
        Row("4 V100, supernet (published: 100)", train_supernet(v100, nets, 4)[1], "h"),
        Row("4 V100, retraining (published: 90)", retrain(v100, nets, 4)[1], "h"),
        Row("V100, evaluation (published: at most 73)", evaluation_seconds(v100, nets), "s"),
        Row("a card, supernet training, never waiting", rate / np.mean(nets.schedule), "images/s"),
        Row("the same, share of the card's fp16 peak", 6 * rate / a.tflops / 1e12, ""),
        Row("a card, evaluation of a candidate", evaluation_seconds(a, nets), "s"),
        Row("a node, from asking for it until its evaluators are ready", ready, "s"),
        Row("validation after an epoch of retraining, on any number of cards", after, "s"),
    ]
    for size in CLUSTERS:
        _, hours, dollars = plan(a, nets, size)
        rows += [Row(f"{size} GPUs, whole job", hours, "h"), Row("its cost", dollars, "$")]
    return rows


def print_tables(a, nets, card):
    """The assumptions and what follows from them, in Markdown."""
    named = ((f"--{name.replace('_', '-')}", name, rest) for name, _, *rest in ASSUMPTIONS)
    rows = [(option, f"{getattr(a, name):.6g}", *rest) for option, name, rest in named]
    print_table("Assumptions", "option | value | unit | kind | source", rows)

    rows = []
    for size in CLUSTERS:
        stages, hours, dollars = plan(a, nets, size)
        for name, (used, spent, paid) in stages.items():
            rows.append((size, name, used, f"{spent:.1f}", f"{used * spent:,.0f}", f"{paid:,.0f}"))
        total = sum(used * spent for used, spent, _ in stages.values())
        rows.append((size, "in all", "", f"{hours:.1f}", f"{total:,.0f}", f"{dollars:,.0f}"))
    heads = "cluster | stage | GPUs in use | hours | GPU-hours | dollars"
    print_table(f"The job on {card}; in all: with the driver's node", heads, rows)

    rows, alone = [], None
    macs, params, batch = np.mean(nets.schedule), nets.supernet_params, JOB.supernet.batch_size
    for gpus in (2**power for power in range(10)):
        stages = train_supernet(a, nets, gpus), retrain(a, nets, gpus)
        hours, paid = (sum(stage[index] for stage in stages) for index in (1, 2))
        alone = alone or hours
        cells = [*(f"{stage[1]:.1f}" for stage in stages), f"{paid:,.0f}"]
        waits_for = step_seconds(a, gpus, macs, params, batch)[1]
        size = f"{batch // gpus} ({batch / gpus * nets.kept / 1e9:.1f} GB)"
        rows.append((gpus, size, *cells, f"{alone / hours / gpus:.2f}", waits_for))
    heads = "GPUs | images a card (kept) | supernet, h | retraining, h | dollars | efficiency"
    print_table("Both trainings", f"{heads} | a supernet step waits for", rows)

    rows = []
    for size in CLUSTERS:
        lags = (0, 16, 100, 4 * size)
        kinds = (search(changed(a, lag=lag), nets, size, generations=not lag) for lag in lags)
        rows.append((size, *(f"{used}: {hours:.2f} h, ${paid:.0f}" for used, hours, paid in kinds)))
    heads = "evaluators | generations of 50 | lag 16 | lag 100 | lag 4 x evaluators"
    print_table("Search: evaluators in use, hours, dollars", heads, rows)

    plans = ((text, plan(changed(a, **values), nets, 64)) for text, values in CHANGES)
    rows = [(text, f"{hours:.1f}", f"{dollars:,.0f}") for text, (_, hours, dollars) in plans]
    print_table("Sensitivity: a cluster of 64 GPUs", "change | hours | dollars", rows)


def print_table(title, heads, rows):
    print(f"\n{title}\n\n| {heads} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
