"""The folder of a run: its name, its lock, and what stays in it.

Two runs never use one folder at a time, and nothing that another run left is replaced unless it is
asked for: what stands there has to come from the same options, and from all of the run.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from regjax import _files
from regjax.experiments import _record
from regjax.experiments._options import UsageError, option
from regjax.experiments._settings import (
    COMPARISON,
    INCIDENTAL,
    AnalysisSettings,
    TrainSettings,
    checkpoint_path,
    is_comparison,
    training_options,
)
from regjax.experiments._training import read_run

CHECKPOINT, PAGE = "checkpoint.npz", "report.html"
# By this at its beginning a page is known for ours.
PAGE_MARK = '<meta name="generator" content="regjax'
_MARK_BYTES = 512
# With more epochs or more seeds the same run goes on.
_MAY_GROW = ("epochs", "seeds")
_LONGEST_NAME = 60
_ABSENT = object()


def out_dir(settings: TrainSettings) -> Path:
    """Returns the folder of the results; its usual name follows from the options."""
    if settings.out is not None:
        return settings.out
    if isinstance(settings, AnalysisSettings) and settings.checkpoint is not None:
        return checkpoint_path(settings.checkpoint).parent
    options = identity(settings)
    usual = identity(type(settings)())
    chosen = [options[name] for name in ("transformation", "normalization", "init", "matrix")
              if name in options and options[name] != usual[name]]  # fmt: skip
    words = [command(settings), *(["compare"] if is_comparison(settings) else []),
             settings.data, settings.model, *chosen]  # fmt: skip
    deciding = {name: value for name, value in options.items() if name not in _MAY_GROW}
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", "-".join(words))[:_LONGEST_NAME]
    return Path("runs") / f"{name}-{digest}"


def command(settings: TrainSettings) -> str:
    """Returns the word of the command line that the settings belong to."""
    return type(settings).__name__.removesuffix("Settings").lower()


def identity(settings: TrainSettings) -> dict[str, Any]:
    """Returns all options that decide what comes out, as JSON has them."""
    names = {field.name for field in dataclasses.fields(settings)}
    names -= {field.name for field in dataclasses.fields(TrainSettings)} | set(INCIDENTAL)
    names |= set(COMPARISON)
    own = {name: getattr(settings, name) for name in sorted(names)}
    return _record.plain({**training_options(settings), **own})


def all_options(settings: TrainSettings) -> dict[str, Any]:
    """Returns the options as a record has them, with what stands for those that are None."""
    return {**dataclasses.asdict(settings), **training_options(settings)}


@contextlib.contextmanager
def claimed(settings: TrainSettings, files: Sequence[str]) -> Iterator[Path]:
    """Keeps other runs out of the folder of the results while the block runs.

    Args:
      settings: the options.
      files: what the run will write there besides its checkpoint and its page: first its record,
        then figures.

    Yields:
      The folder, into which it can be written.

    Raises:
      UsageError: something there is of another run, or of one that was interrupted.
      CheckpointError: another run uses the folder, or it cannot be written to.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(_files.locked(out_dir(settings)))
        except _files.CheckpointError as error:
            raise type(error)(f"{error} --out names another.") from None
        for name in (CHECKPOINT, PAGE, *files):
            _files.check_replaceable(folder / name)
        check_kept(settings, files)
        for name in (CHECKPOINT, PAGE, *files):
            _files.remove_leftovers(folder / name)
        yield folder


def check_kept(settings: TrainSettings, files: Sequence[str]) -> None:
    """Checks that a run with these options replaces nothing of another one."""
    if settings.overwrite:
        return
    folder = out_dir(settings)
    is_trained = isinstance(settings, AnalysisSettings) and settings.checkpoint is not None
    if not (settings.resume or is_trained or is_comparison(settings)):
        _check_checkpoint(settings, folder / CHECKPOINT)
    _check_record(settings, folder, files)
    _check_page(folder / PAGE)


def check_data(settings: TrainSettings, path: Path, sha256: str) -> None:
    """Checks that the checkpoint which training is to replace is of the same data.

    Raises:
      UsageError: it is of others.
    """
    if settings.overwrite or settings.resume or not path.exists():
        return
    if read_run(path)[2] != sha256:
        raise _would_be_lost(path, "it was trained on other data")


def _check_checkpoint(settings: TrainSettings, path: Path) -> None:
    try:
        stored, losses, _ = read_run(path)
    except _files.MissingError:
        return
    except _files.CheckpointError as error:
        raise UsageError(f"{error} It would be replaced: choose another --out.") from None
    _check_same(path, stored, _record.plain(training_options(settings)))
    if len(losses) < settings.epochs:
        raise _would_be_lost(
            path, f"it holds {len(losses)} of {settings.epochs} epochs", "--resume goes on from it"
        )


def _check_record(settings: TrainSettings, folder: Path, files: Sequence[str]) -> None:
    there = [folder / name for name in files if (folder / name).exists()]
    if not there:
        return
    if there[0].name != files[0]:
        raise _would_be_lost(there[0], f"there is no {files[0]} that says where it is from")
    try:
        record = _record.read(there[0])
    except _files.CheckpointError as error:
        raise UsageError(f"{error} It would be replaced: choose another --out.") from None
    if is_comparison(settings):
        # What each of them left is in a folder of its own.
        other = [item for item in record if settings.compare and item not in settings.compare]
        if other:
            raise _would_be_lost(there[0], f"it compares {', '.join(other)} as well")
        return
    stored = record.get("settings")
    if not isinstance(stored, dict):
        raise _would_be_lost(there[0], "it does not say which options it is of")
    _check_same(there[0], stored, identity(settings), _MAY_GROW if settings.resume else ())


def _check_page(path: Path) -> None:
    """Checks that a page is ours: it says nothing that records and figures beside it do not."""
    if not path.is_file():  # what else it may be `claimed` finds
        return
    with path.open("rb") as file:
        if PAGE_MARK.encode() not in file.read(_MARK_BYTES):
            raise _would_be_lost(path, "it is no page of regjax")


def _check_same(
    path: Path, stored: dict[str, Any], options: dict[str, Any], may_differ: Sequence[str] = ()
) -> None:
    for name, value in options.items():
        found = stored.get(name, _ABSENT)
        if name not in may_differ and found != value:
            of = "none" if found is _ABSENT else found
            raise _would_be_lost(path, f"it is of {option(name)} {of}, and this run of {value}")


def _would_be_lost(path: Path, why: str, *remedies: str) -> UsageError:
    choices = [*remedies, "--out names another folder", "--overwrite replaces it"]
    return UsageError(
        f"{path} must stay, since {why}: {', '.join(choices[:-1])}, or {choices[-1]}."
    )
