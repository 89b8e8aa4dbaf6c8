"""What a candidate's evaluation costs beyond its bare forward passes, and how it scales.

    python benchmarks/evaluate.py [--json FILE] [--archs 6] [--images 500] [--side 64]
                                  [--alone] [--device cuda]

Bare: forward passes of the extracted subnet, in eval mode, over the same calibration and
validation images, normalised and in the device's memory beforehand, in the same batches,
threads and types: what the device can do at most.
Two evaluators over one: candidates a second of an EvaluatorPool of Ray actors. Memory:
the data resident of four evaluators on one node (pages that several share counted once), over
the images they share and what each has besides them alone. What its heap keeps depends on the
order of the subnets that it met, so each of the four meets them in the order of one of those
that are measured alone.
"""

import argparse
import re
import statistics
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import ray
import torch
from ray.thirdparty_files import psutil
from table import Row, interleaved, median_ratio, show

from nasray import checkpoint
from nasray.config import parse_job
from nasray.data.importing import import_dataset
from nasray.data.transforms import normalize
from nasray.devices import autocast
from nasray.evaluation.evaluate import evaluate
from nasray.evaluation.evaluator import EvaluationTask, EvaluatorPool, Request
from nasray.spaces import make_space
from nasray.spaces.population import as_architectures, random_population

FOUR = 4  # evaluators whose memory is measured, each alone and all at once


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json")
    parser.add_argument("--archs", type=int, default=6)
    parser.add_argument("--images", type=int, default=500, help="of each kind")
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="no pools, no memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
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
        pools = [] if options.alone else measure_pools(job, path, archs, folder)

    on = "1 thread" if options.device == "cpu" else "GPU"
    where = f"{options.images} + {options.images} images, {options.side} px, {on}"
    show(
        [
            Row(f"evaluation of a candidate, {where}, median", seconds, "s"),
            Row("evaluation / bare forward passes, median", over_bare, "ratio", "<= 1.10"),
            Row("images a second, calibrated on or judged", 2 * options.images / seconds, ""),
            Row("the same / what bare forward passes do", 1 / over_bare, "share"),
            *pools,
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
        "compute": {
            "num_evaluators": 2,
            "device": "cpu" if options.device == "cpu" else "gpu",
            "gpus_per_evaluator": 0.25,
        },
    }
    job = parse_job(values, "benchmark")
    import_dataset(job.data, folder, seed=0)
    return job


def time_single(supernet, archs, options):
    torch.set_num_threads(1)
    device = options.device
    supernet = supernet.to(device)
    rng = np.random.default_rng(1)
    shape = (2 * options.images, 3, options.side, options.side)
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    calibration, images = pixels[: options.images], pixels[options.images :]
    labels = rng.integers(0, 10, options.images)
    ready = [
        normalize(torch.from_numpy(part).to(device))
        for part in np.array_split(pixels, -(-len(pixels) // options.batch))
    ]

    def bare(subnet):
        with torch.inference_mode(), autocast(device):
            for batch in ready:
                subnet(batch)
            if device == "cuda":
                torch.cuda.synchronize()

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
                    device=device,
                    graphs=True,
                ),
                "bare": lambda subnet=subnet: bare(subnet),
            },
            options.repeats,
        )
        seconds.append(statistics.median(times["evaluation"]))
        ratios.append(median_ratio(times["evaluation"], times["bare"]))
    return statistics.median(seconds), statistics.median(ratios)


def measure_pools(job, supernet_path, archs, data_path):
    """Rows of two evaluators beside one, turn about, and of the memory of four and of one."""
    ray.init(address="local", num_cpus=5, log_to_driver=False, include_dashboard=False)
    requests = [Request(arch=arch) for arch in archs * 3]

    def pool(number):
        compute = job.compute.model_copy(update={"num_evaluators": number})
        return EvaluatorPool(
            EvaluationTask(
                supernet=supernet_path,
                digest=checkpoint.digest(supernet_path),
                data_path=data_path,
                job=job.model_copy(update={"compute": compute}),
            )
        )

    with pool(1) as one, pool(2) as two:
        warm(two, 2, requests)
        calls = {"one": lambda: one.evaluate(requests), "two": lambda: two.evaluate(requests)}
        times = interleaved(calls, 3)
    speedup = median_ratio(times["one"], times["two"])

    def evaluate_in_order(seed, its_pool):
        order = np.random.default_rng(seed).permutation(len(requests))
        its_pool.evaluate([requests[index] for index in order])

    def megabytes(seeds):
        """Of as many evaluators at once, each of which meets the subnets in an order of its own."""
        wait_until_gone()
        with ExitStack() as stack, ThreadPoolExecutor(len(seeds)) as threads:
            pools = [stack.enter_context(pool(1)) for _ in seeds]
            list(threads.map(evaluate_in_order, seeds, pools))
            return sum(map(data_resident, evaluator_processes())) / 1e6

    shared = 2 * images_bytes(job) / 1e6
    alone = [megabytes([seed]) - shared for seed in range(FOUR)]
    four = megabytes(range(FOUR))
    ray.shutdown()
    own = statistics.mean(alone)
    return [
        Row("candidates a second, 2 evaluators / 1", speedup, "ratio", ">= 1.8"),
        Row("images that evaluators of a node share", shared, "MB"),
        Row(f"one evaluator's own memory, mean of {FOUR}", own, "MB"),
        Row("the same, the smallest", min(alone), "MB"),
        Row("the same, the largest", max(alone), "MB"),
        Row(
            "four evaluators / shared images + 4 x own memory",
            four / (shared + 4 * own),
            "ratio",
            "<= 1",
        ),
    ]


def data_resident(process):
    """Bytes that a process has in memory, without what it has only read of programs and
    libraries: that is there once, however many use it. Of pages that n share, each has one nth.
    """
    return sum(
        each.private_dirty if re.search(r"\.so(\.|$)|/bin/", each.path) else each.pss
        for each in process.memory_maps()
    )


def warm(pool, number, requests):
    """Evaluate until each of the pool's evaluators has done as many as are asked for."""
    done = Counter()
    while len(done) < number or min(done.values()) < len(requests):
        done.update(found.evaluator for found in pool.evaluate(requests))


def images_bytes(job):
    """Bytes of as many images as are calibrated on, or evaluated on: the same number of each."""
    return job.search.calibration_images * 3 * job.space.resolution**2


def evaluator_processes():
    children = psutil.Process().children(recursive=True)
    return [each for each in children if each.name().startswith("ray::Evaluator")]


def wait_until_gone():
    while evaluator_processes():
        time.sleep(0.1)


if __name__ == "__main__":
    main()
