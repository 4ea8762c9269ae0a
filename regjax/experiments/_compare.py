"""Several settings side by side: how they are written, and how they are run."""

import contextlib
import dataclasses
import functools
import io
import re
import typing
from pathlib import Path
from typing import Any, Literal

from regjax.experiments import _figure, _record
from regjax.experiments._landscape_run import run_landscape
from regjax.experiments._options import UsageError, option
from regjax.experiments._settings import (
    AnalysisSettings,
    LandscapeSettings,
    methods,
    option_types,
    out_dir,
    replace,
    training_options,
)
from regjax.experiments._spectrum_run import Progress, run_spectrum
from regjax.experiments._validation import validate

Record = dict[str, Any]

# They belong to the comparison as a whole.
_COMMON = ("compare", "checkpoint", "resume", "out")


def compared_settings(settings: AnalysisSettings) -> dict[str, Any]:
    """The settings of each item of `compare`, by the item.

    An item is a comma-separated list of option=value, such as sam,rho=0.1. A bare word stands for
    option=word, if it is one of the choices of exactly one option; those of a single method give
    way to the others. Each item has its own folder in `out`; what is trained alike is trained once.

    Args:
      settings: the common options and `compare`.

    Returns:
      {item: settings}, in the order given.

    Raises:
      UsageError: an item cannot be read, is given twice, or holds a bad value.
    """
    folder = out_dir(settings)
    result: dict[str, Any] = {}
    folders: dict[str, Path] = {}
    for item in settings.compare:
        out = folder / re.sub(r"[^\w.=-]+", "_", item)
        if out in [other.out for other in result.values()]:
            raise UsageError(f"--compare must name different settings, got {item!r} twice.")
        own = replace(settings, {**_overrides(item, settings), "compare": (), "out": out})
        validate(own)
        trained_alike = repr(training_options(own))
        if settings.checkpoint is None and trained_alike in folders:
            own = dataclasses.replace(own, checkpoint=folders[trained_alike] / "checkpoint.npz")
        elif settings.resume and not (out / "checkpoint.npz").exists():
            # Its turn had not come when the comparison was interrupted.
            own = dataclasses.replace(own, resume=False)
        folders.setdefault(trained_alike, out)
        result[item] = own
    return result


def run_compare(settings: AnalysisSettings, progress: Progress) -> dict[str, Record]:
    """Runs all items of `compare` and leaves `compare.json` and figures of all behind.

    Args:
      settings: the common options and `compare`.
      progress: called after each block of batches and each product.

    Returns:
      The records of `run_spectrum` or `run_landscape` by item. The files hold the items done so
      far.

    Raises:
      UsageError: an item cannot be read, before anything is computed; else as those functions.
    """
    is_landscape = isinstance(settings, LandscapeSettings)
    run: Any = run_landscape if is_landscape else run_spectrum
    draw = _figure.draw_landscapes if is_landscape else _figure.draw_comparison
    records: dict[str, Record] = {}
    for item, own in compared_settings(settings).items():
        records[item] = run(own, functools.partial(_of_item, progress, item))
        _record.write(out_dir(settings) / "compare.json", records)
        draw(out_dir(settings) / "compare.png", records)
    return records


def _of_item(progress: Progress, item: str, stage: str, done: int, total: int | None) -> None:
    progress(f"{item}: {stage}", done, total)


def _overrides(item: str, settings: AnalysisSettings) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for part in item.split(","):
        word, separator, text = part.strip().partition("=")
        name = word.replace("-", "_") if separator else _option_of(word, settings)
        allowed = [name for name in option_types(type(settings)) if name not in _COMMON]
        # Of the chosen methods' own options the last part is enough.
        for used in methods(replace(settings, overrides)):
            if name not in allowed and f"{used}.{name}" in allowed:
                name = f"{used}.{name}"
        if name not in allowed:
            raise UsageError(
                f"--compare must set one of {', '.join(allowed)}, got {name!r} in {item!r}."
            )
        overrides[name] = _parse(name, text if separator else word, settings)
    return overrides


def _option_of(word: str, settings: AnalysisSettings) -> str:
    """The one option that has `word` among its choices, of a method only if no other has."""
    choices = _choices(settings)
    found = [name for name, words in choices.items() if word in words]
    names = [name for name in found if "." not in name] or found
    if len(names) == 1:
        return names[0]
    if names:
        named = " or ".join(f"{name}={word}" for name in names)
        raise UsageError(f"--compare must say which option is meant, {named}, got {word!r}.")
    known = ", ".join(dict.fromkeys(word for words in choices.values() for word in words))
    raise UsageError(f"--compare must be option=value or one of {known}, got {word!r}.")


def _choices(settings: AnalysisSettings) -> dict[str, tuple[str, ...]]:
    return {
        name: typing.get_args(hint)
        for name, hint in option_types(type(settings)).items()
        if typing.get_origin(hint) is Literal
    }


def _parse(name: str, text: str, settings: AnalysisSettings) -> Any:
    """`text` as the command line reads it for the option `name`."""
    import tyro

    hint = option_types(type(settings))[name]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(hint, args=[text])
    except SystemExit:
        allowed = _choices(settings).get(name)
        rule = f"one of {', '.join(allowed)}" if allowed else f"{_name(hint)}"
        raise UsageError(f"{option(name)} must be {rule}, got {text!r} in --compare.") from None


def _name(hint: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a text", Path: "a path", bool: "a flag"}
    parts = [part for part in typing.get_args(hint) if part is not type(None)] or [hint]
    return names.get(parts[0], str(hint))
