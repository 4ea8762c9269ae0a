"""What the classes of options have in common: a name on the command line, and arguments."""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound="Options")


class UsageError(ValueError):
    """An option that cannot be followed, in one line: what is allowed and what was given."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one method: a frozen dataclass with the arguments of the method's function.

    A field has the name of the argument that it becomes.
    """

    @classmethod
    def name(cls) -> str:
        """Returns the method's name, that of the class as a word of the command line."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    @classmethod
    def option(cls, field: str) -> str:
        """Returns what an option is called on the command line, "--sam.rho"."""
        return option(f"{cls.name()}.{field}")

    def arguments(self, *without: str) -> dict[str, Any]:
        """Returns the fields by name, but for those `without`."""
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name not in without}


def by_name(classes: Iterable[type[Kind]]) -> dict[str, type[Kind]]:
    """Returns the classes by the names of their methods."""
    return {cls.name(): cls for cls in classes}


def option(name: str) -> str:
    """Returns what a setting is called on the command line."""
    return "--" + name.replace("_", "-")
