"""Several settings side by side: how they are written, and how they are run."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from regjax.experiments import _figure, _record
from regjax.experiments._effects import COMMON, missing
from regjax.experiments._folder import CHECKPOINT, check_kept, claimed, command, out_dir
from regjax.experiments._landscape_run import landscape_files, run_landscape
from regjax.experiments._monitoring import monitor_files
from regjax.experiments._options import UsageError, choices, did_you_mean, kind, option
from regjax.experiments._page import write_compared_page
from regjax.experiments._pictures import Drawing
from regjax.experiments._record import Record
from regjax.experiments._settings import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    check_same_training,
    checkpoint_path,
    methods,
    option_types,
    replace,
    training_options,
)
from regjax.experiments._spectrum_run import (
    TRAINING_FILES,
    Progress,
    run_spectrum,
    run_train,
    spectrum_files,
)
from regjax.experiments._training import TrainingError, read_run
from regjax.experiments._validation import validate, validate_run

_LONGEST_NAME = 80
_Run: TypeAlias = Callable[[Any, Progress], Record]
_Draw: TypeAlias = Callable[..., None]

Compared = TypeVar("Compared", bound=TrainSettings)


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
    checkpoint = getattr(settings, "checkpoint", None)
    if checkpoint is not None:
        path = checkpoint_path(checkpoint)
        stored, _, _ = read_run(path)
    result: dict[str, Compared] = {}
    folders: dict[str, Path] = {}
    # Of one network with several seeds there is one item, which changes nothing.
    is_plain = settings.transformation == TrainSettings.transformation
    alone = settings.optimizer if is_plain else settings.transformation
    for item in settings.compare or (alone,):
        out = folder / _folder_name(item)
        if out in [other.out for other in result.values()]:
            raise UsageError(f"--compare must name different settings, got {item!r} twice.")
        overrides = _overrides(item, settings) if settings.compare else {}
        own = replace(settings, {**overrides, "compare": (), "seeds": 1, "out": out})
        _check_item(item, own, overrides, result)
        if path is not None:
            check_same_training(own, stored, path=path)
        trained_alike = repr(training_options(own))
        if checkpoint is None and trained_alike in folders and hasattr(own, "checkpoint"):
            own = replace(own, {"checkpoint": folders[trained_alike] / CHECKPOINT})
        elif settings.resume and not (out / CHECKPOINT).exists():
            # Its turn had not come when the comparison was interrupted.
            own = dataclasses.replace(own, resume=False)
        folders.setdefault(trained_alike, out)
        result[item] = own
    return result


def run_compare(settings: TrainSettings, progress: Progress) -> dict[str, list[Record]]:
    """Runs several settings with several seeds, and writes their records and common figures.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     settings = experiments.TrainSettings(
      ...         epochs=2, depth=0, num_train=256, num_test=64, out=pathlib.Path(folder),
      ...         compare=("seed=0", "seed=1"),
      ...     )
      ...     records = experiments.run_compare(settings, lambda stage, done, total: None)
      >>> print(list(records), [len(seeds) for seeds in records.values()])
      ['seed=0', 'seed=1'] [1, 1]

    Args:
      settings: a `TrainSettings`, `SpectrumSettings` or `LandscapeSettings` with the common
        options, `compare` (such as ("sgd", "sam,rho=0.1")) and `seeds`.
      progress: called as progress(stage, done, total) after each block of batches and each product.

    Returns:
      {item of `compare`: records}, with one record of `run_train`, `run_spectrum` or
      `run_landscape` for each seed. They are also written to a file in `settings.out` after each
      run.

    Raises:
      UsageError: an item cannot be read, before anything is computed; else as those functions.
    """
    validate_run(settings, TrainSettings, progress)
    start = time.monotonic()
    run, files, draw = _kind(settings)
    figure = f"{command(settings)}_compare{Path(files[-1]).suffix}"
    figures = [] if draw is None else [figure, *_figure.beside(figure)]
    runs = {item: seeded(own, settings) for item, own in compared_settings(settings).items()}
    name = f"{command(settings)}_compare.json"
    records: dict[str, list[Record]] = {item: [] for item in runs}
    with claimed(settings, (name, *figures)) as folder:
        for own in (own for of in runs.values() for own in of):
            # Before anything is computed; each locks its own folder in its turn.
            check_kept(own, files)
        for item, own in ((item, own) for item, of in runs.items() for own in of):
            label = item if settings.seeds == 1 else f"{item}, seed {own.seed}"
            try:
                record = run(own, functools.partial(_of_item, progress, label))
            except TrainingError as error:
                raise TrainingError(f"{label}: {error}") from None
            records[item].append(record)
            _record.write(folder / name, {item: of for item, of in records.items() if of})
        # A picture of half of them would pass for all; one of all seeds would show none.
        drawings = _drawings(folder, settings, first_seeds(records))
        for drawing in drawings:
            drawing.draw(drawing.path)
        write_compared_page(folder, settings, records, drawings, _record.finished(start))
    return records


def _drawings(folder: Path, settings: TrainSettings, records: dict[str, Record]) -> list[Drawing]:
    """Returns the figures of one record of each item."""
    _, files, draw = _kind(settings)
    drawings = []
    if draw is not None:
        path = folder / f"{command(settings)}_compare{Path(files[-1]).suffix}"
        shows = ("surface", "probes") if isinstance(settings, LandscapeSettings) else ("spectrum",)
        drawings.append(Drawing(path, shows, functools.partial(draw, records=records)))
    watched = {item: one for item, one in records.items() if "monitor" in one}
    if watched:
        path = folder / monitor_files(settings)[1].replace(".", "_compare.")
        draw_monitor = functools.partial(_figure.draw_monitor, records=watched)
        drawings.append(Drawing(path, ("monitor",), draw_monitor))
    return drawings


def seeded(own: Compared, settings: TrainSettings) -> list[Compared]:
    """Returns the settings of one item for each seed, each with its own folder.

    Raises:
      UsageError: a seed is too large.
    """
    if settings.seeds == 1:
        return [own]
    result = []
    for seed in range(own.seed, own.seed + settings.seeds):
        out = out_dir(own) / f"seed_{seed}"
        resume = settings.resume and (out / CHECKPOINT).exists()
        one = dataclasses.replace(own, seed=seed, seeds=1, out=out, resume=resume)
        checkpoint = getattr(own, "checkpoint", None)
        if checkpoint is not None:  # of an item that is trained alike
            path = checkpoint.parent / f"seed_{seed}" / CHECKPOINT
            one = replace(one, {"checkpoint": path, "resume": False})
        validate(one)
        result.append(one)
    return result


def first_seeds(records: dict[str, list[Record]]) -> dict[str, Record]:
    """Returns one record of each item, the first, whose name says its seed if there are others."""
    seed = lambda of: f", seed {of[0]['settings']['seed']}" if len(of) > 1 else ""
    return {f"{item}{seed(of)}": of[0] for item, of in records.items()}


def _kind(settings: TrainSettings) -> tuple[_Run, tuple[str, ...], _Draw | None]:
    """Returns what is run, the files that it writes, and what draws all."""
    if isinstance(settings, LandscapeSettings):
        return run_landscape, landscape_files(settings), _figure.draw_landscapes
    if isinstance(settings, SpectrumSettings):
        return run_spectrum, spectrum_files(settings), _figure.draw_comparison
    return run_train, TRAINING_FILES, None


def _folder_name(item: str) -> str:
    """Returns a name that every file system takes."""
    name = re.sub(r"[^\w.=-]+", "_", item)
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(item.encode()).hexdigest()[:8]}"


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
        alike = dataclasses.replace(
            own, **{name: getattr(settings, name) for name in COMMON if hasattr(own, name)}
        )
        if _effective(alike) == _effective(settings):
            raise UsageError(
                f"--compare must name different settings, got {item!r} and {other!r}, which are "
                "the same."
            )


def _effective(settings: TrainSettings) -> dict[str, Any]:
    """Returns what decides the record of an item: the options, with the usual values filled in."""
    return {**dataclasses.asdict(settings), **training_options(settings)}


def _overrides(item: str, settings: TrainSettings) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for part in item.split(","):
        word, separator, text = part.strip().partition("=")
        name = _option_name(word, replace(settings, overrides)) if separator else None
        name = name or _option_of(word, settings)
        if name in overrides:
            raise UsageError(f"--compare must set {option(name)} once in {item!r}, got it twice.")
        overrides[name] = _parse(name, text if separator else word, settings)
    return overrides


def _option_name(word: str, settings: TrainSettings) -> str:
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


def _option_of(word: str, settings: TrainSettings) -> str:
    """Returns the one option with the choice `word`, of a method only if there is no other."""
    types = {n: hint for n, hint in option_types(type(settings)).items() if n not in COMMON}
    found = [name for name, hint in types.items() if word in choices(hint)]
    names = [name for name in found if "." not in name] or found
    if len(names) == 1:
        return names[0]
    if names:
        named = " or ".join(f"{name}={word}" for name in names)
        raise UsageError(f"--compare must say which option is meant, {named}, got {word!r}.")
    known = [word for hint in types.values() for word in choices(hint)]
    hint_text = did_you_mean(word, known) if word else ""
    raise UsageError(
        f"--compare must be OPTION=VALUE or a word that is the value of one, got {word!r}"
        f"{hint_text}."
    )


def _parse(name: str, text: str, settings: TrainSettings) -> Any:
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
