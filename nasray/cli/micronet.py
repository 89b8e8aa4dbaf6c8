"""The verb `micronet`: the MicroNet Challenge's score, and the published table of it."""

import json
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

import nasray
from nasray.cli.options import make_space, shufflenet_options, space_options
from nasray.costs.micronet import INT8_KINDS
from nasray.errors import UserError

if TYPE_CHECKING:
    from nasray.costs.micronet import Score

S_PLUS = ("shufflenet", "oneshot-s+")  # the network of the published table


@click.command()
@click.argument("target", required=False, metavar="[SPACE|RUN_DIR]")
@click.argument("archs", nargs=-1, metavar="[ARCH]...")
@click.option("--published", is_flag=True, help="The entry OneShot-S+'s table, recomputed.")
@click.option(
    "--int8",
    metavar="KINDS",
    help="Which operations are int8, by their classes in torch.nn. Default: "
    f"{','.join(INT8_KINDS)}; of a network that was exported at int8, what is so there.",
)
@click.option(
    "--strict",
    is_flag=True,
    help="Also count biases that folding BN leaves, SE's products and residual sums.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object per network and line.")
@shufflenet_options
@space_options
def micronet(
    target: str | None,
    archs: tuple[str, ...],
    published: bool,
    int8: str | None,
    strict: bool,
    as_json: bool,
    **space_settings: Any,
) -> None:
    """Print the MicroNet Challenge's score of each ARCH of SPACE at fp32, fp16 and int8.

    Of RUN_DIR: of the networks in its retrain/, with their top-1 as far as they are exported. ARCH
    is a published name or a JSON object. With --published, the table of the challenge's entry
    OneShot-S+, with each score recomputed, before those of RUN_DIR.

    fp16 halves parameters and multiplications of a network that quantises nothing. int8 counts a
    quarter of what --int8 names and all else in full; accumulators are int32, so that additions
    count in full, too: these are the organisers' rules.
    """
    kinds = (
        INT8_KINDS if int8 is None else [each.strip() for each in int8.split(",") if each.strip()]
    )
    what_is_int8 = f"\nint8: {', '.join(kinds)}; what else there is counts as 32-bit"
    chosen: dict[str, Any] = {"int8": kinds, "strict": strict}
    if published:
        from nasray.spaces import SPACES

        if archs or target in SPACES:
            raise UserError(f"--published goes with a RUN_DIR or nothing: leave {target} out")
        _refuse_space_options("--published", space_settings)
        _print_published(as_json, chosen)
        if not as_json:
            click.echo(what_is_int8)
    elif target is None:
        raise UserError("give a SPACE and an ARCH, a RUN_DIR, or --published")
    if target is not None and archs:
        space = make_space(target, **space_settings)
        parsed = [space.architecture(text) for text in archs]
        for text, arch in zip(archs, parsed, strict=True):
            named = {"arch": space.describe(arch)}
            _print_scores(text, named, space.micronet(arch, **chosen), as_json)
    elif target is not None:
        _print_run(
            target, as_json, {**chosen, "int8": None if int8 is None else kinds}, space_settings
        )
    if not as_json and not published and (int8 is not None or archs):
        click.echo(what_is_int8)


def _print_run(
    run_dir: str, as_json: bool, chosen: dict[str, Any], space_settings: dict[str, Any]
) -> None:
    from nasray.spaces import SPACES
    from nasray.storage import layout

    if run_dir in SPACES:
        raise UserError(f"{run_dir} is a space: give an ARCH, too; `nasray spaces` names some")
    _refuse_space_options(run_dir, space_settings)
    run = nasray.open(run_dir)
    for name, scores in run.micronet(**chosen).items():
        arch = run.read(layout.retrained(name, layout.RESULT))["arch"]
        top1 = {
            each["precision"]: {"top1": each["val_top1"], "num_images": each["num_val_images"]}
            for each in run.exports()
            if layout.network_of(each["file"]) == name and "num_val_images" in each
            if each.get("format", "onnx") == "onnx"
        }
        named = {"network": name, "arch": arch, "exported": top1}
        _print_scores(f"network {name}", named, scores, as_json)
        if chosen["int8"] is None and not as_json:
            click.echo(f"int8: {'as it is exported' if 'int8' in top1 else ', '.join(INT8_KINDS)}")
        for precision, found in top1.items() if not as_json else ():
            click.echo(
                f"exported at {precision}: {found['top1']:.1%} top-1 of "
                f"{found['num_images']} validation images"
            )


def _print_scores(title: str, named: dict[str, Any], scores: "list[Score]", as_json: bool) -> None:
    from nasray.costs.micronet import format_scores

    if as_json:
        click.echo(json.dumps({**named, "scores": [score.to_json() for score in scores]}))
    else:
        click.echo(f"{title}\n{format_scores(scores)}")


def _print_published(as_json: bool, chosen: dict[str, Any]) -> None:
    """Print the published table, and what is counted here of the network that it is about."""
    from nasray.costs import micronet

    name, arch = S_PLUS
    space = nasray.space(name)
    scores = space.micronet(arch, **chosen)
    as_published = micronet.int8_as_published(space.profile(arch), chosen["int8"])
    if as_json:
        rows = [row.to_json() for row in micronet.PUBLISHED]
        counted = [score.to_json() for score in scores]
        found = {"scores": counted, "int8_as_published": as_published.to_json()}
        click.echo(json.dumps({"published": rows, arch: found}))
        return
    click.echo(micronet.format_published())
    click.echo(f"\n{arch}, counted here\n{micronet.format_scores(scores)}")
    click.echo(
        "\nThe same at int8 as published, which the rules forbid: additions by 4, too, the rest "
        f"at 16 bits\n{micronet.format_scores([as_published])}"
    )


def _refuse_space_options(what: str, space_settings: dict[str, Any]) -> None:
    """Refuse options of SPACE where there is none."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is not ParameterSource.DEFAULT
        if option.name in space_settings and given:
            raise UserError(
                f"{option.opts[0]} chooses a configuration of SPACE, not of {what}; leave it out"
            )
