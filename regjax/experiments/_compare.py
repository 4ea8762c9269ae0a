"""Several settings side by side: how they are written, and how they are run."""

import contextlib
import dataclasses
import functools
import io
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from regjax.experiments import _figure, _record
from regjax.experiments._folder import CHECKPOINT, check_kept, claimed, command, out_dir
from regjax.experiments._landscape_run import LANDSCAPE_FILES, run_landscape
from regjax.experiments._options import UsageError, option
from regjax.experiments._record import Record
from regjax.experiments._settings import (
    AnalysisSettings,
    LandscapeSettings,
    SpectrumSettings,
    methods,
    option_types,
    replace,
    training_options,
)
from regjax.experiments._spectrum_run import SPECTRUM_FILES, Progress, run_spectrum
from regjax.experiments._validation import validate

Compared = TypeVar("Compared", SpectrumSettings, LandscapeSettings)

# They belong to the comparison as a whole.
_COMMON = ("compare", "checkpoint", "resume", "out")


def compared_settings(settings: Compared) -> dict[str, Compared]:
    """Returns the settings of each item of `compare`, by the item.

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
    result: dict[str, Compared] = {}
    folders: dict[str, Path] = {}
    for item in settings.compare:
        out = folder / re.sub(r"[^\w.=-]+", "_", item)
        if out in [other.out for other in result.values()]:
            raise UsageError(f"--compare must name different settings, got {item!r} twice.")
        own = replace(settings, {**_overrides(item, settings), "compare": (), "out": out})
        validate(own)
        trained_alike = repr(training_options(own))
        if settings.checkpoint is None and trained_alike in folders:
            own = dataclasses.replace(own, checkpoint=folders[trained_alike] / CHECKPOINT)
        elif settings.resume and not (out / CHECKPOINT).exists():
            # Its turn had not come when the comparison was interrupted.
            own = dataclasses.replace(own, resume=False)
        folders.setdefault(trained_alike, out)
        result[item] = own
    return result


def run_compare(
    settings: SpectrumSettings | LandscapeSettings, progress: Progress
) -> dict[str, Record]:
    """Runs all items of `compare` and leaves their records and figures of all behind.

    Args:
      settings: the common options and `compare`.
      progress: called after each block of batches and each product.

    Returns:
      The records of `run_spectrum` or `run_landscape` by item. The files hold the items done so
      far.

    Raises:
      UsageError: an item cannot be read, before anything is computed; else as those functions.
    """
    if isinstance(settings, LandscapeSettings):
        draw_surfaces = _figure.draw_landscapes
        return _run_all(settings, progress, run_landscape, LANDSCAPE_FILES, draw_surfaces)
    return _run_all(settings, progress, run_spectrum, SPECTRUM_FILES, _figure.draw_comparison)


def _run_all(
    settings: Compared,
    progress: Progress,
    run: Callable[[Compared, Progress], Record],
    files: tuple[str, ...],
    draw: Callable[[Path, dict[str, Record]], None],
) -> dict[str, Record]:
    records: dict[str, Record] = {}
    items = compared_settings(settings)
    name, figure = (f"{command(settings)}_compare.{ending}" for ending in ("json", "png"))
    with claimed(settings, (name, figure)) as folder:
        for own in items.values():
            # Before anything is computed; each locks its own folder in its turn.
            check_kept(own, files)
        for item, own in items.items():
            records[item] = run(own, functools.partial(_of_item, progress, item))
            _record.write(folder / name, records)
            draw(folder / figure, records)
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
    """Returns the one option with the choice `word`, of a method only if there is no other."""
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
    """Reads `text` as the command line does for the option `name`."""
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
