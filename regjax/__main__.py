"""The command line: `python -m regjax spectrum`, `landscape` and `train`."""

import contextlib
import dataclasses
import importlib.util
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from regjax._files import CheckpointError, MissingError
from regjax._finite import NotFiniteError
from regjax.experiments import (
    _compare,
    _compiled,
    _contents,
    _help,
    _landscape_run,
    _record,
    _report,
    _spectrum_run,
)
from regjax.experiments._data import DataError
from regjax.experiments._effects import check_effects
from regjax.experiments._folder import CHECKPOINT, PAGE, out_dir
from regjax.experiments._options import UsageError
from regjax.experiments._progress import Bar
from regjax.experiments._settings import (
    AnalysisSettings,
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    checkpoint_path,
    is_comparison,
    replace,
)
from regjax.experiments._table import Contents, text
from regjax.experiments._training import TrainingError, read_run
from regjax.experiments._validation import validate
from regjax.experiments._words import COMMANDS, check_command, given_options, parse

# Exit statuses, as `--help` lists them.
_DONE, _NOT_LEARNED, _REFUSED, _FAULT, _INTERRUPTED = 0, 1, 2, 70, 130
_PACKAGES = ("tyro", "tqdm", "matplotlib", "jinja2")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: the words of the command line; None takes those of the process.

    Returns:
      The exit status: 0; 1 if a network did not learn; 2 after a line on stderr that says what was
      wrong; 70 after one that names the traceback of a fault of regjax; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with Bar() as bar:
            return _run(words, bar)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted.", _INTERRUPTED)
    except BrokenPipeError:  # whoever read the output has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for what Python still wants to flush
        return _DONE
    except Exception as error:
        message = _users_line(error)
        if message is not None:
            return _fail(message, _REFUSED)
        return _fail(_fault(error), _FAULT)


def _run(words: list[str], bar: Bar) -> int:
    """Does what the words say and returns the exit status."""
    if "--version" in words:
        return _show(", ".join(f"{name} {text}" for name, text in _record.versions().items()))
    command, asks_help = (words or [""])[0], not {"-h", "--help"}.isdisjoint(words)
    if asks_help and command not in COMMANDS:
        return _show(_help.root_help(COMMANDS))
    check_command(command)
    _check_packages()
    own = [word for word in words[1:] if word not in ("-h", "--help")]
    if asks_help:
        return _show(_help.command_help(command, _chosen(command, own)))
    settings = _from_checkpoint(command, own, parse(command, own))
    _check_device()
    validate(settings)
    _compiled.use_cache(settings.cache_dir)
    compared: list[TrainSettings] = []
    if is_comparison(settings):
        compared = [*_compare.compared_settings(settings).values()]
    check_effects(given_options(command, own), settings, compared)
    try:
        contents, learned = _results(settings, bar)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {out_dir(settings)} holds what was computed, --resume goes on."
        ) from None
    bar.close()
    page = out_dir(settings) / PAGE
    _show(
        f"{text(contents)}\n\nResults are in {page.parent}.\n"
        f"{page} shows them in a browser and says what each number means."
    )
    return _DONE if learned else _NOT_LEARNED


def _results(settings: TrainSettings, bar: Bar) -> tuple[Contents, bool]:
    """Runs what `settings` describe; returns what is to be printed, and whether all learned."""
    if is_comparison(settings):
        records = _compare.run_compare(settings, bar)
        learned = all(_report.has_learned(record) for of in records.values() for record in of)
        return _contents.compared_contents(records), learned
    if isinstance(settings, LandscapeSettings):
        record = _landscape_run.run_landscape(settings, bar)
    elif isinstance(settings, SpectrumSettings):
        record = _spectrum_run.run_spectrum(settings, bar)
    else:
        record = _spectrum_run.run_train(settings, bar)
    return _contents.run_contents(record), _report.has_learned(record)


def _chosen(command: str, words: list[str]) -> TrainSettings:
    """Returns the settings whose help is asked for; the command's own if the words are wrong."""
    try:
        return parse(command, words)
    except UsageError:
        return COMMANDS[command]()


def _from_checkpoint(command: str, words: list[str], settings: TrainSettings) -> TrainSettings:
    """Returns the settings with the training options of the checkpoint that they start from.

    Parsed again with these for defaults, an option keeps a value of its own only if it was given:
    `restore` then finds the conflict.
    """
    if isinstance(settings, AnalysisSettings) and settings.checkpoint is not None:
        path = checkpoint_path(settings.checkpoint)
    elif settings.resume and not is_comparison(settings):
        path = out_dir(settings) / CHECKPOINT
    else:
        return settings
    try:
        stored, _, _ = read_run(path)
    except MissingError:
        if not settings.resume:
            raise UsageError(
                f"--checkpoint needs the checkpoint of a training run, and there is none at {path}."
            ) from None
        raise UsageError(
            f"--resume needs a checkpoint, and there is none at {path}: give --out, or all options "
            "of the run to go on with."
        ) from None
    defaults = dataclasses.replace(COMMANDS[command](), out=out_dir(settings))
    return parse(command, words, replace(defaults, stored))


def _check_packages() -> None:
    """Checks that what the command line needs is installed, before anything is computed."""
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise UsageError(f"The command line needs {name}: pip install 'regjax[run]'.")
    # Figures go into files: a backend of the environment that is not there must not end the run.
    os.environ["MPLBACKEND"] = "agg"


def _check_device() -> None:
    """Checks that JAX has a device to compute on."""
    import jax

    try:
        jax.devices()
    except RuntimeError as error:
        platforms = os.environ.get("JAX_PLATFORMS")
        rule = f"JAX_PLATFORMS must name what is here, got {platforms!r}: " if platforms else ""
        raise UsageError(f"{rule}{error}") from None


def _users_line(error: Exception) -> str | None:
    """Returns the line about what the user can mend; None for a fault of the library.

    That is our own errors, files that cannot be used, memory that does not suffice, products that
    are not finite, and arguments that a function of the library refuses.
    """
    own = (UsageError, DataError, CheckpointError, TrainingError, NotFiniteError, OSError)
    if isinstance(error, own):
        return str(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        text = str(error) if str(error).startswith("`") else f"Out of memory: {error}".strip(": ")
        return f"{text} A smaller network, fewer examples or a smaller --chunk-size take less."
    where = traceback.extract_tb(error.__traceback__)[-1].filename
    refused = isinstance(error, ValueError | TypeError) and " must " in str(error)
    return str(error) if refused and Path(where).is_relative_to(Path(__file__).parent) else None


def _fault(error: Exception) -> str:
    """Writes the traceback to a file and returns the line that names it."""
    text = "".join(traceback.format_exception(error))
    found = ", ".join(f"{name} {version}" for name, version in _record.versions().items())
    with tempfile.NamedTemporaryFile(
        "w", prefix="regjax-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        file.write(f"{found}\n{' '.join(map(repr, sys.argv))}\n\n{text}")
    kind = f"{type(error).__name__}: {error}"[:200]
    return f"a fault of regjax, {kind}; please report it with the file {file.name}."


def _show(text: str) -> int:
    """Prints a text, whatever characters the terminal knows, and returns the status of success."""
    with contextlib.suppress(AttributeError, ValueError):  # a stream of a test or an editor
        typed: Any = sys.stdout
        typed.reconfigure(errors="replace")
    print(text, flush=True)
    return _DONE


def _fail(message: str, status: int) -> int:
    print(f"regjax: {' '.join(message.split())}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
