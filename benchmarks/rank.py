"""How well a supernet ranks networks whose truth is known, by how it was trained.

    python benchmarks/rank.py --truth FILE --cifar10 FOLDER [--strategies uniform fair ...]
        [--minutes 40 | --passes 2400] [--images 10000] [--seeds 0 1 2] [--networks 200]
        [--folder FOLDER] [--json FILE]

Space: nasbench_macro. FILE is NAS-Bench-Macro's table of its different networks (CSV: arch,
mean_acc, params, macs), FOLDER holds CIFAR-10 as train.parquet (columns image, label), its rows
cycling through the classes. Every strategy gets the same number of forward passes: one of four
subnets makes a quarter of the steps. Training images are the first rows, `--images` of them; the
networks are evaluated on the last rows, `--holdout` of them, after their BN statistics were
recalibrated on `--calibration` training images. Kendall's tau-b is between those accuracies and
the table's, over `--networks` different networks drawn uniformly, the same for all strategies and
seeds; its 95 % interval is a bootstrap over these networks. The table's MACs and parameters are
ranked alike. The difference to MACs is in pairs: both order the same networks in each resample.

What has been done is kept in `--folder`: the same command goes on from there.
"""

import argparse
import json
import time
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from macro_table import read_truth
from PIL import Image
from table import Row, show

from nasray.config import Limit, SupernetConfig
from nasray.evaluation.evaluate import evaluate
from nasray.pipeline.rank import interval, regret
from nasray.predictors.quality import kendall_tau
from nasray.search.limits import Limits
from nasray.spaces.nasbench_macro import NasBenchMacro
from nasray.training.loop import fit
from nasray.training.sampler import check_sampling, sample, sizes_of
from nasray.training.supernet import recipe_of

SPACE = NasBenchMacro()
BAND = (Limit(cost="macs", min=20e6, max=90e6),)  # of "banded"
# By name, what each says in [supernet]. Its operations have no order, so a sandwich is four random
# subnets, the first of which teaches.
STRATEGIES = {
    "uniform": {},
    "banded": {"sampling": "banded"},
    "complexity": {"schedule": "complexity"},
    "fair": {"sampling": "fair"},
    "fair, ranks": {"sampling": "fair", "rank_loss": 2.0},
    "sandwich": {"sampling": "sandwich"},
    "sandwich, KL": {"sampling": "sandwich", "distillation": 0.5},
    "sandwich, alpha": {
        "sampling": "sandwich",
        "distillation": 0.5,
        "distillation_loss": "alpha",
    },
}
# Of all strategies alike: summed gradients of few steps go as far as single ones of many.
RECIPE = {
    "learning_rate": 0.05,
    "momentum": 0.9,
    "weight_decay": 2.5e-4,
    "label_smoothing": 0.0,
    "channel_warmup_start": 0,
    "channel_warmup_epochs": 0,
    "clip_gradient_norm": 5.0,
}
MOST_SUBNETS = 12  # a multiple of every strategy's number of subnets in a step
TIMED_PASSES = 12
EVALUATION_BATCH = 500
BOOTSTRAPS = 1000
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shared = Path(__file__).parents[2] / "shared/data"
    parser.add_argument("--truth", default=shared / "nasbench_macro/nas-bench-macro_unique3969.csv")
    parser.add_argument("--cifar10", type=Path, default=shared / "cifar10")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, help="of training a strategy, on this machine")
    budget.add_argument("--passes", type=int, default=2400, help="forward passes of a strategy")
    parser.add_argument("--images", type=int, help="that training uses; all but the hold-out")
    parser.add_argument("--holdout", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=Path("runs/rank"))
    parser.add_argument("--json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    data = Data(options)
    passes = budget_of(options, data)
    truth = read_truth(options.truth)
    chosen = np.random.default_rng(0).choice(len(truth), options.networks, replace=False)
    archs = [list(truth)[index] for index in np.sort(chosen)]
    true = np.array([truth[arch] for arch in archs])  # top-1, parameters, MACs
    print(
        f"{passes} forward passes of {options.batch_size} of {len(data.images)} images each; "
        f"{len(archs)} networks on {options.holdout} other images, BN recalibrated on "
        f"{options.calibration}"
    )
    rows = [
        *rows_of("ranked by MACs", [true[:, 2]], true[:, 0], true[:, 2]),
        *rows_of("ranked by parameters", [true[:, 1]], true[:, 0], true[:, 2]),
    ]
    for name in options.strategies:
        found = [ranked(name, seed, passes, archs, data, options) for seed in options.seeds]
        rows += rows_of(name, found, true[:, 0], true[:, 2])
    show(rows, options.json)


class Data:
    """CIFAR-10 in memory: uint8 (n, 3, 32, 32) and labels (n,), to train on and held out."""

    def __init__(self, options):
        table = pq.read_table(options.cifar10 / "train.parquet", columns=["image", "label"])
        number = options.images or len(table) - options.holdout
        if number + options.holdout > len(table):
            raise SystemExit(f"--images {number} and --holdout overlap: {len(table)} rows in all")
        self.images, self.labels = read(table[:number])
        self.holdout = read(table[len(table) - options.holdout :])
        self.batch_size = options.batch_size

    def batches(self, seed, epoch, number):
        """`number` batches of an epoch: random crops of images padded by 4 pixels, and flips."""
        rng = np.random.default_rng((seed, epoch, 0xDA7A))
        needed = number * self.batch_size
        rounds = -(-needed // len(self.images))
        order = np.concatenate([rng.permutation(len(self.images)) for _ in range(rounds)])
        return Augmented(self, order[:needed].reshape(number, -1), rng.integers(2**63))


class Augmented:
    """The batches of an epoch, made one by one."""

    def __init__(self, data, order, seed):
        self.data, self.order, self.seed = data, order, int(seed)

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        rng = np.random.default_rng(self.seed)
        for rows in self.order:
            padded = np.pad(self.data.images[rows], ((0, 0), (0, 0), (4, 4), (4, 4)))
            top, left, flipped = rng.integers((9, 9, 2), size=(len(rows), 3)).T
            crops = [
                image[:, y : y + 32, x : x + 32][..., :: -1 if mirrored else 1]
                for image, y, x, mirrored in zip(padded, top, left, flipped, strict=True)
            ]
            yield torch.from_numpy(np.stack(crops)), torch.from_numpy(self.data.labels[rows])


def read(table):
    """The images and labels of rows: uint8 (n, 3, 32, 32), int64 (n,)."""
    pixels = [np.asarray(Image.open(BytesIO(each.as_py()))) for each in table["image"]]
    return np.stack(pixels).transpose(0, 3, 1, 2).copy(), table["label"].to_numpy().astype(np.int64)


def budget_of(options, data):
    """The forward passes of every strategy, rounded so that all make exactly as many."""
    unit = MOST_SUBNETS * options.checkpoints
    if options.minutes is None:
        return max(1, round(options.passes / unit)) * unit
    path = options.folder / f"passes-{options.minutes:g}-{options.batch_size}.json"
    if path.exists():  # timed before the interruption
        return json.loads(path.read_text())
    train("uniform", 0, TIMED_PASSES, data, checkpoints=1)  # wakes the machine
    started = time.perf_counter()
    train("uniform", 0, TIMED_PASSES, data, checkpoints=1)
    seconds = (time.perf_counter() - started) / TIMED_PASSES
    passes = max(1, round(60 * options.minutes / seconds / unit)) * unit
    path.write_text(json.dumps(passes))
    return passes


def train(name, seed, passes, data, *, checkpoints, path=None):
    """Train a supernet with so many forward passes; goes on from the checkpoint at `path`."""
    config = SupernetConfig(epochs=checkpoints, warmup_epochs=0.0, **RECIPE | STRATEGIES[name])
    check_sampling(SPACE, config)
    bands = [Limits(SPACE, BAND)] if config.sampling == "banded" else []
    supernet = SPACE.supernet()
    SPACE.initialize(supernet, torch.Generator().manual_seed(seed))
    supernet.to(DEVICE)

    def archs(epoch, step):
        return sample(SPACE, config, seed=seed, epoch=epoch, step=step, bands=bands)

    number = passes // checkpoints // len(archs(0, 0))  # steps of an epoch

    def report(curves, state):
        if path:
            torch.save(state(), path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
            print(f"  {len(curves)} of {checkpoints}: loss {curves[-1]['loss']:.3f}", flush=True)

    fit(
        supernet,
        lambda epoch, step: [partial(supernet, arch=arch) for arch in archs(epoch, step)],
        recipe_of(config),
        batches=lambda epoch: data.batches(seed, epoch, number),
        validate=lambda epoch: {},
        report=report,
        sizes=(lambda epoch, step: sizes_of(SPACE, archs(epoch, step)))
        if config.needs_sizes
        else None,
        resume=torch.load(path, DEVICE) if path and path.exists() else None,
        device=DEVICE,
        seed=seed,
    )
    return supernet


def ranked(name, seed, passes, archs, data, options):
    """The accuracy of each of `archs` by a supernet that is trained for it: (n,)."""
    parts = (seed, passes, options.checkpoints, len(data.images), options.batch_size)
    key = "-".join(map(str, (name.replace(", ", "-"), *parts)))
    path = options.folder / f"{key}-{options.holdout}-{options.calibration}.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    digits = [SPACE.to_json(arch)["arch"] for arch in archs]
    missing = [at for at, each in enumerate(digits) if each not in found]
    print(f"{name}, seed {seed}: {len(archs) - len(missing)} networks known", flush=True)
    if missing:
        checkpoint = options.folder / f"{key}.pt"
        supernet = train(name, seed, passes, data, checkpoints=options.checkpoints, path=checkpoint)
    for at in missing:
        correct = evaluate(
            supernet.extract(archs[at]),
            data.images[: options.calibration],
            *data.holdout,
            batch_size=EVALUATION_BATCH,
            device=DEVICE,
        )
        found[digits[at]] = float(correct.mean())
        path.write_text(json.dumps(found))
    return np.array([found[each] for each in digits])


def rows_of(name, rankings, true, macs):
    """Kendall's tau-b, mean over the rankings (seeds), how far it is above that of MACs, each with
    its interval, and the regret of the best."""
    rng = np.random.default_rng(0)
    drawn = np.array([rng.integers(len(true), size=len(true)) for _ in range(BOOTSTRAPS)])

    def tau(rows):
        return float(np.mean([kendall_tau(each[rows], true[rows]) for each in rankings]))

    def above_macs(rows):
        return tau(rows) - kendall_tau(macs[rows], true[rows])

    for seed, each in enumerate(rankings if len(rankings) > 1 else []):
        yield Row(f"{name}: tau-b, training {seed}", kendall_tau(each, true), "")
    for said, figure in (("tau-b", tau), ("tau-b minus that of MACs", above_macs)):
        value, low, high = interval(figure, drawn)
        yield Row(f"{name}: {said}", value, "")
        if low is not None:
            yield Row(f"{name}: {said}, low end of the 95 % interval", low, "")
            yield Row(f"{name}: {said}, high end", high, "")
    mean_regret = np.mean([regret(each, true) for each in rankings])
    yield Row(f"{name}: regret of the best ranked", 100 * float(mean_regret), "points")


if __name__ == "__main__":
    main()
