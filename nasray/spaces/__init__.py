"""The design spaces: one file each, one line each in this table."""

import dataclasses
import pkgutil
import typing
from typing import Any

from nasray.config import SpaceConfig
from nasray.errors import UserError, did_you_mean
from nasray.spaces.space import Space

# Imported when asked for, so that search/ and algorithms/ do not load torch.
SPACES = {
    "mbconv": "nasray.spaces.mbconv:MBConv",
    "nasbench_macro": "nasray.spaces.nasbench_macro:NasBenchMacro",
    "ofa_mobilenetv3": "nasray.spaces.ofa_mobilenetv3:OfaMobileNetV3",
    "ofa_proxyless": "nasray.spaces.ofa_proxyless:OfaProxyless",
    "ofa_resnet50d": "nasray.spaces.ofa_resnet50d:OfaResNet50D",
    "shufflenet": "nasray.spaces.shufflenet:ShuffleNet",
    "tiny": "nasray.spaces.tiny:Tiny",
}


def space_class(name: str) -> Any:
    """Return the class of a space of this table."""
    return pkgutil.resolve_name(SPACES[name])


def make_space(config: SpaceConfig, num_classes: int) -> Space:
    """Build the space that a job's [space] section describes, for `num_classes` classes.

    Raises:
        UserError: the name, an option or its value is wrong.
    """
    if "num_classes" in config.options:
        raise UserError("space.num_classes is that of the data set; remove the key")
    return space_by_name(
        config.name,
        num_classes=num_classes,
        resolution=config.resolution,
        **config.options,
    )


def space_by_name(name: str, **options: Any) -> Space:
    """Build a space from its name and options, which are the fields of its dataclass.

    Raises:
        UserError: the name, an option or its value is wrong.
    """
    if name not in SPACES:
        hint = did_you_mean(name, list(SPACES)) or ";"
        raise UserError(f"space.name = {name!r} is unknown{hint} there are {sorted(SPACES)}")
    make = space_class(name)
    fields = {field.name: field for field in dataclasses.fields(make)}
    for key in options:
        if key not in fields:
            raise UserError(f"unknown key 'space.{key}'; {name} has {sorted(fields)}")
    return make(**{key: _checked(key, value, fields[key].type) for key, value in options.items()})


def describe(space: Space) -> dict[str, Any]:
    """Return the name and options from which space_by_name() builds `space` again."""
    return {"name": space.name, **dataclasses.asdict(space)}


def _checked(key: str, value: Any, wanted: Any) -> Any:
    """Return `value` if it is of the type `wanted`; a list stands for a tuple."""
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        if isinstance(value, list | tuple) and all(type(each) is item for each in value):
            return tuple(value)
        raise UserError(f"space.{key} = {value!r} must be a list of type {item.__name__}")
    if type(value) is not wanted:
        raise UserError(f"space.{key} = {value!r} must be of type {wanted.__name__}")
    return value
