"""Float32, float16 and int8 of one network of each kind side by side, on two sets of photographs.

    python benchmarks/int8.py [--sets hands=TAR clothing=TAR] [--weights FILE] [--folder FOLDER]
        [--epochs 40] [--json FILE]

A ShuffleNet (OneShot-S+), an Once-for-All MobileNetV3 (a random one) and an EfficientNet-Lite0 at
64 pixels, each trained from scratch; the EfficientNet from ImageNet's weights FILE, if given, in a
quarter of the epochs. A TAR holds train/<class>/ and val/<class>/ or validation/<class>/. Each
network is written as `nasray export --precision int8 --precision fp16` does, measured on all
validation images, and timed as `nasray benchmark` does, the precisions of a network in turn.
What is done is kept in --folder: the same command goes on from there.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from pretrained import train as train_network
from table import Row, show

import nasray
from nasray import checkpoint
from nasray.config import Job, parse_job
from nasray.costs.profile import profile, total
from nasray.data.importing import import_dataset
from nasray.data.splits import JobImages
from nasray.evaluation.evaluate import top1
from nasray.pipeline.exports import export
from nasray.pipeline.run import Run, opened
from nasray.pretrained.start import start_from
from nasray.spaces import make_space
from nasray.spaces.population import as_architectures, random_population
from nasray.spaces.supernet import build_subnet
from nasray.storage import files as storage
from nasray.storage import layout
from nasray.training.loop import Recipe

SIDE = 64
SPACES = {
    "shufflenet": {"name": "shufflenet"},
    "ofa_mobilenetv3": {"name": "ofa_mobilenetv3", "width": 1.0, "resolutions": [SIDE]},
    "efficientnet_lite0": {"name": "mbconv", "base": "efficientnet_lite0", "resolutions": [SIDE]},
}
SEARCHED = {"shufflenet": "oneshot-s+", "efficientnet_lite0": "largest"}
AIMS = {"int8 / float32, speed at batch 1": ">= 1.3", "int8: drop of top-1": "<= 1.0"}
SHARED = Path(__file__).resolve().parents[2] / "shared/data"
TARS = {"hands": "signdigits/signdigits.tar", "clothing": "clothing/clothing160.tar"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = [f"{name}={SHARED / tar}" for name, tar in TARS.items()]
    parser.add_argument("--sets", nargs="+", metavar="NAME=TAR", default=named)
    parser.add_argument("--spaces", nargs="+", choices=SPACES, default=list(SPACES))
    parser.add_argument("--weights", help="of EfficientNet-Lite0, trained on ImageNet")
    parser.add_argument("--folder", type=Path, default=Path("runs/int8"))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs: dict[str, Path] = {}
    for name, _, tar in (each.partition("=") for each in options.sets):
        data = options.folder / name / "data"
        for space in options.spaces:
            job = job_of(space, str(data.resolve()))
            if not (data / layout.DATASET).exists():
                source = {"source": "tar", "path": tar}
                import_dataset(parse_job({"data": source}, name).data, str(data), seed=0)
            runs[f"{name}, {space}"] = folder = options.folder / name / space
            with opened(str(folder), job) as run:
                weights = options.weights if space == "efficientnet_lite0" else None
                if not storage.exists(run.path(layout.retrained("0", layout.RESULT))):
                    train(run, space, weights, options.epochs // (4 if weights else 1))
                export(run, precisions=("fp16", "int8"))
    show([row for name, folder in runs.items() for row in rows_of(name, folder)], options.json)


def job_of(space: str, data: str) -> Job:
    values = {
        "space": {**SPACES[space], "resolution": SIDE},
        "data": {
            "source": "parquet",
            "path": data,
            "holdout_per_class": 15,
            "min_crop_area": 0.4,
            "color_jitter": 0.2,
        },
    }
    return parse_job(values, "int8.py")


def train(run: Run, name: str, weights: str | None, epochs: int) -> None:
    """Train the network of RUN/retrain/0/, and write it as retraining does."""
    images = JobImages(run.job, run.data_path, SIDE)
    classes = images.dataset.classes
    space = make_space(run.job.space, len(classes))
    if name in SEARCHED:
        arch = space.named[SEARCHED[name]]
    else:
        [arch] = as_architectures(random_population(space.genes, 1, np.random.default_rng(0)))
    if weights:
        network = start_from(space, weights, seed=0, classes=classes).supernet.extract(arch)
    else:
        network = build_subnet(space.decode(arch))
        space.initialize(network, torch.Generator().manual_seed(0))
    recipe = Recipe(
        epochs=epochs,
        learning_rate=0.1 if name == "shufflenet" else 0.05,
        warmup_epochs=1,
        momentum=0.9,
        weight_decay=4e-5,
        label_smoothing=0.1,
    )

    def report(curves: list[dict], state: object) -> None:
        loss = curves[-1]["loss"]
        print(f"{run.folder}: {len(curves)} of {epochs}, loss {loss:.3f}", flush=True)

    train_network(network, images, recipe, 0, report)
    network.eval()
    model = run.path(layout.retrained("0", layout.MODEL))
    checkpoint.save_subnet(model, space, arch, network, classes=classes)
    result = {
        "arch": space.to_json(arch),
        "val_top1": top1(network, *images.validation, batch_size=100, device="cpu"),
        "num_val_images": len(images.validation[1]),
        "costs": total(profile(space, arch)),
    }
    storage.write_json(run.path(layout.retrained("0", layout.RESULT)), result)


def rows_of(name: str, folder: Path) -> list[Row]:
    """The figures of one network's files."""
    found = {row["precision"]: row for row in nasray.benchmark(folder)}
    rows = []
    for precision, row in found.items():
        what = f"{name}, {precision}"
        rows.append(Row(f"{what}: top-1 of {row['num_val_images']} images", 100 * row["top1"], "%"))
        rows.append(Row(f"{what}: one image", row["ms"], "ms"))
        rows.append(Row(f"{what}: batches of 32", row["images_per_s"], "images/s"))
        rows.append(Row(f"{what}: file", row["bytes"] / 1e6, "MB"))
    said = storage.read_json(f"{folder}/export/0-int8.json")
    int8, whole = found["int8"], found["fp32"]
    drop = ("int8: drop of top-1", int8["drop"], "points")
    speed = ("int8 / float32, speed at batch 1", whole["ms"] / int8["ms"], "ratio")
    rows += [Row(f"{name}, {key}", value, unit, AIMS[key]) for key, value, unit in (drop, speed)]
    rows.append(Row(f"{name}, int8: blocks left in float", len(said["float_blocks"]), ""))
    return rows


if __name__ == "__main__":
    main()
