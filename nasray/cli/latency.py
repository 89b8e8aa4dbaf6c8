"""The verbs that measure latency tables and check them."""

import json
import signal
from typing import Any

import click

from nasray.cli.options import is_verbose, key_value, make_space, space_argument, space_options
from nasray.errors import UserError

NOISY = 0.1  # median scatter of a network's measurements above which other work disturbed them


@click.command("measure-latency")
@space_argument
@click.argument("table", metavar="TABLE")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--runtime", type=click.Choice(["torch", "onnxruntime"]), default="torch", show_default=True
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    help="fp32, or int8 with onnxruntime: quantised statically, weights per channel.",
)
@click.option("--cpus", default="", metavar="CORES", help="Run on these cores only, e.g. 4-7.")
@click.option("--resolutions", help="Only these, e.g. 160,192; the others may come later.")
@click.option(
    "--host",
    default="",
    metavar="USER@BOARD",
    help="Measure there, over ssh: with python3 (3.8 or newer), numpy and onnxruntime. Needs "
    "--runtime onnxruntime.",
)
@click.option("--address", help="Measure on a node of this Ray cluster, e.g. auto.")
@click.option(
    "--label",
    "labels",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only on a node with this Ray label, e.g. ray.io/accelerator-type=T4.",
)
@space_options
def measure_latency(
    space_name: str,
    table: str,
    resolutions: str | None,
    host: str,
    address: str | None,
    labels: tuple[str, ...],
    num_classes: int,
    resolution: int,
    settings: tuple[str, ...],
    **setup: Any,
) -> None:
    """Measure every block of SPACE into TABLE, a .parquet or .csv file.

    On this device, on a host (--host), or on a node of a cluster (--address). Long; what is
    measured is kept, and the same command again measures what is missing.
    """
    # SIGTERM, too, keeps what is measured.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from nasray.costs.latency_measure import doubts, measure, wanted_blocks
    from nasray.costs.latency_timing import Setup, place_at
    from nasray.progress import progress

    space = make_space(
        space_name, num_classes=num_classes, resolution=resolution, settings=settings
    ).space
    chosen = None if resolutions is None else [_number(r) for r in resolutions.split(",")]
    if labels and not address:
        raise UserError(f"--label {labels[0]} chooses a node of a cluster; give --address too")
    if host and address:
        raise UserError(f"--host {host} is no node of the cluster {address}; give one of them")
    if address:
        from nasray.cluster.connect import ray_cluster
        from nasray.config import ComputeConfig
        from nasray.costs.latency_cluster import measure_on_cluster

        wanted_labels = dict(key_value("--label", label) for label in labels)
        compute = ComputeConfig(cpus_per_worker=setup["threads"])
        with ray_cluster(address, compute, verbose=is_verbose()):
            measure_on_cluster(space, table, setup=setup, resolutions=chosen, labels=wanted_labels)
    else:
        wanted, how = wanted_blocks(space, chosen), Setup(**setup)
        # Connected first: ssh may ask for a password.
        with place_at(host, how) as place, progress("latency", len(wanted)) as show:
            measure(space, table, setup=how, place=place, resolutions=chosen, show=show)
    click.echo(table)
    for warning in doubts(table):
        click.echo(warning, err=True)


@click.group()
def latency() -> None:
    """Latency tables."""


@latency.command()
@space_argument
@click.argument("table", metavar="TABLE")
@click.option("--num-archs", type=click.IntRange(2), default=50, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--host", default="", metavar="USER@BOARD", help="Where TABLE was measured.")
@space_options
def check(
    space_name: str, table: str, num_archs: int, seed: int, host: str, **space_settings: Any
) -> None:
    """Compare TABLE with whole networks of random architectures, measured as TABLE was."""
    from nasray.costs.latency import LatencyTable
    from nasray.costs.latency_check import check as check_table

    space = make_space(space_name, **space_settings).space
    loaded = LatencyTable.load(table, space)
    found = check_table(space, loaded, host=host, num_archs=num_archs, seed=seed)
    for arch, predicted, measured in found.rows:
        line = {"arch": space.to_json(arch), "predicted_ms": predicted, "measured_ms": measured}
        click.echo(json.dumps(line))
    click.echo(
        f"{len(found.rows)} architectures: rank correlation {found.rank_correlation:.3f}, median "
        f"error {found.median_relative_error:.1%}, median bias {found.median_bias:+.1%}; "
        f"measurements of one network differ by {found.median_scatter:.1%}",
        err=True,
    )
    if found.median_scatter > NOISY:
        click.echo("something else runs on the machine: check again when that has ended", err=True)


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--resolutions: {text!r} is no number; give e.g. 160,192") from None
