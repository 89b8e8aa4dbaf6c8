"""The verbs that work on a run: options -> job -> one call -> print.

Nothing heavy is imported before a verb needs it: `nasray --help` must answer at once.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from nasray.cli.options import address_option, parse_arch, ray_cluster
from nasray.data import SOURCES
from nasray.errors import UserError

job_argument = click.argument("job")
run_argument = click.argument("run_dir")
data_option = click.option(
    "--data", "data_path", help="Where the data set lies, instead of the job's data.path."
)


@click.command()
@job_argument
@run_argument
@data_option
@address_option
def run(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Do the whole of JOB in RUN_DIR: data, train, search, retrain, export, report.

    RUN_DIR is a folder or a URI such as s3://bucket/run. If it was stopped, by whatever,
    the same command goes on where it stopped.
    """
    from nasray.export import require_packages
    from nasray.pipeline import search as searching
    from nasray.pipeline import stages
    from nasray.report.build import build_report

    require_packages("the model that a run ends with")
    with _opened(run_dir, job, data_path) as opened:
        stages.prepare_data(opened)
        stages.check(opened)
        with ray_cluster(address, opened.job.compute):
            stages.train(opened)
            searching.search(opened)
            results = stages.retrain(opened)
        exported = stages.export(opened)
        page = build_report(opened.folder)
        _summarise(opened, results, exported, page)


@click.group()
def data() -> None:
    """Data sets."""


@data.command("import")
@click.argument("source", type=click.Choice(list(SOURCES)))
@click.argument("destination")
@click.option("--path", default="", help="Folder or file of the source.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Order of the records."
)
def data_import(source: str, destination: str, path: str, seed: int) -> None:
    """Turn SOURCE into Parquet shards of encoded images at DESTINATION.

    DESTINATION is a folder or a URI. A job then names it: source = "parquet".
    """
    from nasray.config import parse_job
    from nasray.pipeline import stages
    from nasray.storage import files as storage

    _check_torch()
    job = parse_job({"data": {"source": source, "path": path}}, "nasray data import")
    if storage.exists(storage.join(destination, "dataset.json")):
        raise UserError(f"{destination} holds a data set already; remove it or name another folder")
    info = stages.import_shown(job.data, storage.absolute(destination), seed=seed)
    click.echo(
        f"{destination}: {info.num_train} training and {info.num_val} validation images, "
        f"{len(info.classes)} classes, {info.num_skipped} skipped"
    )


@click.command()
@job_argument
@run_argument
@data_option
@address_option
def train(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Train the supernet of JOB into RUN_DIR/supernet.pt, or go on with it."""
    from nasray.pipeline import stages

    with _opened(run_dir, job, data_path) as opened:
        stages.prepare_data(opened)
        stages.check(opened)
        with ray_cluster(address, opened.job.compute):
            stages.train(opened)
        click.echo(opened.supernet_path)


@click.command()
@job_argument
@run_argument
@click.option(
    "--verify",
    is_flag=True,
    help="Let a predictor propose what is evaluated, and refit it: search.verify = true.",
)
@data_option
@address_option
def search(
    job: str, run_dir: str, verify: bool, data_path: str | None, address: str | None
) -> None:
    """Search the supernet in RUN_DIR, or go on with the search recorded there.

    Prints the answers: with several limits on one cost, the best for each of them.
    """
    from nasray.pipeline import search as searching
    from nasray.pipeline import stages
    from nasray.storage import files as storage

    with _opened(run_dir, job, data_path, verify) as opened:
        searching.require_supernet(opened)
        stages.check(opened)
        with ray_cluster(address, opened.job.compute):
            searching.search(opened)
        name, key = (
            ("search.json", "answers") if opened.job.search.one_by_one else ("top.json", None)
        )
        found = storage.read_json(opened.path(name))
        for entry in found[key] if key else found:
            click.echo(json.dumps(entry))


@click.command()
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
    from nasray.pipeline import search as searching

    with _opened(run_dir, None, data_path) as opened:
        parsed = [parse_arch(opened.space, text) for text in archs]
        searching.require_supernet(opened)
        with ray_cluster(address, opened.job.compute):
            for line in searching.evaluate(opened, parsed):
                click.echo(json.dumps(line))


@click.command("calibration-study")
@run_argument
@click.option(
    "--archs", "num_archs", type=click.IntRange(3), default=30, show_default=True, help="How many."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@data_option
@address_option
def calibration_study(
    run_dir: str, num_archs: int, seed: int, data_path: str | None, address: str | None
) -> None:
    """Compare ways and image counts of BN recalibration on random subnets of RUN_DIR.

    One line each: mean top-1, rank correlation with the most images, seconds a subnet.
    """
    with _opened(run_dir, None, data_path) as opened:
        with ray_cluster(address, opened.job.compute):
            from nasray.pipeline.calibration_study import calibration_study

            found = calibration_study(opened, num_archs, seed)
    for row in found["rows"]:
        click.echo(json.dumps({key: value for key, value in row.items() if key != "top1"}))


@click.command("fit-predictor")
@run_argument
@click.option(
    "--sample",
    type=click.IntRange(0),
    default=0,
    help="Evaluate so many random ones first, in tens.",
)
@data_option
@address_option
def fit_predictor(run_dir: str, sample: int, data_path: str | None, address: str | None) -> None:
    """Fit an accuracy predictor to what RUN_DIR has evaluated: RUN_DIR/predictor/.

    Prints how well it predicts evaluations that it was not fitted to.
    """
    from nasray.pipeline import fit_predictor as fit

    with _opened(run_dir, None, data_path) as opened:
        if not fit.is_sampled(opened, sample):
            with ray_cluster(address, opened.job.compute):
                fit.sample(opened, sample)
        found = fit.fit_predictor(opened)
        shown = ("predictor", "num_evaluations", "num_held_out", "rmse", "kendall_tau")
        click.echo(json.dumps({key: found[key] for key in shown}))
        if found["kendall_tau"] <= 0:
            click.echo(
                "it orders architectures that it was not fitted to no better than chance: sample "
                "more, or train the supernet for longer",
                err=True,
            )


@click.command()
@job_argument
@run_argument
@data_option
@address_option
def retrain(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Train the winners of the search in RUN_DIR from scratch, under Ray Tune."""
    from nasray.pipeline import stages

    with _opened(run_dir, job, data_path) as opened, ray_cluster(address, opened.job.compute):
        for result in stages.retrain(opened):
            click.echo(json.dumps(result))


@click.command()
@run_argument
@data_option
def export(run_dir: str, data_path: str | None) -> None:
    """Write the retrained models of RUN_DIR as ONNX, checked against torch."""
    from nasray.pipeline import stages

    with _opened(run_dir, None, data_path) as opened:
        for found in stages.export(opened):
            click.echo(json.dumps(found))


@click.command()
@run_argument
def report(run_dir: str) -> None:
    """Write RUN_DIR/report.html from whatever the run has found so far."""
    from nasray.report.build import build_report
    from nasray.storage import files as storage

    click.echo(build_report(storage.absolute(run_dir)))


@contextmanager
def _opened(
    run_dir: str, job: str | None = None, data_path: str | None = None, verify: bool = False
) -> Iterator[Any]:
    from nasray.config import load_job, parse_job
    from nasray.pipeline import run
    from nasray.storage import files as storage

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
        values = loaded.model_dump()
        loaded = parse_job(values | {"search": values["search"] | {"verify": True}}, job)
    run.check_names(loaded, job)
    with run.opened(run_dir, loaded) as opened:
        yield opened


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
    from nasray.storage import files as storage

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
