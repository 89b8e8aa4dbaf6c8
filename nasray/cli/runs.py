"""The verbs that work on a run: options -> one call of the API -> print.

Nothing heavy is imported before a verb needs it: `nasray --help` must answer at once.
"""

import json
import math
import os
from typing import TYPE_CHECKING, Any

import click

import nasray
from nasray.cli.options import address_option, is_verbose, python_option, pythons_of
from nasray.data import SOURCES

if TYPE_CHECKING:
    from nasray import RunDirectory

job_argument = click.argument("job")
run_argument = click.argument("run_dir")
MAX_ROWS = 40  # of classes, on the screen
WEIGHTS = {  # by what result.json says was shipped
    "supernet": "With the supernet's weights",
    "fine-tuned": "Fine-tuned",
    "scratch": "Retrained from scratch",
}
data_option = click.option(
    "--data", "data_path", help="Path of the data set, instead of the job's data.path."
)


@click.command()
@job_argument
@run_argument
@data_option
@address_option
def run(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Do the whole of JOB in RUN_DIR: data, train, search, retrain, export, report.

    RUN_DIR is a folder or a URI such as s3://bucket/run. The same command resumes a run that
    was stopped.
    """
    _warn_of_lost_results(run_dir)
    _summarise(nasray.run(job, run_dir, data_path=data_path, address=address, verbose=is_verbose()))


def column_options(verb: Any) -> Any:
    """The options that name the columns of a table of images."""
    for name, what in (
        ("--split-column", "train or val"),
        ("--label-column", "names of classes"),
        ("--image-column", "paths, or encoded images"),
    ):
        verb = click.option(name, default="", help=f"Of a table: {what}.")(verb)
    return verb


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
@column_options
def data_import(source: str, destination: str, path: str, seed: int, **columns: str) -> None:
    """Turn SOURCE into Parquet shards of encoded images at DESTINATION.

    DESTINATION is a folder or a URI. A job then names it: source = "parquet".
    """
    info = nasray.import_data(source, destination, path=path, seed=seed, **columns)
    click.echo(
        f"{destination}: {info.num_train} training and {info.num_val} validation images, "
        f"{len(info.classes)} classes, {info.num_skipped} skipped"
    )
    _print_findings(nasray.check_data(destination, kind="parquet"))


@data.command("check")
@click.argument("source")
@click.option("--kind", type=click.Choice(list(SOURCES)), help="Of SOURCE: data.source of a job.")
@column_options
@click.option("--json", "as_json", is_flag=True, help="All of it as JSON.")
def data_check(source: str, kind: str | None, as_json: bool, **columns: str) -> None:
    """Look through the images of SOURCE: a folder, a tar, an imported data set, or a JOB.

    Classes, sizes, what an import skips and why, equal pictures in two classes or in both train
    and val, how many are held out, and how sure a top-1 on them is.
    """
    found = nasray.check_data(source, kind=kind or "", **columns)
    if as_json:
        click.echo(json.dumps(found))
        return
    counts = sorted(found["classes"].items(), key=lambda each: -sum(each[1].values()))
    rows = [(name, *each.values()) for name, each in counts]
    if len(rows) > MAX_ROWS:
        half = MAX_ROWS // 2
        rows = [*rows[:half], ("...", "", ""), *rows[-half:]]
    width = max(len(name) for name in ("class", *(name for name, *_ in rows)))
    click.echo(f"{'class':<{width}}  {'train':>7}  {'val':>7}")
    for name, train, val in rows:
        click.echo(f"{name:<{width}}  {train:>7}  {val:>7}")
    _print_findings(found)


def _print_findings(found: dict[str, Any]) -> None:
    from nasray.data.survey import sentences

    facts, problems = sentences(found)
    for line in (*facts, *(f"Note: {problem}" for problem in problems)):
        click.echo(line)


@click.command()
@job_argument
@run_argument
@data_option
@address_option
def train(job: str, run_dir: str, data_path: str | None, address: str | None) -> None:
    """Train the supernet of JOB into RUN_DIR/supernet.pt, or resume that."""
    click.echo(_open(run_dir, job, data_path, address).train())


@click.command()
@job_argument
@run_argument
@click.option(
    "--verify",
    is_flag=True,
    help="A predictor proposes architectures and is refitted: search.verify = true.",
)
@data_option
@address_option
def search(
    job: str, run_dir: str, verify: bool, data_path: str | None, address: str | None
) -> None:
    """Search the supernet in RUN_DIR, or resume the search recorded there.

    Prints the answers: with several limits on one cost, the best for each of them.
    """
    handle = _open(run_dir, job, data_path, address)
    as_told = verify or bool(handle.job and handle.job.search.verify)
    for answer in handle.search(verify=as_told):
        click.echo(json.dumps(answer))


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
    for line in _open(run_dir, None, data_path, address).evaluate(archs):
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
    found = _open(run_dir, None, data_path, address).calibration_study(num_archs, seed)
    for row in found["rows"]:
        click.echo(json.dumps({key: value for key, value in row.items() if key != "top1"}))


@click.command("fit-predictor")
@run_argument
@click.option(
    "--sample",
    type=click.IntRange(0),
    default=0,
    help="Evaluate this many random architectures first, in tens.",
)
@data_option
@address_option
def fit_predictor(run_dir: str, sample: int, data_path: str | None, address: str | None) -> None:
    """Fit an accuracy predictor to the evaluations of RUN_DIR: RUN_DIR/predictor/.

    Prints its error on evaluations that it was not fitted to.
    """
    found = _open(run_dir, None, data_path, address).fit_predictor(sample)
    shown = ("predictor", "num_evaluations", "num_held_out", "rmse", "kendall_tau")
    click.echo(json.dumps({key: found[key] for key in shown}))
    if found["kendall_tau"] <= 0:
        click.echo(
            "on evaluations it was not fitted to, it ranks architectures no better than chance: "
            "sample more, or train the supernet for longer",
            err=True,
        )


@click.command()
@run_argument
@click.option("--truth", metavar="FILE", help="CSV or JSON: architectures and their true values.")
@click.option("--value", default="", metavar="NAME", help="Column of the values.")
@click.option("--sample", type=click.IntRange(3), show_default="100", help="How many of FILE.")
@click.option("--retrain", type=click.IntRange(3), help="Without FILE: train so many from scratch.")
@click.option("--epochs", type=click.IntRange(1), show_default="10", help="Of each training.")
@click.option("--json", "as_json", is_flag=True, help="Print all of RUN_DIR/rank.json.")
@data_option
@address_option
def rank(
    run_dir: str,
    truth: str | None,
    value: str,
    sample: int | None,
    retrain: int | None,
    epochs: int | None,
    as_json: bool,
    data_path: str | None,
    address: str | None,
) -> None:
    """Compare how the supernet in RUN_DIR orders architectures with their true order.

    MACs and parameters as rankers are beside it; [low, high] is a 95 % interval.
    """
    handle = _open(run_dir, None, data_path, address)
    epochs = epochs or (10 if retrain else 0)
    found = handle.rank(truth, value=value, sample=sample, retrain=retrain or 0, epochs=epochs)
    if as_json:
        click.echo(json.dumps(found))
        return
    click.echo(f"{found['num_archs']} architectures, {found['truth']}")
    figures = list(next(iter(found["rankers"].values())))
    click.echo("".join(f"{name:<24}" for name in ("ranked by", *figures)).rstrip())
    for name, row in found["rankers"].items():
        cells = (_with_interval(*row[figure]) for figure in figures)
        click.echo("".join(f"{cell:<24}" for cell in (name, *cells)).rstrip())
    difference = _with_interval(*found["beyond_macs"])
    click.echo(f"kendall_tau of supernet minus that of macs: {difference}")
    if found["num_failed"]:
        click.echo(
            f"{found['num_failed']} could not be evaluated and are left out; the first: "
            f"{found['first_failed']}",
            err=True,
        )
    if pick := found["pick"]:
        said = (
            f"the search's answer: {pick['true']:.4g}, {pick['regret']:.4g} below the best of the "
            f"{pick['num_known']} known within its limits"
        )
        if number := pick["num_others"]:
            said += f", above {pick['better_than']:.0%} of the {number} drawn within them"
        click.echo(said)


def _with_interval(figure: float, low: float | None, high: float | None) -> str:
    """Without "-0.000"."""
    return f"{figure:z.3f}" + ("" if low is None else f" [{low:z.3f}, {high:z.3f}]")


@click.command()
@job_argument
@run_argument
@click.option(
    "--again",
    is_flag=True,
    help="Anew, by a [retrain] that may have changed; what is there is kept in RUN_DIR/earlier.",
)
@data_option
@address_option
def retrain(
    job: str, run_dir: str, again: bool, data_path: str | None, address: str | None
) -> None:
    """Give the answers of the search in RUN_DIR their weights, in the ways of [retrain].

    Trained from scratch or from the supernet's weights on, under Ray Tune, or the supernet's.
    Until one of them is done, [retrain] and the *_trial* keys of [compute] may change.
    """
    for result in _open(run_dir, job, data_path, address).retrain(again=again):
        click.echo(json.dumps(result))
    click.echo(
        f"next: nasray export {run_dir}; nasray report {run_dir} (or both: nasray run {job} "
        f"{run_dir})",
        err=True,
    )


@click.command()
@run_argument
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(["fp16", "int8"]),
    multiple=True,
    help="Beside float32; may be given twice. Otherwise export.precisions of the job.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    help="Points of top-1 that int8 may cost; else some blocks stay float.",
)
@click.option(
    "--format",
    "formats",
    type=click.Choice(["pt2", "weights", "openvino", "tflite", "executorch"]),
    multiple=True,
    help="Beside ONNX; may be repeated. Otherwise export.formats of the job.",
)
@python_option
@data_option
def export(
    run_dir: str,
    precisions: tuple[str, ...],
    max_drop: float | None,
    formats: tuple[str, ...],
    pythons: tuple[str, ...],
    data_path: str | None,
) -> None:
    """Write the retrained models of RUN_DIR as ONNX, checked against torch.

    With --precision also smaller, with what that changes on the validation images; with --format
    also for other runtimes. RUN_DIR/export/<k>.md is the model card of each network.
    """
    elsewhere = pythons_of(pythons)
    run = _open(run_dir, None, data_path)
    for found in run.export(precisions, max_drop, formats, elsewhere):
        click.echo(json.dumps(found))


@click.command()
@run_argument
def report(run_dir: str) -> None:
    """Write RUN_DIR/report.html from what the run holds so far."""
    from nasray.storage import files as storage

    # A folder without a job has a report, too.
    click.echo(nasray.RunDirectory(storage.absolute(run_dir)).report())


def _open(
    run_dir: str, job: str | None, data_path: str | None, address: str | None = None
) -> "RunDirectory":
    _warn_of_lost_results(run_dir)
    return nasray.open(run_dir, job, data_path=data_path, address=address, verbose=is_verbose())


def _warn_of_lost_results(run_dir: str) -> None:
    """Warn if this is a Ray job that writes into its own working directory."""
    in_ray_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    if in_ray_job and "://" not in run_dir and not os.path.isabs(run_dir):
        click.echo(
            f"Warning: RUN_DIR {run_dir} lies in this Ray job's working directory, which Ray "
            "deletes; use an absolute path or a URI",
            err=True,
        )


def _summarise(run: "RunDirectory") -> None:
    """Print what a finished run has found, and where."""
    from nasray.storage import files as storage
    from nasray.storage import layout

    places = {"Report": layout.REPORT, "Pareto front": layout.FRONT}
    baseline = run.read(layout.SEARCH)["baseline"]
    is_balanced = run.read(layout.JOB)["job"]["search"].get("fitness") == "balanced"
    click.echo()
    if baseline and baseline["random_mean_top1"] is not None:
        side, scaled_from = (baseline.get(key) for key in ("resolution", "scaled_from"))
        scaled = f", scaled from {scaled_from} pixels to {side}" if side != scaled_from else ""
        click.echo(
            f"Searched subnet, supernet weights, {baseline['num_images']} validation images"
            f"{', mean over the classes' if is_balanced else ''}{scaled}: "
            f"{baseline['winner_top1']:.1%}; "
            "random subnets under the same limits: "
            f"{baseline['random_mean_top1']:.1%} (mean of {len(baseline['random_top1'])})"
        )
    for result in run.results():
        costs, way = result["costs"], result.get("shipped", "scratch")
        balanced = result.get("val_balanced_top1", result["val_top1"])
        differs = not math.isclose(balanced, result["val_top1"])  # classes of different sizes
        click.echo(
            f"{WEIGHTS[way]}: {result['val_top1']:.1%} top-1"
            f"{f' ({balanced:.1%} as the mean over the classes)' if differs else ''} on "
            f"{result['num_val_images']} validation images, {costs['params'] / 1e6:.2f} M "
            f"parameters, {costs['macs'] / 1e6:.1f} M MACs"
        )
    lines = [(name, storage.join(run.folder, file)) for name, file in places.items()]
    exports = [each for each in run.exports() if each.get("format") != "openvino"]  # no file
    lines += [(each.get("format", "ONNX"), each["file"]) for each in exports]
    for name, path in lines:
        click.echo(f"{name + ':':<14}{path}")
