"""The verbs that need a design space and no run: spaces, profile, show, import-weights."""

import json
from typing import Any

import click

from nasray.cli.options import make_space, shufflenet_options, space_argument, space_options
from nasray.errors import UserError


@click.command()
def spaces() -> None:
    """List the design spaces, their sizes and architectures with names; one of each as JSON."""
    from nasray.spaces import SPACES, space_class
    from nasray.spaces.ofa import num_networks
    from nasray.spaces.space import num_architectures

    for name in SPACES:
        space = space_class(name)()
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
@shufflenet_options
@space_options
def profile(
    space_name: str,
    archs: tuple[str, ...],
    as_json: bool,
    latency_table: str | None,
    predictor: str | None,
    **space_settings: Any,
) -> None:
    """Count parameters and operations of each ARCH, op by op, and its MicroNet score.

    ARCH is a published name or a JSON object such as {"block": [...], "channel": [...]}.
    """
    from nasray.costs.profile import format_table

    if (latency_table or predictor) and not as_json:
        raise UserError("--latency-table and --predictor add to the lines of --json; give that too")
    space = make_space(space_name, **space_settings)
    parsed = [space.architecture(text) for text in archs]
    if not as_json:
        for arch in parsed:
            click.echo(format_table(space.profile(arch)))
        return
    added = _looked_up(space.space, parsed, latency_table, predictor)
    for arch, more in zip(parsed, added, strict=True):
        click.echo(json.dumps({"arch": space.describe(arch), **space.costs(arch), **more}))


@click.command()
@space_argument
@click.argument("archs", nargs=-1, metavar="ARCH...")
@click.option("--parse", "strings", help="A file of printed module strings, or -, to read.")
@click.option("--at", type=click.IntRange(32), help="Resolution, if the strings name none.")
@space_options
def show(
    space_name: str,
    archs: tuple[str, ...],
    strings: str | None,
    at: int | None,
    **space_settings: Any,
) -> None:
    """Print each ARCH as module strings; with --parse, module strings as an ARCH.

    The strings are those of the Once-for-All notebooks, and the resolution, which those
    leave out.
    """
    from nasray.spaces import ofa_strings

    design = make_space(space_name, **space_settings)
    space: Any = design.space
    if not space.name.startswith("ofa_"):
        raise UserError(f"{space.name} has no module strings; see `nasray profile {space.name}`")
    if not archs and strings is None:
        raise UserError("give an ARCH, or --parse FILE")
    if at is not None and strings is None:
        raise UserError(f"--at {at} goes with --parse; an ARCH has its own resolution")
    for text in archs:
        click.echo("\n".join(ofa_strings.format(space, design.architecture(text))))
    if strings is not None:
        for arch in _parsed(space, strings, at):
            click.echo(json.dumps(space.to_json(arch)))


@click.command("import-weights")
@space_argument
@click.argument("weights", metavar="FILE")
@click.argument("out", metavar="OUT")
@click.option("--sha256", default="", metavar="HEX", help="The digest that FILE must have.")
@space_options
def import_weights(
    space_name: str, weights: str, out: str, sha256: str, **space_settings: Any
) -> None:
    """Write the published supernet in FILE to OUT, as nasray trains, searches and exports it.

    FILE is a path, s3:// and the like, or an http(s) address; docs/pretrained.md says of which
    networks. The options of SPACE must be those of FILE, e.g. --set width=1.0.
    """
    space = make_space(space_name, **space_settings)
    space.import_weights(weights, out, sha256=sha256)
    click.echo(f"{out}: a supernet of {space_name}")


def _parsed(space: Any, strings: str, resolution: int | None) -> list[tuple[int, ...]]:
    """The architectures of a file of module strings."""
    from nasray.spaces import ofa_strings

    try:
        with click.open_file(strings) as file:
            networks = ofa_strings.split(file.read().splitlines())
    except UnicodeDecodeError:
        raise UserError(f"--parse {strings}: is not text") from None
    found = []
    for number, lines in enumerate(networks, 1):
        try:
            found.append(ofa_strings.parse(lines, space, resolution))
        except UserError as error:
            which = f", network {number}" if len(networks) > 1 else ""
            raise UserError(f"--parse {strings}{which}: {error}") from None
    return found


def _looked_up(
    space: Any, archs: list[tuple[int, ...]], latency_table: str | None, predictor: str | None
) -> list[dict[str, float]]:
    """What a table and a predictor, where given, say of each architecture."""
    from nasray.spaces.population import as_population

    population = space.canonical(as_population(archs))
    columns = {}
    if latency_table is not None:
        from nasray.costs.latency import LatencyTable

        columns["latency_ms"] = LatencyTable.load(latency_table, space)(population)
    if predictor is not None:
        from nasray.predictors.predictor import AccuracyPredictor

        columns["predicted_accuracy"] = AccuracyPredictor.load(predictor, space)(population)
    return [
        {key: float(values[index]) for key, values in columns.items()}
        for index in range(len(archs))
    ]
