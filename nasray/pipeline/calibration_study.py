"""How many images BN recalibration needs: RUN/calibration.json, by `nasray calibration-study`.

The same random subnets are evaluated with the supernet's own statistics, with those of each
batch, and recalibrated on ever more images. A search needs the right order of subnets, so
each way is compared with the largest number of images by Kendall's tau.
"""

from typing import Any, Literal

import numpy as np

from nasray.data.splits import JobImages
from nasray.errors import EvaluationError
from nasray.evaluation.evaluator import Request
from nasray.pipeline.run import Run
from nasray.pipeline.search import evaluators, require_supernet
from nasray.predictors.quality import kendall_tau
from nasray.progress import progress
from nasray.storage import files as storage
from nasray.storage import layout

SIZES = (500, 2_000, 5_000, 20_000)  # images


def calibration_study(run: Run, num_archs: int, seed: int = 0) -> dict[str, Any]:
    """Evaluate `num_archs` random feasible subnets each way; return and write what is found."""
    require_supernet(run)
    archs = run.limits.draw(num_archs, np.random.default_rng(seed), set())
    ways: list[Literal["inherited", "batch"] | int] = ["inherited", "batch", *_sizes(run)]
    requests = [Request(arch=arch, calibration=way) for way in ways for arch in archs]
    with evaluators(run) as pool, progress("study", len(requests)) as show:
        found = pool.evaluate(requests, show)
    failed = [each.error for each in found if each.failed]
    if failed:
        raise EvaluationError(f"{len(failed)} evaluations failed; the last: {failed[-1]}")
    fitness = np.array([each.top1 for each in found]).reshape(len(ways), -1)
    seconds = np.array([each.seconds for each in found]).reshape(len(ways), -1)
    rows = [
        {
            "calibration": way,
            "top1": own.tolist(),
            "mean_top1": float(own.mean()),
            "kendall_tau": kendall_tau(fitness[-1], own),
            "seconds": float(np.median(took)),
        }
        for way, own, took in zip(ways, fitness, seconds, strict=True)
    ]
    study = {"num_images": found[0].images, "num_archs": len(archs), "rows": rows}
    storage.write_json(run.path(layout.CALIBRATION_STUDY), study)
    return study


def _sizes(run: Run) -> list[int]:
    """Those of SIZES that the data set has, and all it has if that is less than the most."""
    available = len(JobImages(run.job, run.data_path).parts.training)
    return sorted({min(size, available) for size in SIZES})
