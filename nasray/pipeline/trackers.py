"""The clients of MLflow, TensorBoard and Weights & Biases: what is published there, and more of it.

tracking.py says what is to be published, and when. A tracked run has a name that stays when it is
resumed; each client finds by it what is published already.
"""

import importlib.util
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from nasray.errors import UserError
from nasray.pipeline.run import Run
from nasray.storage import files as storage
from nasray.storage import layout

Points = dict[str, dict[int, float]]  # values by the name of a curve, and by step

EXPERIMENT_TAG = "nasray.run"  # of MLflow's run: the name of the tracked run
MAX_METRICS, MAX_PARAMS = 1000, 100  # that MLflow takes at once
MLFLOW_ENVIRONMENT = {
    # Its own are 120 s and 7 times, after which nobody looks any more for why nothing is shown.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # a run tells nobody of it whom its job does not name
}


class Tracker(Protocol):
    """One place where curves are published."""

    title: str
    where: str  # how a user gets to see them

    def connect(self) -> dict[str, set[int]]:
        """Begin or continue the tracked run; return the steps of each curve that it has."""

    def write(self, points: Points, settings: dict[str, str]) -> None:
        """Publish `points`, which are new, and what is new of the job's settings."""

    def close(self, outcome: str) -> None:
        """End with "FINISHED", "FAILED" or "KILLED"; the tracked run may still be continued."""


def require(packages: Sequence[str], tracker: str) -> None:
    """Check that the packages are installed that `tracker` needs.

    Raises:
        UserError: one is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"tracking = \"{tracker}\" needs {package}: pip install '.[track]' in nasray's "
                "folder, on the machine where nasray runs, or leave it out of the job"
            )


class MLflow:
    """A run of MLflow's, on a server or in a file; found again by its tag."""

    title = "MLflow"

    def __init__(self, run: Run, name: str) -> None:
        config = run.job.tracking
        self.uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        self.file = "" if self.uri else run.path(layout.MLFLOW)
        if storage.is_uri(self.file):
            raise UserError(
                f"{run.folder} is no place for a file of MLflow's: set tracking.uri, or "
                "MLFLOW_TRACKING_URI where nasray runs, to the address of an MLflow server"
            )
        require(["mlflow", *(["sqlalchemy", "alembic"] if self.file else [])], "mlflow")
        for variable, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(variable, value)
        # Here, since Ray forks processes later, while the thread that publishes is at work.
        from mlflow import MlflowClient

        for logger in ("mlflow", "alembic"):
            logging.getLogger(logger).setLevel(logging.WARNING)
        self.make_client = MlflowClient
        self.uri = self.uri or f"sqlite:///{self.file}"
        self.name, self.folder, self.experiment = name, run.folder, config.experiment
        self.where = f"mlflow ui --backend-store-uri {self.uri}" if self.file else self.uri
        self.run_id, self.settings = "", set[str]()

    def connect(self) -> dict[str, set[int]]:
        """Find the run by its tag, or create it; ask for the steps of each metric."""
        if self.file and not os.path.exists(self.file):
            self._make_store()
        self.client = self.make_client(tracking_uri=self.uri)
        known = self.client.get_experiment_by_name(self.experiment)
        experiment = (
            known.experiment_id if known else self.client.create_experiment(self.experiment)
        )
        wanted = f"tags.`{EXPERIMENT_TAG}` = '{self.name}'"
        found = next(iter(self.client.search_runs([experiment], wanted, max_results=1)), None)
        if found is None:
            tags = {EXPERIMENT_TAG: self.name, "nasray.folder": self.folder}
            title = self.folder.rsplit("/", 1)[-1]
            found = self.client.create_run(experiment, run_name=title, tags=tags)
        self.run_id, data = found.info.run_id, found.data
        self.client.update_run(self.run_id, status="RUNNING")
        self.settings = set(data.params)
        return {
            key: {metric.step for metric in self.client.get_metric_history(self.run_id, key)}
            for key in data.metrics
        }

    def write(self, points: Points, settings: dict[str, str]) -> None:
        """Log metrics, and as parameters the settings that it has not: they cannot be changed."""
        from mlflow.entities import Metric, Param

        now = int(1000 * time.time())
        metrics = [
            Metric(key, value, now, step)
            for key, curve in points.items()
            for step, value in curve.items()
        ]
        for first in range(0, len(metrics), MAX_METRICS):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + MAX_METRICS])
        params = [Param(key, value) for key, value in settings.items() if key not in self.settings]
        for first in range(0, len(params), MAX_PARAMS):
            self.client.log_batch(self.run_id, params=params[first : first + MAX_PARAMS])
        self.settings |= settings.keys()

    def close(self, outcome: str) -> None:
        """Say how the run has ended."""
        self.client.set_terminated(self.run_id, outcome)

    def _make_store(self) -> None:
        """Create the file under another name: one that was half created is of no use."""
        partial = f"{self.file}.partial"
        storage.remove(partial)  # of a process that was killed
        self.make_client(tracking_uri=f"sqlite:///{partial}").search_experiments(max_results=1)
        os.replace(partial, self.file)


class TensorBoard:
    """Event files in RUN/tensorboard/<name>; those of a bucket are written here and copied there.

    A process begins a file of its own. Without being asked to, torch's writer marks nothing of the
    earlier ones as obsolete.
    """

    title = "TensorBoard"

    def __init__(self, run: Run, name: str) -> None:
        require(["tensorboard"], "tensorboard")
        import tensorboard.backend.event_processing.event_accumulator as reading
        from torch.utils.tensorboard import SummaryWriter

        self.reading, self.make_writer = reading, SummaryWriter
        self.folder = run.path(layout.TENSORBOARD, name)
        self.where = f"tensorboard --logdir {run.path(layout.TENSORBOARD)}"
        self.is_remote = storage.is_uri(self.folder)
        self.local = tempfile.mkdtemp(prefix="nasray-") if self.is_remote else self.folder
        self.writer: Any = None
        self.settings: set[int] = set()  # how many there were, whenever they were written

    def connect(self) -> dict[str, set[int]]:
        """Read the steps of each curve from the event files, and begin another one."""
        if self.is_remote:
            for name in storage.list_names(self.folder):
                with open(os.path.join(self.local, name), "wb") as file:
                    file.write(storage.read(storage.join(self.folder, name)))
        os.makedirs(self.local, exist_ok=True)
        kept = {self.reading.SCALARS: 0, self.reading.TENSORS: 0}  # all of them
        known = self.reading.EventAccumulator(self.local, size_guidance=kept).Reload()
        tags = known.Tags()
        if "settings/text_summary" in tags["tensors"]:
            self.settings = {event.step for event in known.Tensors("settings/text_summary")}
        self.before = set(os.listdir(self.local))
        self.writer = self.make_writer(self.local)
        return {tag: {event.step for event in known.Scalars(tag)} for tag in tags["scalars"]}

    def write(self, points: Points, settings: dict[str, str]) -> None:
        """Add scalars, and the settings as a table whenever there are more of them."""
        is_told = not settings or len(settings) in self.settings
        if is_told and not points:
            return
        for key, curve in points.items():
            for step, value in curve.items():
                self.writer.add_scalar(key, value, step)
        if not is_told:
            rows = (f"| {key} | {value} |" for key, value in settings.items())
            table = "\n".join(("| setting | value |", "|---|---|", *rows))
            self.writer.add_text("settings", table, len(settings))
            self.settings.add(len(settings))
        self.writer.flush()
        self._copy()

    def close(self, outcome: str) -> None:
        """Write what is left."""
        self.writer.close()
        self._copy()

    def _copy(self) -> None:
        for name in set(os.listdir(self.local)) - self.before if self.is_remote else ():
            with open(os.path.join(self.local, name), "rb") as file:
                storage.write(storage.join(self.folder, name), file.read())


class WeightsAndBiases:
    """A run of Weights & Biases, resumed by its id.

    What it has is what its server says of it, the summary of a resumed run. Without a server
    (WANDB_MODE=offline) that is nothing, and a resumed run writes all of its curves again.
    """

    title = "Weights & Biases"

    def __init__(self, run: Run, name: str) -> None:
        require(["wandb"], "wandb")
        import wandb

        is_online = wandb.setup().settings.mode == "online"
        if is_online and not wandb.login(prompt=False, verify=False):
            raise UserError(
                'tracking = "wandb": Weights & Biases knows no key here; say `wandb login`, set '
                "WANDB_API_KEY where nasray runs, or WANDB_MODE=offline"
            )
        is_remote = storage.is_uri(run.folder)
        # Its own folder for its files, below this one, is named wandb.
        folder = tempfile.mkdtemp(prefix="nasray-") if is_remote else run.folder
        self.options = {
            "project": run.job.tracking.experiment,
            "id": name,
            "name": run.folder.rsplit("/", 1)[-1],
            "dir": folder,
            "resume": "allow",
            "settings": wandb.Settings(silent=True, console="off", init_timeout=20),
        }
        self.init = wandb.init
        self.where = f"project {run.job.tracking.experiment} of Weights & Biases"
        self.run: Any = None
        self.axes: set[str] = set()
        self.num_settings = 0

    def connect(self) -> dict[str, set[int]]:
        """Begin or resume the run; of each curve, all steps up to its latest one are there."""
        self.run = self.run or self.init(**self.options)
        latest = dict(self.run.summary)
        suffix = "/step"
        return {
            key.removesuffix(suffix): set(range(int(step) + 1))
            for key, step in latest.items()
            if key.endswith(suffix)
        }

    def write(self, points: Points, settings: dict[str, str]) -> None:
        """Log a row for each step, in which each curve has a step of its own as its x-axis."""
        if len(settings) > self.num_settings:
            self.run.config.update(settings, allow_val_change=True)
            self.num_settings = len(settings)
        for key in points.keys() - self.axes:
            self.run.define_metric(f"{key}/step", hidden=True)
            self.run.define_metric(key, step_metric=f"{key}/step")
            self.axes.add(key)
        for step in sorted({step for curve in points.values() for step in curve}):
            row = {key: curve[step] for key, curve in points.items() if step in curve}
            self.run.log(row | {f"{key}/step": step for key in row})

    def close(self, outcome: str) -> None:
        """Send what is left."""
        self.run.finish(exit_code=0 if outcome == "FINISHED" else 1)


# By what a job says; each takes the run and the name under which it is tracked.
TRACKERS: dict[str, Callable[[Run, str], Tracker]] = {
    "mlflow": MLflow,
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
}
