"""Options that several verbs share, and what they are turned into."""

import json
from contextlib import AbstractContextManager
from typing import Any

import click

from nasray.errors import UserError

space_argument = click.argument("space_name", metavar="SPACE")
address_option = click.option(
    "--address",
    envvar="RAY_ADDRESS",
    help="Ray cluster to use, e.g. auto; without it, this machine.",
)


def ray_cluster(address: str | None, compute: Any) -> AbstractContextManager[None]:
    """The verb's Ray cluster, as talkative as --verbose says."""
    from nasray.cluster import connect

    verbose = click.get_current_context().find_root().params["verbose"]
    return connect.ray_cluster(address, compute, verbose=verbose)


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
    return space_by_name(name, **options)


def key_value(option: str, text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not sign:
        raise UserError(f"{option} {text}: must be KEY=VALUE")
    return key, value
