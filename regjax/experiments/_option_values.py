"""Options by name: "sam.rho" is `rho` of the field `sam`."""

import dataclasses
import functools
import typing
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def option_types(settings_type: type) -> dict[str, Any]:
    """Returns the type of each option by name; "sam.rho" is `rho` of the field `sam`."""
    types: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(settings_type).items():
        if dataclasses.is_dataclass(hint):
            own = typing.get_type_hints(hint)
            types |= {f"{name}.{f.name}": own[f.name] for f in dataclasses.fields(hint)}
        else:
            types[name] = hint
    return types


def value_of(settings: object, name: str) -> Any:
    """Returns the value of an option; "sam.rho" is `rho` of the field `sam`."""
    return functools.reduce(getattr, name.split("."), settings)


def replace(settings: Settings, changes: dict[str, Any]) -> Settings:
    """Returns `settings` with other values; "sam.rho" is `rho` of the field `sam`."""
    result: Any = settings
    for name, value in changes.items():
        outer, _, inner = name.partition(".")
        new = dataclasses.replace(getattr(result, outer), **{inner: value}) if inner else value
        result = dataclasses.replace(result, **{outer: new})
    return result
