"""The verbs of the command line that work on a run: options -> job -> one call -> print.

Nothing heavy is imported before a verb needs it: `nasray --help` must answer at once.
"""

import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

import nasray
from nasray.cli_front import front
from nasray.cli_spaces import latency, measure_latency, parse_arch, profile, show, spaces
from nasray.errors import EvaluationError, UserError

logger = logging.getLogger(__name__)


class Verbs(click.Group):
    """Prints a user's mistake as one line; every other failure keeps its traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.ClickException("stopped; the same command goes on from here") from None
        except (UserError, EvaluationError) as error:
            raise click.ClickException(" ".join(str(error).split())) from None
        except OSError as error:  # pyarrow's name the file in their text
            named = error.errno is not None and error.filename is not None
            text = f"{error.filename}: {error.strerror}" if named else str(error)
            if not named and error.errno is None and type(error) is not OSError:
                raise
            raise click.ClickException(" ".join(text.split())) from None


@click.group(cls=Verbs)
@click.version_option(nasray.__version__)
@click.option("--verbose", is_flag=True, help="Show what Ray and the workers say, too.")
def main(verbose: bool) -> None:
    """Find image classifiers that fit your budget, on a laptop or a Ray cluster."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("nasray").setLevel(logging.DEBUG if verbose else logging.INFO)


for verb in (spaces, profile, show, measure_latency, latency, front):
    main.add_command(verb)

job_argument = click.argument("job")
run_argument = click.argument("run_dir")
data_option = click.option(
    "--data", "data_path", help="Where the data set lies, instead of the job's data.path."
)
address_option = click.option(
    "--address",
    envvar="RAY_ADDRESS",
    help="Ray cluster to use, e.g. auto; without it, this machine.",
)


@main.command()
@job_argument
@run_argument
@data_option
@address_option
def run(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Do the whole of JOB in RUN_DIR: data, train, search, retrain, export, report.

    RUN_DIR is a folder or a URI such as s3://bucket/run. If it was stopped, by whatever,
    the same command goes on where it stopped.
    """
    from nasray import stages
    from nasray.report import build_report

    with _opened(run_dir, job, data_path) as opened:
        stages.prepare_data(opened)
        stages.check(opened)
        with _ray(address, opened.job):
            stages.train(opened)
            stages.search(opened)
            results = stages.retrain(opened)
        exported = stages.export(opened)
        page = build_report(opened.folder)
        _summarise(opened, results, exported, page)


@main.group()
def data() -> None:
    """Data sets."""


@data.command("import")
@click.argument(
    "source", type=click.Choice(["imagefolder", "tar", "cifar10", "fashion_mnist", "synthetic"])
)
@click.argument("destination")
@click.option("--path", default="", help="Folder or file of the source.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Order of the records."
)
def data_import(source: str, destination: str, path: str, seed: int) -> None:
    """Turn SOURCE into Parquet shards of encoded images at DESTINATION.

    DESTINATION is a folder or a URI. A job then names it: source = "parquet".
    """
    from nasray import stages, storage
    from nasray.config import parse_job

    _check_torch()
    job = parse_job({"data": {"source": source, "path": path}}, "nasray data import")
    if storage.exists(storage.join(destination, "dataset.json")):
        raise UserError(f"{destination} holds a data set already; remove it or name another folder")
    info = stages.import_shown(job.data, storage.absolute(destination), seed=seed)
    click.echo(
        f"{destination}: {info.num_train} training and {info.num_val} validation images, "
        f"{len(info.classes)} classes, {info.num_skipped} skipped"
    )


@main.command()
@job_argument
@run_argument
@data_option
@address_option
def train(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Train the supernet of JOB into RUN_DIR/supernet.pt, or go on with it."""
    from nasray import stages

    with _opened(run_dir, job, data_path) as opened:
        stages.prepare_data(opened)
        stages.check(opened)
        with _ray(address, opened.job):
            stages.train(opened)
        click.echo(opened.supernet_path)


@main.command()
@job_argument
@run_argument
@click.option(
    "--verify",
    is_flag=True,
    help="Let a predictor propose what is evaluated, and refit it (search.verify).",
)
@data_option
@address_option
def search(
    job: str, run_dir: str, verify: bool, data_path: str | None, address: str | None
) -> None:
    """Search the supernet in RUN_DIR, or go on with the search recorded there.

    Prints the answers: with several limits on one cost, the best for each of them.
    """
    from nasray import stages, storage

    with _opened(run_dir, job, data_path, verify) as opened, _ray(address, opened.job):
        stages.search(opened)
        one_by_one = opened.job.search.one_by_one
        answers = storage.read_json(opened.path("search.json"))["answers"]
        for entry in answers if one_by_one else storage.read_json(opened.path("top.json")):
            click.echo(json.dumps(entry))


@main.command()
@run_argument
@click.argument("archs", nargs=-1, required=True, metavar="ARCH...")
@data_option
@address_option
def evaluate(
    run_dir: str, archs: tuple[str, ...], data_path: str | None, address: str | None
) -> None:
    """Print top-1 (BN recalibrated, hold-out images) and costs of each ARCH as JSON lines.

    ARCH is a published name or a JSON object such as {"block": [...], "channel": [...]}.
    """
    from nasray import stages

    with _opened(run_dir, None, data_path) as opened:
        parsed = [parse_arch(opened.space, text) for text in archs]
        stages.require_supernet(opened)
        with _ray(address, opened.job):
            for line in stages.evaluate(opened, parsed):
                click.echo(json.dumps(line))


@main.command("fit-predictor")
@run_argument
@click.option(
    "--sample", type=click.IntRange(0), default=0, help="Evaluate so many random ones first."
)
@data_option
@address_option
def fit_predictor(run_dir: str, sample: int, data_path: str | None, address: str | None) -> None:
    """Fit an accuracy predictor to what RUN_DIR has evaluated: RUN_DIR/predictor/.

    Prints how well it predicts evaluations that it was not fitted to.
    """
    from nasray.fit import fit_predictor

    with _opened(run_dir, None, data_path) as opened, _ray(address, opened.job):
        found = fit_predictor(opened, sample)
        shown = ("predictor", "num_evaluations", "rmse", "kendall_tau")
        click.echo(json.dumps({key: found[key] for key in shown}))


@main.command()
@job_argument
@run_argument
@data_option
@address_option
def retrain(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Train the winners of the search in RUN_DIR from scratch, under Ray Tune."""
    from nasray import stages

    with _opened(run_dir, job, data_path) as opened, _ray(address, opened.job):
        for result in stages.retrain(opened):
            click.echo(json.dumps(result))


@main.command()
@run_argument
@data_option
def export(run_dir: str, data_path: str | None) -> None:
    """Write the retrained models of RUN_DIR as ONNX, checked against torch."""
    from nasray import stages

    with _opened(run_dir, None, data_path) as opened:
        for found in stages.export(opened):
            click.echo(json.dumps(found))


@main.command()
@run_argument
def report(run_dir: str) -> None:
    """Write RUN_DIR/report.html from whatever the run has found so far."""
    from nasray import storage
    from nasray.report import build_report

    click.echo(build_report(storage.absolute(run_dir)))


@contextmanager
def _opened(
    run_dir: str, job: str | None = None, data_path: str | None = None, verify: bool = False
) -> Iterator[Any]:
    from nasray import run, storage
    from nasray.config import load_job

    _check_torch()
    in_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_ray_job and not storage.is_uri(run_dir) and not os.path.isabs(run_dir):
        click.echo(
            f"Warning: RUN_DIR {run_dir} lies in this Ray job's working directory, which Ray "
            "deletes; use an absolute path or a URI",
            err=True,
        )
    if job is None:
        with run.opened(run_dir, data_path=data_path) as opened:
            yield opened
        return
    loaded = load_job(job, data_path)
    if verify:
        search_config = loaded.search.model_copy(update={"verify": True})
        loaded = loaded.model_copy(update={"search": search_config})
    run.check_names(loaded, job)
    with run.opened(run_dir, loaded) as opened:
        yield opened


@contextmanager
def _ray(address: str | None, job: Any) -> Iterator[None]:
    """Connect to the cluster at `address`, or start one on this machine that ends with us.

    Ray's own words are left out unless --verbose asks for them: its bars and tables say what
    ours do. Its errors stay.
    """
    # Threads that wait must sleep: on a machine that does other things too, spinning ones
    # make two threads slower than one, up to twentyfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Training waits at the end of an epoch for the next of these checks.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Tune would take Ctrl-C for the end of its trials, and half-trained ones for results.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    verbose = click.get_current_context().find_root().params["verbose"]
    if not verbose:
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's tables, whatever its `verbose`

    import ray

    # The token of a cluster on this machine is Ray's affair from beginning to end.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options = {
        "log_to_driver": verbose,
        "logging_level": logging.INFO if verbose else logging.WARNING,
    }
    if address and address != "local":
        _check_reachable(address)
        try:
            ray.init(address=address, **options)
        except (
            ConnectionError,
            RuntimeError,  # of a cluster of another Ray or Python
            ValueError,
            ray.exceptions.AuthenticationError,
        ) as error:
            raise UserError(
                f"--address {address}: {error}; a cluster with token authentication needs "
                "RAY_AUTH_MODE=token and its token here, too"
            ) from None
        has, needs = ray.cluster_resources().get("CPU", 0), _needed_cpus(job.compute)
        if has < needs:
            logger.warning(
                "the cluster has %g CPUs and [compute] asks for %d: what finds no place waits "
                "until nodes join; lower num_workers or num_evaluators if none will",
                has,
                needs,
            )
    else:
        num_cpus = max(os.cpu_count() or 1, _needed_cpus(job.compute))
        ray.init(address="local", num_cpus=num_cpus, **options)
        if job.compute.device == "gpu" and not ray.cluster_resources().get("GPU"):
            ray.shutdown()
            raise UserError('compute.device = "gpu", but this machine has none; say "auto"')
    # Ray has its own answer to this signal, twenty lines of addresses.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Refuse a HOST:PORT where nothing listens; Ray would try for a quarter of an hour."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise UserError(
                f"--address {address}: no Ray cluster answers there ({error})"
            ) from None


def _needed_cpus(compute: Any) -> int:
    """The most CPUs that any stage of a job asks for at once."""
    return max(
        compute.num_workers * compute.cpus_per_worker,
        compute.num_evaluators * compute.cpus_per_evaluator,
        compute.concurrent_trials * compute.workers_per_trial * compute.cpus_per_trial,
    )


def _check_torch() -> None:
    """Say in one line that torch and torchvision are no pair, before a deep import does."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"torch and torchvision do not match ({str(error).splitlines()[0]}); install both "
            "from the same index: pip install 'torch>=2.14' 'torchvision>=0.29'"
        ) from None


def _summarise(opened: Any, results: list[dict], exported: list[dict], page: str) -> None:
    from nasray import storage

    found = storage.read_json(opened.path("search.json"))
    baseline = found["baseline"]
    click.echo()
    if baseline and baseline["random_mean_top1"] is not None:
        click.echo(
            f"Searched subnet, supernet weights, {baseline['num_images']} validation images: "
            f"{baseline['winner_top1']:.1%}; random subnets under the same limits: "
            f"{baseline['random_mean_top1']:.1%} (mean of {len(baseline['random_top1'])})"
        )
    for result in results:
        costs = result["costs"]
        click.echo(
            f"Retrained from scratch: {result['val_top1']:.1%} top-1 on "
            f"{result['num_val_images']} validation images, {costs['params'] / 1e6:.2f} M "
            f"parameters, {costs['macs'] / 1e6:.1f} M MACs"
        )
    for name, path in (
        ("Report", page),
        ("Pareto front", opened.path("front.json")),
        *(("ONNX", entry["file"]) for entry in exported),
    ):
        click.echo(f"{name + ':':<14}{path}")
