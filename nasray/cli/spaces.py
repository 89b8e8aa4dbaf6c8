"""The verbs that need a design space and no run: spaces, profile, show, latency."""

import json
import signal
from typing import Any

import click

from nasray.errors import UserError

NOISY = 0.1  # median scatter of a network's measurements above which other work disturbed them

space_argument = click.argument("space_name", metavar="SPACE")


def space_options(verb: Any) -> Any:
    """The options that choose a configuration of SPACE."""
    for option in (
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="KEY=VALUE",
            help="An option of SPACE as [space] in a job has it, e.g. width=1.0.",
        ),
        click.option(
            "--resolution",
            type=click.IntRange(32),
            help="Pixels: unless told, those of SPACE, mostly 224.",
        ),
        click.option("--num-classes", type=click.IntRange(1), default=1000, show_default=True),
    ):
        verb = option(verb)
    return verb


@click.command()
def spaces() -> None:
    """List the design spaces, their sizes and architectures with names; one of each as JSON."""
    from nasray.spaces import SPACES
    from nasray.spaces.ofa import num_networks
    from nasray.spaces.space import num_architectures

    for name, make in SPACES.items():
        space = make()
        named = ", ".join(space.named)
        is_ofa = name.startswith("ofa_")
        size = num_networks(space) if is_ofa else num_architectures(space.genes)
        click.echo(f"{name}: {len(space.genes)} genes, {size:.3g} architectures; named: {named}")
        last, arch = list(space.named.items())[-1]
        click.echo(f"  {last}: {json.dumps(space.to_json(arch))}")


@click.command()
@space_argument
@click.argument("archs", nargs=-1, required=True, metavar="ARCH...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per ARCH and line.")
@click.option("--latency-table", help="Add latency_ms from this table (--json only).")
@click.option("--predictor", help="Add predicted_accuracy from this file (--json only).")
@click.option("--layout", help="shufflenet: oneshot (default) or shufflenetv2plus.")
@click.option("--head", help="shufflenet: after_pooling (default), shufflenetv2plus or spos.")
@click.option("--se/--no-se", default=None, help="shufflenet: SE and hard-swish (default: with).")
@space_options
def profile(
    space_name: str,
    archs: tuple[str, ...],
    as_json: bool,
    latency_table: str | None,
    predictor: str | None,
    layout: str | None,
    head: str | None,
    se: bool | None,
    **space_settings: Any,
) -> None:
    """Count parameters and operations of each ARCH, op by op, and its MicroNet score.

    ARCH is a published name or a JSON object such as {"block": [...], "channel": [...]}.
    """
    from nasray import cost

    if (latency_table or predictor) and not as_json:
        raise UserError("--latency-table and --predictor add to the lines of --json; give that too")
    if se is False:
        head = head or "spos"  # the head that goes without SE
    given = {"layout": layout, "head": head, "se": se}
    space = make_space(
        space_name,
        **space_settings,
        **{key: value for key, value in given.items() if value is not None},
    )
    parsed = [parse_arch(space, text) for text in archs]
    if not as_json:
        for arch in parsed:
            click.echo(cost.format_table(cost.profile(space, arch)))
        return
    added = _looked_up(space, parsed, latency_table, predictor)
    for arch, more in zip(parsed, added, strict=True):
        costs = cost.total(cost.profile(space, arch))
        click.echo(json.dumps({"arch": space.to_json(arch), **costs, **more}))


@click.command("measure-latency")
@space_argument
@click.argument("table", metavar="TABLE")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--runtime", type=click.Choice(["torch", "onnxruntime"]), default="torch", show_default=True
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--batch-size", type=click.IntRange(1), default=1, show_default=True)
@click.option("--resolutions", help="Only these, e.g. 160,192; the others may come later.")
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
    address: str | None,
    labels: tuple[str, ...],
    num_classes: int,
    resolution: int,
    settings: tuple[str, ...],
    **setup: Any,
) -> None:
    """Measure every block of SPACE on this device into TABLE, a .parquet or .csv file.

    Long; what is measured is kept, and the same command again measures what is missing.
    """
    # Whatever ends it, what was measured by then is kept.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from nasray.latency_measure import Setup, doubt, measure, wanted_blocks
    from nasray.progress import progress

    space = make_space(
        space_name, num_classes=num_classes, resolution=resolution, settings=settings
    )
    sides = None if resolutions is None else [int(_number(r)) for r in resolutions.split(",")]
    if labels and not address:
        raise UserError(f"--label {labels[0]} chooses a node of a cluster; give --address too")
    if address:
        from nasray.cli_ray import ray_cluster
        from nasray.config import ComputeConfig
        from nasray.latency_cluster import measure_on_cluster

        chosen = dict(_key_value("--label", label) for label in labels)
        with ray_cluster(address, ComputeConfig(cpus_per_worker=setup["threads"])):
            measure_on_cluster(space, table, setup=setup, resolutions=sides, labels=chosen)
    else:
        with progress("latency", len(wanted_blocks(space, sides))) as show:
            measure(space, table, setup=Setup(**setup), resolutions=sides, show=show)
    click.echo(table)
    if warning := doubt(table):
        click.echo(warning, err=True)


@click.group()
def latency() -> None:
    """Latency tables."""


@latency.command()
@space_argument
@click.argument("table", metavar="TABLE")
@click.option("--num-archs", type=click.IntRange(2), default=50, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@space_options
def check(space_name: str, table: str, num_archs: int, seed: int, **space_settings: Any) -> None:
    """Compare TABLE with whole networks of random architectures, measured here."""
    from nasray.latency import LatencyTable
    from nasray.latency_measure import check as check_table

    space = make_space(space_name, **space_settings)
    loaded = LatencyTable.load(table, space)
    found = check_table(space, loaded, num_archs=num_archs, seed=seed)
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
        click.echo("something else runs on this machine: check again when that has ended", err=True)


@click.command()
@space_argument
@click.argument("archs", nargs=-1, metavar="ARCH...")
@click.option("--parse", "strings", help="A file of printed module strings, or -, to read.")
@click.option("--at", "side", type=click.IntRange(32), help="Resolution, if the strings name none.")
@space_options
def show(
    space_name: str,
    archs: tuple[str, ...],
    strings: str | None,
    side: int | None,
    **space_settings: Any,
) -> None:
    """Print each ARCH as module strings; with --parse, module strings as an ARCH.

    The strings are those of the Once-for-All notebooks, and the resolution, which those
    leave out.
    """
    from nasray.spaces import module_strings

    space = make_space(space_name, **space_settings)
    if not space.name.startswith("ofa_"):
        raise UserError(f"{space.name} has no module strings; see `nasray profile {space.name}`")
    if not archs and strings is None:
        raise UserError("give an ARCH, or --parse FILE")
    if side is not None and strings is None:
        raise UserError(f"--at {side} goes with --parse; an ARCH has its own resolution")
    for text in archs:
        click.echo("\n".join(module_strings.format(space, parse_arch(space, text))))
    if strings is not None:
        for arch in _parsed(space, strings, side):
            click.echo(json.dumps(space.to_json(arch)))


def _parsed(space: Any, strings: str, side: int | None) -> list[tuple[int, ...]]:
    """The architectures of a file of module strings."""
    from nasray.spaces import module_strings

    try:
        with click.open_file(strings) as file:
            networks = module_strings.split(file.read().splitlines())
    except UnicodeDecodeError:
        raise UserError(f"--parse {strings}: is not text") from None
    found = []
    for number, lines in enumerate(networks, 1):
        try:
            found.append(module_strings.parse(lines, space, side))
        except UserError as error:
            which = f", network {number}" if len(networks) > 1 else ""
            raise UserError(f"--parse {strings}{which}: {error}") from None
    return found


def parse_arch(space: Any, text: str) -> tuple[int, ...]:
    """Read a published name or a JSON object as an architecture of `space`."""
    named = space.named
    if text in named:
        return named[text]
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise UserError(
            f"ARCH {text!r} is neither a published name ({', '.join(named)}) nor a JSON object"
        )
    return space.from_json(values)


def make_space(
    name: str,
    *,
    num_classes: int,
    resolution: int | None,
    settings: tuple[str, ...],
    **options: Any,
) -> Any:
    from nasray.spaces import space_by_name

    for setting in settings:
        key, value = _key_value("--set", setting)
        if key == "name":
            raise UserError(f"--set {setting}: the space is the argument SPACE; leave this out")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    options = {"num_classes": num_classes} | options
    if resolution is not None:
        options = {"resolution": resolution} | options
    return space_by_name(name, **options)


def _looked_up(
    space: Any, archs: list[tuple[int, ...]], latency_table: str | None, predictor: str | None
) -> list[dict[str, float]]:
    """What a table and a predictor, where given, say of each architecture."""
    from nasray.spaces.space import as_population

    population = space.canonical(as_population(archs))
    columns = {}
    if latency_table is not None:
        from nasray.latency import LatencyTable

        columns["latency_ms"] = LatencyTable.load(latency_table, space)(population)
    if predictor is not None:
        from nasray.predictor import AccuracyPredictor

        columns["predicted_accuracy"] = AccuracyPredictor.load(predictor, space)(population)
    return [
        {key: float(values[index]) for key, values in columns.items()}
        for index in range(len(archs))
    ]


def _key_value(option: str, text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"{option} {text}: must be KEY=VALUE")
    return key, value


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--resolutions: {text!r} is no number; give e.g. 160,192") from None
