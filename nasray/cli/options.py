"""Options that several verbs share, and how they are parsed."""

import json
from typing import TYPE_CHECKING, Any

import click

import nasray
from nasray.errors import UserError

if TYPE_CHECKING:
    from nasray import DesignSpace

space_argument = click.argument("space_name", metavar="SPACE")
address_option = click.option(
    "--address",
    envvar="RAY_ADDRESS",
    help="Ray cluster to use, e.g. auto; without it, this machine.",
)


def is_verbose() -> bool:
    """Whether the command line says --verbose."""
    return click.get_current_context().find_root().params["verbose"]


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


def make_space(
    name: str,
    *,
    num_classes: int,
    resolution: int | None,
    settings: tuple[str, ...],
    **options: Any,
) -> "DesignSpace":
    """The space that SPACE and its options describe; those in `options` yield to --set."""
    for setting in settings:
        key, value = key_value("--set", setting)
        if key == "name":
            raise UserError(f"--set {setting}: the space is the argument SPACE; leave this out")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    options = {"num_classes": num_classes} | options
    if resolution is not None:
        options = {"resolution": resolution} | options
    return nasray.space(name, **options)


def key_value(option: str, text: str) -> tuple[str, str]:
    """Split the KEY=VALUE given to `option`."""
    key, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"{option} {text}: must be KEY=VALUE")
    return key, value
