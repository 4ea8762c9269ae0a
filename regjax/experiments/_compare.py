"""Several settings side by side: how they are written, and how they are run."""

import contextlib
import dataclasses
import functools
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from regjax.experiments import _figure, _record
from regjax.experiments._effects import COMMON, missing
from regjax.experiments._folder import CHECKPOINT, check_kept, claimed, command, out_dir
from regjax.experiments._landscape_run import LANDSCAPE_FILES, run_landscape
from regjax.experiments._options import UsageError, choices, did_you_mean, kind, option
from regjax.experiments._record import Record
from regjax.experiments._settings import (
    AnalysisSettings,
    LandscapeSettings,
    SpectrumSettings,
    check_same_training,
    checkpoint_path,
    methods,
    option_types,
    replace,
    training_options,
)
from regjax.experiments._spectrum_run import SPECTRUM_FILES, Progress, run_spectrum
from regjax.experiments._training import TrainingError, read_run
from regjax.experiments._validation import validate

Compared = TypeVar("Compared", bound=AnalysisSettings)


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
      UsageError: an item cannot be read, is another again, holds a bad value or one without
        effect, or was not trained like the checkpoint.
    """
    folder, path = out_dir(settings), None
    if settings.checkpoint is not None:
        path = checkpoint_path(settings.checkpoint)
        stored, _, _ = read_run(path)
    result: dict[str, Compared] = {}
    folders: dict[str, Path] = {}
    for item in settings.compare:
        out = folder / re.sub(r"[^\w.=-]+", "_", item)
        if out in [other.out for other in result.values()]:
            raise UsageError(f"--compare must name different settings, got {item!r} twice.")
        overrides = _overrides(item, settings)
        own = replace(settings, {**overrides, "compare": (), "out": out})
        _check_item(item, own, overrides, result)
        if path is not None:
            check_same_training(own, stored, path=path)
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
            try:
                records[item] = run(own, functools.partial(_of_item, progress, item))
            except TrainingError as error:
                raise TrainingError(f"{item}: {error}") from None
            _record.write(folder / name, records)
        # A picture of half of them would pass for all.
        draw(folder / figure, records)
    return records


def _of_item(progress: Progress, item: str, stage: str, done: int, total: int | None) -> None:
    progress(f"{item}: {stage}", done, total)


def _check_item(
    item: str, own: Compared, overrides: dict[str, Any], before: dict[str, Compared]
) -> None:
    """Checks one item: its values, that each has an effect, and that it is not another again."""
    validate(own)
    for name in overrides:
        needs = missing(name, own)
        if needs is not None:
            raise UsageError(f"{option(name)} needs {needs}, in {item!r} of --compare.")
    for other, settings in before.items():
        alike = dataclasses.replace(own, **{name: getattr(settings, name) for name in COMMON})
        if _effective(alike) == _effective(settings):
            raise UsageError(
                f"--compare must name different settings, got {item!r} and {other!r}, which are "
                "the same."
            )


def _effective(settings: AnalysisSettings) -> dict[str, Any]:
    """Returns what decides the record of an item: the options, with the usual values filled in."""
    return {**dataclasses.asdict(settings), **training_options(settings)}


def _overrides(item: str, settings: AnalysisSettings) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for part in item.split(","):
        word, separator, text = part.strip().partition("=")
        name = _option_name(word, replace(settings, overrides)) if separator else None
        name = name or _option_of(word, settings)
        if name in overrides:
            raise UsageError(f"--compare must set {option(name)} once in {item!r}, got it twice.")
        overrides[name] = _parse(name, text if separator else word, settings)
    return overrides


def _option_name(word: str, settings: AnalysisSettings) -> str:
    """Returns the option that `word` spells; of a chosen method the last part is enough."""
    name = word.replace("-", "_").lstrip("_")
    allowed = [name for name in option_types(type(settings)) if name not in COMMON]
    own = [f"{used}.{name}" for used in methods(settings) if f"{used}.{name}" in allowed]
    found = [other for other in (name, *own) if other in allowed]
    if found:
        return found[0]
    used = [name.partition(".")[2] for name in allowed if name.split(".")[0] in methods(settings)]
    hint = did_you_mean(name, [*filter(None, used), *allowed])
    raise UsageError(f"--compare must name options, got {word!r}{hint}.")


def _option_of(word: str, settings: AnalysisSettings) -> str:
    """Returns the one option with the choice `word`, of a method only if there is no other."""
    types = option_types(type(settings))
    found = [name for name, hint in types.items() if word in choices(hint)]
    names = [name for name in found if "." not in name] or found
    if len(names) == 1:
        return names[0]
    if names:
        named = " or ".join(f"{name}={word}" for name in names)
        raise UsageError(f"--compare must say which option is meant, {named}, got {word!r}.")
    known = [word for hint in types.values() for word in choices(hint)]
    hint_text = did_you_mean(word, known) or f" ({', '.join(dict.fromkeys(known))})"
    raise UsageError(
        f"--compare must be OPTION=VALUE or a word that is the value of one, got {word!r}"
        f"{hint_text}."
    )


def _parse(name: str, text: str, settings: AnalysisSettings) -> Any:
    """Reads `text` as the command line does for the option `name`."""
    import tyro

    hint = option_types(type(settings))[name]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return tyro.cli(hint, args=[text])
    except SystemExit:
        raise UsageError(
            f"{option(name)} must be {kind(hint)}, got {text!r} in --compare"
            f"{did_you_mean(text, choices(hint))}."
        ) from None
