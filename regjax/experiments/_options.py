"""What the classes of options have in common: a name on the command line, and arguments."""

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

Kind = TypeVar("Kind", bound="Options")


class UsageError(ValueError):
    """An option that cannot be followed, in one line: what is allowed and what was given."""


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one method: a frozen dataclass with the arguments of the method's function.

    A field has the name of the argument that it becomes.

    Attributes:
      most: the largest values of fields that take forever, or make no sense, beyond them.
    """

    most: ClassVar[Mapping[str, int]] = {}

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

    def missing(self) -> dict[str, str]:
        """Returns, for each field that has no effect beside the others, the option it needs."""
        return {}


def by_name(classes: Iterable[type[Kind]]) -> dict[str, type[Kind]]:
    """Returns the classes by the names of their methods."""
    return {cls.name(): cls for cls in classes}


def option(name: str) -> str:
    """Returns what a setting is called on the command line."""
    return "--" + name.replace("_", "-")


def choices(hint: Any) -> tuple[str, ...]:
    """Returns the words that an option of this type may be, () if it is not a choice."""
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def kind(hint: Any) -> str:
    """Returns what the value of an option of this type has to be, "an integer"."""
    if choices(hint):
        return f"one of {', '.join(choices(hint))}"
    names = {int: "an integer", float: "a number", str: "a text", Path: "a path", bool: "a flag"}
    if typing.get_origin(hint) is tuple:
        return "settings such as sgd or sam,rho=0.1, or several"
    parts = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
    return names.get(parts[0], str(hint))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns " (did you mean ...?)" with the closest of `known`, "" if none is close."""
    bare = {name.lstrip("-").lower(): name for name in known}
    flat = word.lstrip("-").lower()
    found = [flat] if flat in bare else difflib.get_close_matches(flat, bare, n=2, cutoff=0.8)
    found = found or [name for name in bare if _is_akin(flat, name)]
    found = found or difflib.get_close_matches(flat, bare, n=1, cutoff=0.65)
    return f" (did you mean {' or '.join(bare[name] for name in found[:3])}?)" if found else ""


def _is_akin(word: str, name: str) -> bool:
    """Tells whether `word` is a part of `name`, its initials or letters, or shares a long part."""
    parts, others = (set(re.findall(r"[a-z0-9]+", text.lower())) for text in (word, name))
    if "no" in others - parts:
        return False
    flat, other = (re.sub(r"[^a-z0-9]", "", text.lower()) for text in (word, name))
    initials = "".join(part[0] for part in re.findall(r"[a-z0-9]+", name))
    return (
        (len(flat) >= 3 and flat in other)
        or (len(flat) >= 2 and flat == initials)
        or sorted(flat) == sorted(other)  # letters in another order
        or any(len(part) >= 4 for part in parts & others)
    )
