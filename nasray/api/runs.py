"""Runs: `nasray.run`, `nasray.open` and the handle that they return; importing data."""

import os
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nasray.api.spaces import AnyArchitecture, DesignSpace
from nasray.config import Job, load_job, parse_job, with_absolute_paths
from nasray.costs.micronet import INT8_KINDS, NOT_INT8_KINDS
from nasray.doctor import check_torch
from nasray.errors import UserError
from nasray.storage import files as storage
from nasray.storage import layout

if TYPE_CHECKING:
    from nasray.costs.micronet import Int8, Score
    from nasray.pipeline.run import Run
    from nasray.pipeline.stages import DatasetInfo
    from nasray.pipeline.status import Stage

AnyPath = str | os.PathLike[str]
AnyJob = AnyPath | Mapping[str, Any] | Job  # a TOML file, its content as a dict, or a checked job


def run(
    job: AnyJob,
    run_dir: AnyPath,
    *,
    data_path: AnyPath | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> "RunDirectory":
    """Do the whole of a job: data, train, search, retrain, export, report.

    What `run_dir` already holds is not done again, so the same call resumes a run that was
    stopped. The arguments are those of `nasray.open`.

    Raises:
        UserError: a mistake in the job, the data or the environment; one line with its fix.
        EvaluationError: no architecture could be evaluated.
    """
    from nasray.export import require_packages
    from nasray.formats import require_formats

    require_packages("the model that a run ends with")
    handle = open(run_dir, job, data_path=data_path, address=address, verbose=verbose)
    from nasray.pipeline import exports, search, stages
    from nasray.pipeline.start import prepare_start
    from nasray.pipeline.tracking import tracked
    from nasray.report.build import build_report

    with handle._working() as opened, tracked(opened):
        require_formats(opened.job.export.formats, opened.job.export.pythons)
        stages.prepare_data(opened)
        stages.check(opened)
        prepare_start(opened)
        with handle._cluster(opened):
            stages.train(opened)
            search.search(opened)
            stages.retrain(opened)
        exports.export(opened)
        build_report(opened.folder)
    return handle


def open(
    run_dir: AnyPath,
    job: AnyJob | None = None,
    *,
    data_path: AnyPath | None = None,
    address: str | None = None,
    verbose: bool = False,
) -> "RunDirectory":
    """Return a handle on a run directory; nothing is written yet.

    Args:
        run_dir: a folder, or a URI such as s3://bucket/run.
        job: what to begin or to resume; without it, the job that `run_dir` records.
        data_path: where the data set lies, instead of the job's data.path.
        address: Ray cluster to use, e.g. "auto". Without it, the one this process is connected
            to, or else a new one on this machine for the time of each call.
        verbose: show the output of Ray and of its workers.

    Raises:
        UserError: the job is invalid, or there is none.
    """
    folder = storage.absolute(os.fspath(run_dir))
    data_path = None if data_path is None else os.fspath(data_path)
    if job is None:
        if not storage.exists(storage.join(folder, layout.JOB)):
            raise UserError(f"{folder} is not a run directory: it has no job.json")
        check_torch()
        return RunDirectory(folder, None, data_path, address, verbose)
    check_torch()
    from nasray.pipeline.run import check_names

    if isinstance(job, str | os.PathLike):
        origin = os.fspath(job)
        if "\n" in origin:
            raise UserError("the job is TOML text: give the path of its file, or a dict")
        parsed = load_job(origin, data_path)
    else:
        origin = "job"
        parsed = job if isinstance(job, Job) else parse_job(dict(job), origin)
        parsed = with_absolute_paths(parsed, data_path)
    check_names(parsed, origin)
    return RunDirectory(folder, parsed, data_path, address, verbose, origin)


def check_data(source: AnyPath, *, kind: str = "", **columns: str) -> dict[str, Any]:
    """Look through a data set before it is imported; return what `nasray data check --json` prints.

    Args:
        source: a folder, a tar, another file of images, a data set that was imported, or a job:
            then what is held out is what the job says.
        kind: of the source, as data.source in a job; without it, what `source` looks like.
        columns: of a table: image_column, label_column and split_column, as in a job.

    Raises:
        UserError: there is no data set, or it cannot be read.
    """
    from nasray.pipeline.run import check_names
    from nasray.pipeline.stages import survey_shown

    check_torch()
    path = os.fspath(source)
    if path.endswith(".toml") and not kind:
        job = load_job(path)
        if named := [f"data.{key}" for key, value in columns.items() if value]:
            raise UserError(f"{path} is a job: set {', '.join(named)} in it")
    else:
        values = {"data": {"source": kind or _kind_of(path), "path": path, **columns}}
        job = with_absolute_paths(parse_job(values, "nasray data check"))
    check_names(job, path)
    return survey_shown(job.data, seed=job.seed)


def _kind_of(path: str) -> str:
    """What data.source is for the data set at `path`, by its looks."""
    if not storage.exists(path):
        raise UserError(f"{path} does not exist; give a data set, or a job")
    names: set[str] = set()
    with suppress(NotADirectoryError):
        names = set(storage.list_names(path))
    if layout.DATASET in names:
        return "parquet"
    if names & {"dataset_info.json", "state.json", "dataset_dict.json"}:
        return "huggingface"
    by_suffix = {".csv": "csv", ".tsv": "csv", ".parquet": "table", ".pq": "table", ".tar": "tar"}
    suffix = os.path.splitext(path)[1].lower()
    return "imagefolder" if names else by_suffix.get(suffix, "imagefolder")


def import_data(
    source: str, destination: AnyPath, *, path: AnyPath = "", seed: int = 0, **columns: str
) -> "DatasetInfo":
    """Turn a data set into Parquet shards of encoded images; return its sizes and classes.

    Args:
        source: a kind of data set, as data.source in a job.
        destination: a folder or a URI; a job then names it with source = "parquet".
        path: folder or file of the source.
        seed: decides the order of the records.
        columns: image_column, label_column and split_column of a table, as in a job.

    Raises:
        UserError: `destination` holds a data set, or the source is not readable.
    """
    from nasray.pipeline.stages import import_shown

    check_torch()
    destination = os.fspath(destination)
    values = {"data": {"source": source, "path": os.fspath(path), **columns}}
    job = parse_job(values, "nasray data import")
    if storage.exists(storage.join(destination, layout.DATASET)):
        raise UserError(f"{destination} holds a data set already; remove it or name another folder")
    return import_shown(job.data, storage.absolute(destination), seed=seed)


@dataclass(frozen=True)
class RunDirectory:
    """A handle on one run directory, from `nasray.open` or `nasray.run`.

    Methods that compute hold the run's lock during the call and resume what is recorded; the
    lists and dicts they return are the content of the files that docs/run.md describes.
    """

    folder: str
    job: Job | None = None
    data_path: str | None = None
    address: str | None = None
    verbose: bool = False
    origin: str = "job"  # what an error in the job is said of

    def train(self) -> str:
        """Train the supernet on the cluster; return the path of its weights.

        Raises:
            UserError: training failed for a reason the user can mend.
        """
        from nasray.pipeline import stages
        from nasray.pipeline.start import prepare_start
        from nasray.pipeline.tracking import tracked

        with self._working() as opened, tracked(opened):
            stages.prepare_data(opened)
            stages.check(opened)
            prepare_start(opened)
            if not opened.job.supernet.epochs:
                return opened.supernet_path
            with self._cluster(opened):
                stages.train(opened)
            return opened.supernet_path

    def search(self, *, verify: bool | None = None) -> list[dict[str, Any]]:
        """Search the supernet on the cluster; return the answers.

        `verify` sets search.verify: with True, a predictor proposes what is evaluated. Without
        it, a search goes on as it was begun, and begins as the job says. A search that answers
        each limit by itself returns one answer per limit, in the order of the limits; others
        their answer and the others of their top k, the best one first.

        Raises:
            UserError: there is no supernet, or the search was begun with another job.
            EvaluationError: no architecture could be evaluated.
        """
        from nasray.pipeline import search, stages
        from nasray.pipeline.tracking import tracked

        with self._working(verify=verify) as opened, tracked(opened):
            search.require_supernet(opened)
            stages.check(opened)
            with self._cluster(opened):
                search.search(opened)
            summary = self.read(layout.SEARCH)
            if opened.job.search.one_by_one:
                return summary["answers"]
        winner = summary["winner"]
        return [winner, *(each for each in self.read(layout.TOP) if each != winner)]

    def evaluate(self, archs: Sequence[AnyArchitecture]) -> list[dict[str, Any]]:
        """Evaluate architectures on the cluster; return top-1 and costs, in their order.

        Top-1 is a fraction of the hold-out images, after BN recalibration; None with an
        "error" where the evaluation failed.

        Raises:
            UserError: there is no supernet, or an architecture is not one of the space.
        """
        from nasray.pipeline import search

        if isinstance(archs, str | Mapping):
            raise UserError(f"evaluate takes a list of architectures: [{archs!r}]")
        if not archs:
            return []
        with self._working() as opened:
            parsed = [DesignSpace(opened.space).architecture(arch) for arch in archs]
            search.require_supernet(opened)
            with self._cluster(opened):
                return search.evaluate(opened, parsed)

    def calibration_study(self, num_archs: int = 30, seed: int = 0) -> dict[str, Any]:
        """Compare numbers of BN recalibration images on random subnets, on the cluster.

        Raises:
            UserError: fewer than three architectures, of which no order can be compared.
        """
        if num_archs < 3:
            raise UserError(f"num_archs = {num_archs} must be 3 or more")
        with self._working() as opened, self._cluster(opened):
            from nasray.pipeline.calibration_study import calibration_study

            return calibration_study(opened, num_archs, seed)

    def fit_predictor(self, sample: int = 0) -> dict[str, Any]:
        """Fit an accuracy predictor to the run's evaluations; return its quality.

        `sample` random architectures are evaluated first, on the cluster, in tens.

        Raises:
            UserError: too few evaluations.
        """
        from nasray.pipeline import fit_predictor as fit

        if sample < 0:
            raise UserError(f"sample = {sample} must be 0 or more")
        with self._working() as opened:
            if not fit.is_sampled(opened, sample):
                with self._cluster(opened):
                    fit.sample(opened, sample)
            return fit.fit_predictor(opened)

    def rank(
        self,
        truth: AnyPath | None = None,
        *,
        value: str = "",
        sample: int | None = None,
        retrain: int = 0,
        epochs: int = 0,
    ) -> dict[str, Any]:
        """Compare the supernet's order of architectures with a true one, on the cluster.

        Args:
            truth: a CSV or JSON file of architectures and their true values, more being better.
            value: the column of these values, unless it has a usual name.
            sample: how many of them are drawn, or all if there are fewer; 100, if None.
            retrain: without `truth`, how many random architectures within the limits of the
                search's answer are trained from scratch for it.
            epochs: of each such training.

        Returns the content of RUN/rank.json: for the supernet, MACs and parameters Kendall's
        tau-b, Spearman's rho, the overlap of the best tenths and the regret, each with the ends
        of its 95 % interval, None where there is none; the supernet's tau-b minus that of MACs,
        in pairs; and what the search's answer is worth among those within its limits.

        Raises:
            UserError: there is no supernet, or the truth is not readable.
            EvaluationError: fewer than three architectures could be evaluated.
        """
        from nasray.pipeline import rank

        if bool(truth) == bool(retrain):
            raise UserError("give a file of true values (--truth), or --retrain K and --epochs E")
        without = {"--epochs": epochs} if truth else {"--value": value, "--sample": sample}
        if ignored := [option for option, given in without.items() if given]:
            this, other = ("--truth", "--retrain") if truth else ("--retrain", "--truth")
            raise UserError(f"{ignored[0]} goes with {other}, not with {this}; leave it out")
        if not truth and (retrain < 3 or epochs < 1):
            raise UserError(
                f"--retrain {retrain} --epochs {epochs}: an order takes three architectures or "
                "more, of one epoch or more"
            )
        sample = 100 if sample is None else sample
        if sample < 3:
            raise UserError(f"--sample {sample}: an order takes three architectures or more")
        with self._working() as opened:
            if truth:
                path = os.fspath(truth)
                values = rank.read_truth(path, opened.space, value)
                with self._cluster(opened):
                    return rank.rank(opened, values, sample, path)
            drawn, within = rank.draw_random(opened, retrain)
            with self._cluster(opened):
                values, of_pick = rank.train_some(opened, drawn, epochs)
                source = f"drawn within {within}, trained from scratch for {epochs} epochs"
                return rank.rank(opened, values, len(values), source, of_pick)

    def retrain(self, *, again: bool = False) -> list[dict[str, Any]]:
        """Give the answers of the search their weights, on the cluster; return their results.

        In the ways of the job's [retrain]: trained from scratch or from the supernet's weights
        on, or the supernet's. With `again`, all of them anew, and [retrain] may have changed; what
        is there is kept in earlier/.

        Raises:
            UserError: the search is not finished, or no recipe trained to the end.
        """
        from nasray.pipeline import stages
        from nasray.pipeline.tracking import tracked

        with self._working(again=again) as opened, tracked(opened), self._cluster(opened):
            return stages.retrain(opened)

    def export(
        self,
        precisions: Sequence[str] = (),
        max_drop: float | None = None,
        formats: Sequence[str] = (),
        pythons: Mapping[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        """Write the networks of retrain/ as ONNX; return the check of each file.

        Args:
            precisions: "fp16" and "int8", beside float32; those of the job, if none is given.
            max_drop: points of top-1 that int8 may cost on the hold-out images, else blocks stay
                float; the job's, if None.
            formats: "pt2", "weights", "openvino", "tflite" and "executorch", beside ONNX; those of
                the job, if none is given.
            pythons: by format, the Python of an environment that has its packages; for others the
                job's, or else this one.

        Raises:
            UserError: nothing is retrained, the [export] extra is not installed, or a package of a
                format.
            ExportError: a file does not compute what the network computes.
        """
        from nasray.pipeline.exports import export

        given: dict[str, Any] = {"precisions": precisions, "max_drop": max_drop}
        given |= {"formats": formats, "pythons": pythons}
        with self._working() as opened:
            chosen = {key: each for key, each in given.items() if each not in ((), [], {}, None)}
            return export(opened, **chosen)

    def report(self) -> str:
        """Write report.html from what the run holds so far; return its path.

        Raises:
            UserError: the run holds nothing to report.
        """
        from nasray.report.build import build_report

        return build_report(self.folder)

    def status(self) -> "list[Stage]":
        """Return the stages of the run in order: name, state ("done", "begun", "to do"), text."""
        from nasray.pipeline.status import stages

        return stages(self.folder)

    def front(self) -> list[dict[str, Any]]:
        """Return the Pareto front of the finished search, from the cheapest to the best.

        Raises:
            UserError: the search is not finished.
        """
        return self.read(layout.FRONT)

    def results(self) -> list[dict[str, Any]]:
        """Return the results of the networks whose retraining has ended, in their order."""
        names = storage.list_numbered(storage.join(self.folder, layout.RETRAIN))
        paths = [storage.join(self.folder, layout.retrained(n, layout.RESULT)) for n in names]
        return [storage.read_json(path) for path in paths if storage.exists(path)]

    def micronet(
        self, *, int8: "Int8 | None" = None, strict: bool = False
    ) -> "dict[str, list[Score]]":
        """Return the MicroNet scores of each such network by its name, its folder in retrain/.

        The arguments and a network's scores are those of DesignSpace.micronet(), but what is int8
        without `int8` is what export/<name>-int8.onnx computes in integers, if it is there.

        Raises:
            UserError: nothing is retrained, or a network has no operation of a kind in `int8`.
        """
        from nasray import checkpoint

        found = {}
        for name in storage.list_numbered(storage.join(self.folder, layout.RETRAIN)):
            if storage.exists(storage.join(self.folder, layout.retrained(name, layout.RESULT))):
                path = storage.join(self.folder, layout.retrained(name, layout.MODEL))
                space, arch, _, _ = checkpoint.load_subnet(path)
                chosen = self._exported_int8(name) if int8 is None else int8
                found[name] = DesignSpace(space).micronet(arch, int8=chosen, strict=strict)
        if not found:
            raise UserError(f"{self.folder} has no retrained model; run `nasray retrain` first")
        return found

    def _exported_int8(self, name: str) -> "Int8":
        """What the network `name` computes in integers as it was exported, or would by default."""
        done = layout.exported(f"{name}-int8", "json")
        if not storage.exists(storage.join(self.folder, done)):
            return INT8_KINDS
        left = self.read(done)["float_blocks"]
        return lambda op: op.block not in left and op.kind not in NOT_INT8_KINDS

    def exports(self) -> list[dict[str, Any]]:
        """Return the checks of the exported networks, in their order, with where each "file" is."""
        names = storage.list_numbered(storage.join(self.folder, layout.EXPORT))
        return [
            (said := self.read(layout.exported(name, "json")))
            | {"file": storage.join(self.folder, layout.EXPORT, posixpath.basename(said["file"]))}
            for name in (each.removesuffix(".json") for each in names if each.endswith(".json"))
        ]

    def read(self, name: AnyPath) -> Any:
        """Return the content of one of the run's JSON files, e.g. "retrain/0/result.json".

        Raises:
            UserError: there is no such file, or it is not readable.
        """
        path = storage.join(self.folder, os.fspath(name))
        if not storage.exists(path):
            raise UserError(f"{path} is not there yet; see `nasray status {self.folder}`")
        return storage.read_json(path)

    @contextmanager
    def _working(self, *, verify: bool | None = None, again: bool = False) -> "Iterator[Run]":
        """Hold the run's lock, with its job checked against the recorded one.

        `verify` replaces the job's search.verify; None: by that of a search that was begun.
        With `again`, what was retrained is set aside.
        """
        from nasray.pipeline.run import is_search_begun, opened, recorded_job
        from nasray.pipeline.stages import check_data

        recorded = recorded_job(storage.join(self.folder, layout.JOB), self.data_path)
        if verify is None and recorded and recorded.search.verify and is_search_begun(self.folder):
            verify = True
        job = self.job if verify is None else self.job or recorded
        if job and verify is not None:
            values = job.model_dump()
            values |= {"search": values["search"] | {"verify": verify}}
            job = parse_job(values, self.origin)
        data_path = None if job else self.data_path
        with opened(self.folder, job, data_path, again=again, check=check_data) as found:
            yield found

    def _cluster(self, opened: "Run") -> AbstractContextManager[None]:
        from nasray.cluster.connect import ray_cluster

        return ray_cluster(self.address, opened.job.compute, verbose=self.verbose)
