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
python_option = click.option(
    "--python",
    "pythons",
    multiple=True,
    metavar="FORMAT=PYTHON",
    help="The Python of an environment that has the packages of a format, e.g. "
    "tflite=tflite-env/bin/python; may be repeated.",
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


def shufflenet_options(verb: Any) -> Any:
    """The options that choose a published configuration of the space shufflenet."""
    for option in (
        click.option(
            "--se/--no-se", default=None, help="shufflenet: SE and hard-swish (default: with)."
        ),
        click.option(
            "--head", help="shufflenet: after_pooling (default), shufflenetv2plus or spos."
        ),
        click.option("--layout", help="shufflenet: oneshot (default) or shufflenetv2plus."),
    ):
        verb = option(verb)
    return verb


def make_space(
    name: str,
    *,
    num_classes: int,
    resolution: int | None,
    settings: tuple[str, ...],
    layout: str | None = None,
    head: str | None = None,
    se: bool | None = None,
) -> "DesignSpace":
    """The space that SPACE and its options describe; those of shufflenet yield to --set."""
    if se is False:
        head = head or "spos"  # the head that goes without SE
    given: dict[str, Any] = {"layout": layout, "head": head, "se": se}
    options = {key: value for key, value in given.items() if value is not None}
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


def pythons_of(given: tuple[str, ...]) -> dict[str, str]:
    """What python_option was given, by format."""
    return dict(key_value("--python", each) for each in given)
