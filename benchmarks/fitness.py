"""By which fitness the hold-out images order subnets best: top-1, or log-likelihood.

    python benchmarks/fitness.py RUN_DIR [--archs 80] [--json PATH]

Random architectures of a finished run's space are evaluated with its supernet's weights, on the
hold-out images and on the validation images. Printed for each fitness: its split-half reliability,
and Kendall's tau-b between what it says of the hold-out and top-1 on the validation images, which
have noise of their own. With flips, the probability is the mean over an image and its mirror
image, at twice the cost.
"""

import argparse

import numpy as np
import torch
from table import Row, show

from nasray.checkpoint import load_supernet
from nasray.config import parse_job
from nasray.data.splits import JobImages
from nasray.evaluation.evaluate import fold_bn, outcomes, recalibrate_bn
from nasray.predictors.quality import kendall_tau
from nasray.search.reliability import Reliability
from nasray.spaces.population import as_architectures, random_population
from nasray.storage import files as storage
from nasray.storage import layout

TOP1, LIKELIHOOD, FLIPS = "top-1", "log-likelihood", "log-likelihood with flips"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir")
    parser.add_argument("--archs", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json")
    options = parser.parse_args()
    run = options.run_dir
    job = parse_job(storage.read_json(storage.join(run, layout.JOB))["job"], run)
    source = job.data.path if job.data.source == "parquet" else storage.join(run, layout.DATA)
    images = JobImages(job, source)
    supernet = load_supernet(storage.join(run, layout.SUPERNET))
    genes, rng = supernet.space.genes, np.random.default_rng(options.seed)
    archs = as_architectures(random_population(genes, options.archs, rng))
    holdout, labels = images.holdout
    parts = (holdout, labels), (holdout[..., ::-1], labels), images.validation
    said = [outcomes_of(supernet, arch, images, parts) for arch in archs]
    found = np.array([each[:2] for each in said])  # (archs, 2, images, 2)
    truth = np.array([each[2][:, 0].mean() for each in said])
    plain, mirrored = found[:, 0, :, 1], found[:, 1, :, 1]
    scores = {
        TOP1: found[:, 0, :, 0],
        LIKELIHOOD: plain,
        FLIPS: np.logaddexp(plain, mirrored) - np.log(2),
    }
    rows = []
    for name, own in scores.items():
        fitness = own.mean(axis=1)
        order = np.argsort(-fitness, kind="stable")
        ranked = Reliability.of(own[order], labels)
        where = f"{name}, {len(archs)} subnets"
        if ranked is not None:
            rows.append(Row(f"{where}: reliability, {len(labels)} images", ranked.split_half, ""))
        tau = kendall_tau(fitness, truth)
        rows.append(Row(f"{where}: tau-b with top-1 on {len(parts[2][1])} others", tau, ""))
    show(rows, options.json)


def outcomes_of(supernet, arch, images, parts) -> list[np.ndarray]:
    """outcomes() of one subnet, its BN recalibrated, on each of several sets of images."""
    search, subnet = images.job.search, supernet.extract(arch)
    options = {"batch_size": search.batch_size, "resolution": supernet.space.resolution_of(arch)}
    recalibrate_bn(subnet, images.calibration(search.calibration_images), **options)
    fold_bn(subnet)
    return [outcomes(subnet, *part, **options) for part in parts]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
