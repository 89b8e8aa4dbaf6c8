"""Reads back what trackers have been told of a run: the points of each curve, as they were told."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

# What the [dev] extra brings, as far as it is installed.
INSTALLED = [
    tracker
    for tracker, packages in {
        "tensorboard": ("tensorboard",),
        "mlflow": ("mlflow", "sqlalchemy", "alembic"),
    }.items()
    if all(map(importlib.util.find_spec, packages))
]
Curves = dict[str, list[tuple[int, float]]]  # (step, value) in the order of publication


def read_tensorboard(folder: str | Path) -> Curves:
    """Of the one tracked run of a run directory, or of a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if (below := Path(folder, "tensorboard")).exists():
        [folder] = below.iterdir()
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        tag: [(event.step, event.value) for event in found.Scalars(tag)]
        for tag in found.Tags()["scalars"]
    }


def mlflow_runs(folder: str | Path, uri: str = "") -> list[Any]:
    """The runs of MLflow's in the store of a run directory, or at `uri`."""
    client = _client(folder, uri)
    experiment = client.get_experiment_by_name("nasray")
    return list(client.search_runs([experiment.experiment_id]))


def read_mlflow(folder: str | Path, uri: str = "") -> Curves:
    """Of the one run of MLflow's."""
    [run] = mlflow_runs(folder, uri)
    client = _client(folder, uri)
    return {
        key: [
            (metric.step, metric.value)
            for metric in client.get_metric_history(run.info.run_id, key)
        ]
        for key in run.data.metrics
    }


def _client(folder: str | Path, uri: str) -> Any:
    with warnings.catch_warnings():  # of SQLAlchemy's, of what MLflow uses of it
        warnings.simplefilter("ignore")
        from mlflow import MlflowClient

        return MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")


READ = {"tensorboard": read_tensorboard, "mlflow": read_mlflow}
