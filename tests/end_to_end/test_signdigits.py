"""The job on real photographs, shortened: its own file, space and data, fewer epochs."""

from pathlib import Path

import pytest

from nasray.config import Job, load_job
from nasray.pipeline import stages
from nasray.pipeline.run import opened
from nasray.storage import files as storage

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "signdigits" / "signdigits.tar"

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(not PHOTOS.exists(), reason=f"{PHOTOS.name} is not beside the project"),
]


def shortened(job: Job) -> Job:
    values = job.model_dump()
    values["supernet"] |= {
        "epochs": 5,
        "shared_start_epochs": 3,
        "channel_warmup_start": 3,
        "channel_warmup_epochs": 1,
        "num_val_archs": 2,
        "val_every": 5,
    }
    values["search"] |= {"population_size": 4, "num_parents": 2, "num_generations": 2}
    values["search"] |= {"calibration_images": 200, "num_baseline": 2}
    values["retrain"] |= {"epochs": 4, "num_trials": 1, "learning_rate": 0.1, "warmup_epochs": 1}
    return Job.model_validate(values)


def test_photographs_become_a_model_that_has_learnt(ray_cluster: None, tmp_path: Path):
    job = shortened(load_job(str(ROOT / "jobs" / "signdigits.toml"), str(PHOTOS)))
    with opened(str(tmp_path / "run"), job) as run:
        stages.prepare_data(run)
        assert (run.dataset.num("train"), run.dataset.num("val")) == (1644, 418)
        stages.train(run)
        candidates = stages.search(run)
        [result] = stages.retrain(run)
        found = storage.read_json(run.path("search.json"))
    # Ten classes: a network that has learnt nothing is right in a tenth of the cases.
    assert max(candidate.fitness for candidate in candidates) > 0.3
    assert found["baseline"]["winner_top1"] > 0.3
    assert result["num_val_images"] == 418
    assert result["val_top1"] > 0.3
    limits = {limit.cost: limit.max for limit in job.search.limits}
    for cost, bound in limits.items():
        assert all(candidate.costs[cost] <= bound for candidate in candidates)
