"""What a candidate's evaluation costs beyond its bare forward passes, and how it scales.

    python benchmarks/evaluate.py [--json FILE] [--archs 6] [--images 500] [--side 64]

Bare: forward passes of the extracted subnet, in eval mode, over the same calibration and
validation images, normalised and in memory beforehand, in the same batches and threads.
Two evaluators over one: candidates a second of an EvaluatorPool of Ray actors.
"""

import argparse
import statistics
import tempfile

import numpy as np
import ray
import torch
from table import Row, interleaved, median_ratio, show

from nasray import checkpoint
from nasray.config import parse_job
from nasray.datasets import import_dataset
from nasray.datasets.transforms import normalize
from nasray.evaluate import evaluate
from nasray.evaluator import EvaluationTask, EvaluatorPool
from nasray.spaces import make_space
from nasray.spaces.space import as_architectures, random_population


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--archs", type=int, default=6)
    parser.add_argument("--images", type=int, default=500, help="of each kind")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        job = make_job(options, folder)
        space = make_space(job.space, 10)
        supernet = space.supernet()
        space.initialize(supernet, torch.Generator().manual_seed(0))
        path = f"{folder}/supernet.pt"
        checkpoint.save_supernet(path, supernet)
        rng = np.random.default_rng(0)
        archs = as_architectures(random_population(space.genes, options.archs, rng))
        seconds, over_bare = time_single(supernet, archs, options)
        speedup = time_pool(job, path, archs, folder)

    where = f"{options.images} + {options.images} images, {options.side} px, 1 thread"
    show(
        [
            Row(f"evaluation of a candidate, {where}, median", seconds, "s"),
            Row("evaluation / bare forward passes, median", over_bare, "ratio", "<= 1.15"),
            Row("candidates a second, 2 evaluators / 1", speedup, "ratio", ">= 1.8"),
        ],
        options.json,
    )


def make_job(options, folder):
    per_class = options.images // 10
    values = {
        "space": {"name": "shufflenet", "resolution": options.side},
        "data": {
            "source": "synthetic",
            "train_per_class": 2 * per_class,
            "val_per_class": 1,
            "holdout_per_class": per_class,
        },
        "search": {"calibration_images": options.images, "batch_size": options.batch},
        "compute": {"num_evaluators": 2, "device": "cpu"},
    }
    job = parse_job(values, "benchmark")
    import_dataset(job.data, folder, seed=0)
    return job


def time_single(supernet, archs, options):
    torch.set_num_threads(1)
    rng = np.random.default_rng(1)
    shape = (2 * options.images, 3, options.side, options.side)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    calibration, images = pixels[: options.images], pixels[options.images :]
    labels = rng.integers(0, 10, options.images)
    ready = [
        normalize(torch.from_numpy(part))
        for part in np.array_split(pixels, -(-len(pixels) // options.batch))
    ]

    def bare(subnet):
        with torch.inference_mode():
            for batch in ready:
                subnet(batch)

    seconds, ratios = [], []
    for arch in archs:
        subnet = supernet.extract(arch).eval()
        times = interleaved(
            {
                "evaluation": lambda arch=arch: evaluate(
                    supernet.extract(arch),
                    calibration,
                    images,
                    labels,
                    batch_size=options.batch,
                ),
                "bare": lambda subnet=subnet: bare(subnet),
            },
            options.repeats,
        )
        seconds.append(statistics.median(times["evaluation"]))
        ratios.append(median_ratio(times["evaluation"], times["bare"]))
    return statistics.median(seconds), statistics.median(ratios)


def time_pool(job, supernet_path, archs, data_path):
    """Candidates a second of two evaluators over one, turn about on the same candidates."""
    ray.init(address="local", num_cpus=3, log_to_driver=False, include_dashboard=False)
    tasks = []
    for number in (1, 2):
        compute = job.compute.model_copy(update={"num_evaluators": number})
        each = job.model_copy(update={"compute": compute})
        tasks.append(EvaluationTask(supernet=supernet_path, data_path=data_path, job=each))
    with EvaluatorPool(tasks[0]) as one, EvaluatorPool(tasks[1]) as two:
        two(archs)  # both up and warm
        times = interleaved({"one": lambda: one(archs * 3), "two": lambda: two(archs * 3)}, 3)
    ray.shutdown()
    return median_ratio(times["one"], times["two"])


if __name__ == "__main__":
    main()
