"""nasray's training input beside torchvision's ImageFolder and DataLoader, by core.

    python benchmarks/ingest.py [--json FILE] [--images FOLDER] [--cores 1 2] [--repeats 5]

The same JPEGs, in Parquet shards for nasray and in FOLDER/<class>/ for torchvision, become batches
of augmented uint8 images of 224 px: random resized crop, flip, color jitter, all at nasray's
defaults. PCA lighting is nasray's alone. The process is bound to the cores: on one it decodes
itself; on several, as many loader processes do. What counts is the CPU time of all processes, so
that other programs disturb it little; elapsed time stands beside it. Each time is what an epoch
takes more than one of a quarter of the images, so nobody's start counts. Epochs of the kinds
alternate, and a ratio is the median of those of neighbours. Without FOLDER, images are generated.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from table import Row, interleaved, median_ratio, show
from torch.utils.data import DataLoader, Subset

from nasray.config import DataConfig
from nasray.data.decoding import make_decoder
from nasray.data.importing import write_shards
from nasray.data.loader import train_batches
from nasray.data.shards import open_dataset
from nasray.data.source import Pictures, Record
from nasray.data.transforms import train_transform
from nasray.errors import UserError

# torchvision, Ray and scale.py are imported in functions: loader processes of nasray's kind import
# this file, but not what it calls.
FULLSIZE = Path(__file__).parents[2] / "shared" / "data" / "imagenet_fullsize" / "images"
CONFIG = DataConfig(source="parquet", path="-")
SIDE = 224
SUFFIXES = (".jpg", ".jpeg")
GENERATED = 240  # images, if there is no folder


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--images", type=Path, default=FULLSIZE)
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--copies", type=int, default=4, help="of each image: longer epochs")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    decoders = ["pillow", *(["torchcodec"] if has_torchcodec() else [])]
    usable = sorted(os.sched_getaffinity(0))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files, classes, dataset = copied(options.images, options.copies, folder)
        usual = image_folder(classes)
        places = {path: index for index, (path, _) in enumerate(usual.samples)}
        order = [places[str(path)] for path in files]
        rows += part_rows(dataset, decoders, options.repeats)
        for cores in options.cores:
            if cores > len(usable):
                print(f"{cores} cores: left out, this process may use {len(usable)}")
                continue
            os.sched_setaffinity(0, usable[:cores])
            size = {"batch_size": options.batch, "workers": cores if cores > 1 else 0}
            feeds = {"torchvision": partial(torchvision_batches, usual, order, **size)} | {
                f"nasray, {decoder}": partial(nasray_batches, dataset, decoder, **size)
                for decoder in decoders
            }
            rows += feed_rows(feeds, cores, len(files) // 4, options.repeats)
    show(rows, options.json)


def has_torchcodec():
    try:
        make_decoder("torchcodec")
    except UserError as error:
        print(f"torchcodec: left out: {error}")
        return False
    return True


def copied(images, copies, folder):
    """Write so many copies of all images as folders of classes and as shards.

    Returns the files in the order of the shards, the folder of the classes, and the shards.
    """
    classes, shards = f"{folder}/classes", f"{folder}/shards"
    if images.is_dir():
        found = sorted(path for path in images.rglob("*") if path.suffix.lower() in SUFFIXES)
        for path in found:
            for copy in range(copies):
                target = Path(classes, path.parent.name, f"{copy}-{path.name}")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    else:
        from scale import draw_picture

        print(f"{images}: not there, so {GENERATED} images are generated")
        for number in range(GENERATED * copies):
            target = Path(classes, f"class{number % 2}", f"{number}.jpeg")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(draw_picture(number % GENERATED))
    names = sorted(path.name for path in Path(classes).iterdir())
    files = sorted(Path(classes).rglob("*.*"))
    np.random.default_rng(0).shuffle(files)
    records = [
        Record("train", names.index(path.parent.name), path.name, path.read_bytes) for path in files
    ]
    about = {"source": "copied", "seed": 0, "options": {}, "show": lambda done, total: None}
    write_shards(shards, Pictures(tuple(names), len(records), records), **about)
    return files, classes, open_dataset(shards)


def nasray_batches(dataset, decoder, number, *, batch_size, workers):
    """An epoch over the first `number` images, as the trainer gets it."""
    return train_batches(
        dataset,
        np.arange(dataset.num("train"))[:number],
        CONFIG.model_copy(update={"decoder": decoder, "loader_workers": workers}),
        resolution=SIDE,
        batch_size=batch_size,
        rank=0,
        world_size=1,
        seed=0,
        epoch=0,
    )


def torchvision_batches(folder, order, number, *, batch_size, workers):
    """An epoch of the usual recipe over as many images of `order`, which stay uint8, too."""
    return DataLoader(
        Subset(folder, order[:number]),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
    )


def image_folder(classes):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    jitter = CONFIG.color_jitter
    steps = [
        v2.RandomResizedCrop(SIDE, scale=(CONFIG.min_crop_area, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(brightness=jitter, contrast=jitter, saturation=jitter),
        v2.PILToTensor(),
    ]
    return ImageFolder(classes, v2.Compose(steps))


def feed_rows(feeds, cores, short, repeats):
    """Run each in turn, the first time uncounted."""
    spent = {name: [] for name in feeds}
    for turn in range(repeats + 1):
        for name, feed in feeds.items():
            found = seconds_an_image(feed, short)
            if turn:
                spent[name].append(found)
    where = f"{cores} core{'s' if cores > 1 else ''}"
    rows = []
    for name, found in spent.items():
        cpu, elapsed = zip(*found, strict=True)
        rows += [
            Row(f"{where}: {name}", 1 / statistics.median(cpu), "images/core-s"),
            Row(f"{where}: {name}, elapsed", 1 / statistics.median(elapsed), "images/s"),
        ]
    usual, _ = zip(*spent.pop("torchvision"), strict=True)
    for name, found in spent.items():
        cpu, _ = zip(*found, strict=True)
        ratio = median_ratio(usual, cpu)
        rows.append(Row(f"{where}: {name} / torchvision", ratio, "ratio", ">= 1.5"))
    return rows


def seconds_an_image(feed, short):
    """CPU time of all processes and elapsed time, by images more than the `short` first."""
    spent, numbers = [], []
    for number in (short, None):
        before = np.array([cpu_seconds(), time.perf_counter()])
        numbers.append(sum(len(images) for images, _ in feed(number)))
        spent.append(np.array([cpu_seconds(), time.perf_counter()]) - before)
    return ((spent[1] - spent[0]) / (numbers[1] - numbers[0])).tolist()


def cpu_seconds():
    """CPU time of this process and all that it started, with those that have ended."""
    import ray  # noqa: F401  brings psutil
    from ray.thirdparty_files import psutil

    started = psutil.Process().children(recursive=True)
    ended = sum(os.times()[2:4])
    return time.process_time() + ended + sum(sum(each.cpu_times()[:4]) for each in started)


def part_rows(dataset, decoders, repeats):
    """What decoding and augmenting take of that, by one core, without the loader."""
    encoded = dataset.read("train", np.arange(min(240, dataset.num("train"))))
    augment, calls = train_transform(CONFIG, SIDE), {}
    for name in decoders:
        decode = make_decoder(name)
        pictures = [decode(image) for image in encoded]
        calls[f"{name}: decode"] = lambda decode=decode: [decode(image) for image in encoded]
        calls[f"{name}: augment"] = lambda pictures=pictures: [
            augment(picture, seed) for seed, picture in enumerate(pictures)
        ]
    times = interleaved(calls, repeats, time.process_time)
    return [
        Row(name, 1e3 * statistics.median(found) / len(encoded), "ms/image")
        for name, found in times.items()
    ]


if __name__ == "__main__":
    main()
