"""The words of the command line as settings: parsed by tyro, with one line for every mistake."""

import contextlib
import io
import re
import shlex
import typing
from collections.abc import Sequence
from typing import Any

from regjax.experiments._folder import all_options, command
from regjax.experiments._help import PROGRAM
from regjax.experiments._options import UsageError, choices, did_you_mean, kind, option
from regjax.experiments._settings import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    option_types,
    replace,
    value_of,
)

COMMANDS: dict[str, type[TrainSettings]] = {
    "spectrum": SpectrumSettings,
    "landscape": LandscapeSettings,
    "train": TrainSettings,
}


# How a run was begun, not what it is.
_HOW = ("resume", "overwrite", "cache_dir")


def parse(
    command: str, words: Sequence[str], default: TrainSettings | None = None
) -> TrainSettings:
    """Returns the settings that the words after the command describe.

    Args:
      command: a name of `COMMANDS`.
      words: options and values.
      default: what is not given; None takes the command's own.

    Raises:
      UsageError: an option is unknown or given twice, or a value is not of its type.
    """
    import tyro

    given_options(command, words)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            settings, others = tyro.cli(
                COMMANDS[command],
                args=words,
                default=COMMANDS[command]() if default is None else default,
                return_unknown_args=True,
            )
    except SystemExit:
        message = _message(COMMANDS[command], words, told.getvalue())
        raise UsageError(f"{message}; see {PROGRAM} {command} --help.") from None
    if others:
        flags = _flags(COMMANDS[command])
        hint = did_you_mean(others[0], flags) if others[0].startswith("-") else ""
        raise UsageError(f"{others[0]!r} must be an option or the value of one{hint}.")
    return settings


def command_line(settings: TrainSettings) -> str:
    """Returns the command that runs these settings from the beginning: what `parse` reads back."""
    words = []
    for name in option_types(type(settings)):
        default = value_of(type(settings)(), name)
        usual = replace(settings, {name: default})
        if name in _HOW or all_options(usual) == all_options(settings):
            continue
        value = value_of(settings, name)
        if isinstance(value, bool):
            outer, dot, inner = name.rpartition(".")
            words.append(option(name if value else f"{outer}{dot}no_{inner}"))
        elif isinstance(value, tuple):
            words += [option(name), *value]
        else:
            text = str(value)
            words += [f"{option(name)}={text}"] if text.startswith("-") else [option(name), text]
    return f"{PROGRAM} {command(settings)} {shlex.join(words)}".strip()


def check_command(command: str) -> None:
    """Checks that the first word is a command.

    Raises:
      UsageError: it is not one; the message names those that are close.
    """
    if command in COMMANDS:
        return
    rule = f"The first word must be a command, {', '.join(COMMANDS)}"
    hint = did_you_mean(command, COMMANDS)
    raise UsageError(f"{rule}, got {repr(command) if command else 'none'}{hint}; see {PROGRAM} -h.")


def given_options(command: str, words: Sequence[str]) -> list[str]:
    """Returns the names of the options among the words, "sam.rho" for --sam.rho=0.1.

    Raises:
      UsageError: an option is unknown, given twice, or given an empty value.
    """
    flags, found = _flags(COMMANDS[command]), []
    for place, word in enumerate(words):
        if not re.match("--.", word):
            continue
        flag = "--" + word[2:].partition("=")[0].replace("_", "-")
        if flag not in flags:
            raise UsageError(_unknown(command, flag))
        if flags[flag] in found:
            raise UsageError(f"{option(flags[flag])} must be given once, got it twice.")
        found.append(flags[flag])
        # An empty path is the folder one is in, and no settings to compare are none.
        value, hint = _value_at(words, place), option_types(COMMANDS[command])[flags[flag]]
        if value == "" or (value is None and typing.get_origin(hint) is tuple):
            got = "no value" if value is None else "''"
            raise UsageError(f"{option(flags[flag])} must be {kind(hint)}, got {got}.")
    return found


def _value_at(words: Sequence[str], place: int) -> str | None:
    """Returns the value of the option that stands at a place, None if there is none."""
    _, is_joined, value = words[place].partition("=")
    if is_joined:
        return value
    following = words[place + 1 : place + 2]
    return following[0] if following and not re.match("--.", following[0]) else None


def _flags(settings_type: type[TrainSettings]) -> dict[str, str]:
    """Returns the option that each flag belongs to; a switch has two, --resume and --no-resume."""
    flags: dict[str, str] = {}
    for name, hint in option_types(settings_type).items():
        flags[option(name)] = name
        if hint is bool:
            outer, dot, inner = name.rpartition(".")
            flags[option(f"{outer}{dot}no_{inner}")] = name
    return flags


def _unknown(command: str, flag: str) -> str:
    others = [name for name, kind in COMMANDS.items() if flag in _flags(kind)]
    if others:
        return f"{flag} is an option of {' and '.join(others)}, not of {command}."
    hint = did_you_mean(flag, _flags(COMMANDS[command]))
    return f"There is no option {flag}{hint}; see {PROGRAM} {command} --help."


def _message(settings_type: type[TrainSettings], words: Sequence[str], box: str) -> str:
    """Returns what is wrong, in the words of the library, of what tyro put into its box."""
    text = " ".join(re.sub(r"[─│╭╮╰╯|]", " ", box).split())
    flag = re.search(r"(?:argument '|parsing )(--[\w.-]+)", text)
    name = _flags(settings_type).get(flag[1].rstrip(".")) if flag else None
    if flag and name:
        return _wrong_value(option(name), option_types(settings_type)[name], words)
    return text.strip(" .")


def _wrong_value(flag: str, hint: Any, words: Sequence[str]) -> str:
    spelled = [word.partition("=")[0].replace("_", "-") for word in words]
    value = _value_at(words, spelled.index(flag))
    if value is None:
        return f"{flag} must be {kind(hint)}, got no value"
    return f"{flag} must be {kind(hint)}, got {value!r}{did_you_mean(value, choices(hint))}"
