"""The design spaces: one file each, one line each in this table."""

import dataclasses
from typing import Any

from nasray.config import SpaceConfig
from nasray.errors import UserError
from nasray.spaces.shufflenet import ShuffleNet
from nasray.spaces.space import Space
from nasray.spaces.tiny import Tiny

SPACES: dict[str, type] = {"shufflenet": ShuffleNet, "tiny": Tiny}


def make_space(config: SpaceConfig, num_classes: int) -> Space:
    """Build the space that a job's [space] section describes, for `num_classes` classes."""
    if "num_classes" in config.options:
        raise UserError("space.num_classes is that of the data set; remove the key")
    return space_by_name(
        config.name,
        num_classes=num_classes,
        resolution=config.resolution,
        **config.options,
    )


def space_by_name(name: str, **options: Any) -> Space:
    """Build a space from its name and options, which are the fields of its dataclass."""
    if name not in SPACES:
        raise UserError(f"space.name = {name!r} is unknown; there are {sorted(SPACES)}")
    fields = {field.name: field for field in dataclasses.fields(SPACES[name])}
    for key, value in options.items():
        if key not in fields:
            raise UserError(f"unknown key 'space.{key}'; {name} has {sorted(fields)}")
        if type(value) is not fields[key].type:
            raise UserError(f"space.{key} = {value!r} must be of type {fields[key].type.__name__}")
    return SPACES[name](**options)


def describe(space: Space) -> dict[str, Any]:
    """The name and options from which space_by_name() builds `space` again."""
    return {"name": space.name, **dataclasses.asdict(space)}
