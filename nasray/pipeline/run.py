"""A run directory opened for work: its job, data set, space, limits and evaluations.

storage/layout.py names its files; the stages (stages.py) write them.
"""

import logging
import platform
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version

from nasray import checkpoint
from nasray.algorithms import ALGORITHMS
from nasray.config import (
    ExportConfig,
    Job,
    RetrainConfig,
    SearchConfig,
    TrackingConfig,
    parse_job,
    with_absolute_paths,
)
from nasray.costs.latency import LatencyTable
from nasray.costs.table import check_cost
from nasray.data import check_source
from nasray.data.decoding import make_decoder
from nasray.data.shards import Dataset, open_dataset
from nasray.errors import UserError, did_you_mean
from nasray.search.candidate import Candidate, fully_evaluated
from nasray.search.history import SINGLE, SOURCE, History
from nasray.search.limits import LATENCY, Limits
from nasray.spaces import make_space
from nasray.spaces.space import Space
from nasray.storage import files as storage
from nasray.storage import layout, locks
from nasray.version import __version__

logger = logging.getLogger(__name__)

# Keys that may change when a run is resumed: the place of the data, the part of the cluster that
# is used, and what is written or shown of it, on which results do not depend.
FREE_KEYS = {
    *(("tracking", key) for key in TrackingConfig.model_fields),
    *(("export", key) for key in ExportConfig.model_fields),
    ("data", "path"),
    ("data", "loader_workers"),
    ("compute", "num_evaluators"),
    ("compute", "gpus_per_evaluator"),
    ("compute", "concurrent_winners"),
    ("compute", "max_failures"),
    ("compute", "time_limit_s"),
    # These may choose other GPUs or kernels, whose results differ in the last digits.
    ("retrain", "compile"),
    ("compute", "accelerator_type"),
    ("compute", "worker_labels"),
    ("compute", "evaluator_labels"),
}

# What retraining runs on. With all of [retrain], it may change until there is a retrained network.
TRIAL_KEYS = {
    ("compute", "cpus_per_trial"),
    ("compute", "concurrent_trials"),
    ("compute", "workers_per_trial"),
}
# Of [retrain]: these do not change what a trial that has begun does.
NOT_OF_A_TRIAL = {"compile", "num_winners", "also"}

# What a search and what follows it leave in a run directory.
SEARCHED = (
    *(layout.HISTORY, layout.SEARCH, layout.FRONT, layout.TOP, layout.PREDICTOR, layout.RANK),
    *(layout.RANKED, layout.RETRAIN, layout.EXPORT, layout.REPORT),
)
START_KEYS = ("init", "teacher")  # of [supernet]: files, which may move but not change

# All keys of [search] may change until something is evaluated, and all but these until the search
# begins: the samples for a predictor depend on these.
EVALUATION_KEYS = {"calibration_images", "batch_size", "latency_table", "fitness"}

# And these until the supernet is trained, if that is within the limits of the search.
BAND_KEYS = {"limits", "latency_table", "algorithm", "verify"}


@dataclass(frozen=True)
class Run:
    """A run directory and its job, held by this process. What is read is kept."""

    folder: str
    job: Job

    @property
    def data_path(self) -> str:
        """The folder of the imported data set."""
        if self.job.data.source == "parquet":
            return storage.absolute(self.job.data.path)
        return self.path(layout.DATA)

    @cached_property
    def dataset(self) -> Dataset:
        """The run's data set.

        Raises:
            UserError: it is not the one that the run was started with.
        """
        dataset = open_dataset(self.data_path)
        recorded = self.path(layout.FINGERPRINT)
        if not storage.exists(recorded):
            storage.write_json(recorded, dataset.fingerprint)
        elif storage.read_json(recorded) != dataset.fingerprint:
            raise UserError(
                f"{self.folder} was started with another data set than {self.data_path}; "
                "give that one (data.path, --data), or use another run directory"
            )
        return dataset

    @cached_property
    def space(self) -> Space:
        """The job's space, for the classes of the data set.

        Raises:
            UserError: the data set is not the run's, or the space refuses an option.
        """
        return make_space(self.job.space, len(self.dataset.classes))

    @cached_property
    def limits(self) -> Limits:
        """The limits of the job's search on costs of the space.

        Raises:
            UserError: a limit is on an unknown cost, or out of reach.
        """
        return Limits(self.space, self.job.search.limits, self.latency)

    @cached_property
    def latency(self) -> LatencyTable | None:
        """The latency table that the job names, in ms, if it names one.

        Raises:
            UserError: the table is absent, damaged, of another space, or lacks a block.
        """
        path = self.job.search.latency_table
        return LatencyTable.load(path, self.space) if path else None

    @property
    def supernet_path(self) -> str:
        """The path of the trained supernet, RUN/supernet.pt."""
        return self.path(layout.SUPERNET)

    @cached_property
    def supernet_digest(self) -> str:
        """The hash of the run's supernet.

        Raises:
            UserError: the recorded evaluations are of another supernet.
        """
        recorded = self.path(layout.SUPERNET_DIGEST)
        digest = checkpoint.digest(self.supernet_path)
        if not storage.exists(recorded):
            storage.write_json(recorded, digest)
        elif storage.read_json(recorded) != digest:
            raise UserError(
                f"{self.supernet_path} is not the file that {self.path(layout.HISTORY)} tells of; "
                "restore it, or remove history/ and search.json to evaluate the new one"
            )
        return digest

    @cached_property
    def history(self) -> History:
        """What the search has evaluated, read once."""
        return History(self.path(layout.HISTORY))

    @property
    def candidates(self) -> list[Candidate]:
        """What the search has evaluated in full."""
        return fully_evaluated(self.history.candidates)

    @cached_property
    def listed(self) -> History:
        """What `nasray evaluate` was given, read once."""
        return History(self.path(layout.HISTORY), "listed")

    @cached_property
    def sample(self) -> History:
        """The random architectures that were evaluated to fit a predictor, read once."""
        return History(self.path(layout.HISTORY), "sample")

    @property
    def begun(self) -> bool:
        """Whether there are results that depend on the job and its images."""
        return _begun(self.folder)

    def path(self, *names: str) -> str:
        """The path of a file of layout.py in this run directory."""
        return storage.join(self.folder, *names)


@contextmanager
def opened(
    folder: str,
    job: Job | None = None,
    data_path: str | None = None,
    *,
    again: bool = False,
    check: Callable[[Run], None] = lambda run: None,
) -> Iterator[Run]:
    """Hold a run directory during the block; with a `job`, start a run or resume it.

    Without a job, `data_path` is the new place of a data set that was moved. With `again`, what
    was retrained is set aside, and the job may have another [retrain]. What `check` refuses leaves
    the recorded job as it was.

    Raises:
        UserError: another process holds it, it has no job, it was recorded with another one, or the
            decoder or a file that the job names is not there.
    """
    folder = storage.absolute(folder)
    recorded_path = storage.join(folder, layout.JOB)
    if job is None and not storage.exists(recorded_path):
        raise UserError(f"{folder} is not a run directory: it has no job.json")
    with locks.held(folder):
        recorded = recorded_job(recorded_path, data_path)
        job = job or recorded
        if job is None or (recorded is None and _begun(folder)):
            raise UserError(f"{recorded_path} is gone; restore it, or use another folder")
        check(Run(folder, job))
        if recorded is not None and again:
            _check_same(recorded, job, folder, again=True)
            _set_aside(folder)
        if recorded != job:
            if recorded is not None and _begun(folder):
                _check_same(recorded, job, folder)
                if _trials_differ(recorded, job):
                    _set_aside(folder)
            else:
                _check_start(job)  # before hours of import, as the decoder
                for made in (layout.FINGERPRINT, layout.START):
                    storage.remove(storage.join(folder, made))
            make_decoder(job.data.decoder)
            _record_job(recorded_path, job)
        yield Run(folder, job)


def check_names(job: Job, origin: str) -> None:
    """Refuse, before any work, names of sources, spaces, algorithms and costs there are not."""
    try:
        check_source(job.data)
        _check_algorithm(job.search.algorithm)
        make_space(job.space, 10)
        for limit in job.search.limits:
            if limit.cost != LATENCY:
                check_cost(limit.cost)
            elif not job.search.latency_table:
                raise UserError(f"search.limits: {LATENCY} needs search.latency_table = PATH")
    except UserError as error:
        raise UserError(f"{origin}: {error}") from None


def _check_algorithm(name: str) -> None:
    """Refuse an algorithm that is not in the table.

    Raises:
        UserError: as said.
    """
    if name not in ALGORITHMS:
        hint = did_you_mean(name, ALGORITHMS) or ";"
        raise UserError(
            f"search.algorithm = {name!r} is unknown{hint} there are {', '.join(ALGORITHMS)}"
        )


def recorded_job(path: str, data_path: str | None) -> Job | None:
    """Return the job in the job.json at `path`; None if there is no such file."""
    if not storage.exists(path):
        return None
    content = storage.read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("job"), dict):
        raise UserError(f"{path}: not written by nasray; restore or remove it")
    job = parse_job(content["job"], path)
    try:
        _check_algorithm(job.search.algorithm)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return with_absolute_paths(job, data_path)


def _begun(folder: str) -> bool:
    """Whether there are results that depend on the job."""
    made = (layout.SUPERNET, layout.TRAIN, layout.TEACHER_RUN, layout.HISTORY, layout.RETRAIN)
    return any(storage.exists(storage.join(folder, name)) for name in made)


def is_search_begun(folder: str) -> bool:
    """Whether a search has evaluated anything in this run directory."""
    files, _ = storage.list_below(storage.join(folder, layout.HISTORY))
    return any(file.startswith((f"{SOURCE}-", f"{SINGLE}/{SOURCE}/")) for file in files)


def _free_keys(folder: str, recorded: Job, *, again: bool) -> set[tuple[str, str]]:
    """The keys of the job that may still change, by what has been evaluated and retrained."""
    free = set(FREE_KEYS)
    if again or not is_retrained(folder):
        free |= TRIAL_KEYS | {("retrain", key) for key in RetrainConfig.model_fields}
    if is_search_begun(folder):
        return free
    files, _ = storage.list_below(storage.join(folder, layout.HISTORY))
    keys = set(SearchConfig.model_fields)
    notes = {layout.SUPERNET_DIGEST, layout.SEARCH_INPUTS, layout.PRECISION}
    if {storage.join(layout.HISTORY, file) for file in files} - notes:
        keys -= EVALUATION_KEYS
    is_trained = storage.exists(storage.join(folder, layout.SUPERNET))
    if recorded.supernet.within_limits and not is_trained:
        keys -= BAND_KEYS
    return free | {("search", key) for key in keys}


def is_retrained(folder: str) -> bool:
    """Whether a network has been retrained to the end."""
    names = storage.list_names(storage.join(folder, layout.RETRAIN))
    paths = [storage.join(folder, layout.retrained(name, layout.RESULT)) for name in names]
    return any(map(storage.exists, paths))


def _check_same(recorded: Job, job: Job, folder: str, *, again: bool = False) -> None:
    """Refuse to resume a run with another job.

    Raises:
        UserError: names the first difference.
    """
    free = _free_keys(folder, recorded, again=again)
    old, new = recorded.model_dump(), job.model_dump()
    # More ways of retraining may be added.
    new["retrain"]["also"] = new["retrain"]["also"][: len(old["retrain"]["also"])]
    for section, value in new.items():
        pairs = (
            [
                ((section, key), old[section].get(key), value.get(key))
                for key in {**old[section], **value}
            ]
            if isinstance(value, dict)
            else [((section,), old[section], value)]
        )
        for keys, before, after in pairs:
            if keys not in free and before != after and not _is_moved(folder, keys, after):
                way_out = "use another run directory, or the recorded value"
                if section == "search" and not storage.is_uri(folder):
                    of_copy = " ".join(f"COPY/{each}" for each in SEARCHED)
                    way_out += "; to search the same supernet again: "
                    way_out += f"cp -r {shlex.quote(folder)} COPY; rm -rf {of_copy}"
                if section == "retrain" or keys in TRIAL_KEYS:
                    way_out = (
                        f"use the recorded value, or `nasray retrain JOB {folder} --again`, which "
                        f"keeps the networks that are there in {layout.EARLIER}/ and retrains"
                    )
                raise UserError(
                    f"{folder} was recorded with {'.'.join(keys)} = {before!r}, the job says "
                    f"{after!r}; {way_out}"
                )


def _trials_differ(recorded: Job, job: Job) -> bool:
    """Whether a trial that was begun by one job cannot go on by the other."""
    pairs = zip(recorded.retrain.ways, job.retrain.ways, strict=False)
    return recorded.compute.workers_per_trial != job.compute.workers_per_trial or any(
        before.model_dump(exclude=NOT_OF_A_TRIAL) != after.model_dump(exclude=NOT_OF_A_TRIAL)
        for before, after in pairs
    )


def _set_aside(folder: str) -> None:
    """Move what was retrained, and its exports, to RUN/earlier/<n>/, with the job of both."""
    earlier = storage.join(folder, layout.EARLIER)
    numbers = [int(name) for name in storage.list_names(earlier) if name.isdigit()]
    place = storage.join(earlier, str(max(numbers, default=0) + 1))
    # Exports first: should this be interrupted, none may be taken for one of a network to come.
    found = [
        name
        for name in (layout.EXPORT, layout.RETRAIN)
        if storage.exists(storage.join(folder, name))
    ]
    if not found:
        return
    content = storage.read(storage.join(folder, layout.JOB))
    storage.write(storage.join(place, layout.JOB), content)
    for name in found:
        storage.move(storage.join(folder, name), storage.join(place, name))
    logger.info("What was retrained before is in %s now", place)


def _check_start(job: Job) -> None:
    """Refuse files of weights that are not there.

    Raises:
        UserError: names the key.
    """
    for key in START_KEYS:
        file = getattr(job.supernet, key)
        if file and not storage.is_url(file) and not storage.exists(file):
            raise UserError(f"supernet.{key} = {file} does not exist; give the path of a file")


def _is_moved(folder: str, keys: tuple[str, ...], path: str | None) -> bool:
    """Whether the file of weights that a run began with now lies at `path`.

    The working directory of `nasray submit` is another one each time.
    """
    recorded = storage.join(folder, layout.START_DIGESTS)
    is_one = keys[0] == "supernet" and keys[-1] in START_KEYS and storage.exists(recorded)
    if not is_one or not path or storage.is_url(path) or not storage.exists(path):
        return False
    return checkpoint.digest(path) == storage.read_json(recorded).get(keys[-1])


def _record_job(path: str, job: Job) -> None:
    """Write `job` and the versions at work; the time of a run's first start stays."""
    before = storage.read_json(path) if storage.exists(path) else {}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # Versions come from package metadata: cluster.connect sets Ray's environment before the
    # first `import ray`.
    versions = {name: version(name) for name in ("ray", "torch", job.data.decoder)}
    content = {
        "job": job.model_dump(),
        "versions": {"nasray": __version__, **versions, "python": platform.python_version()},
        "started": before.get("started", now),
    }
    storage.write_json(path, content)
