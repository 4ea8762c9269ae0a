"""The command line: `python -m regjax spectrum`, `landscape` and `train`."""

import contextlib
import dataclasses
import io
import re
import sys
from collections.abc import Sequence
from typing import Any

from regjax._files import CheckpointError
from regjax.experiments import _compare, _landscape_run, _report, _spectrum_run
from regjax.experiments._data import DataError
from regjax.experiments._folder import checkpoint_path, out_dir
from regjax.experiments._options import UsageError
from regjax.experiments._settings import (
    LandscapeSettings,
    SpectrumSettings,
    TrainSettings,
    with_training_options,
)
from regjax.experiments._training import TrainingError, read_run

_COMMANDS: dict[str, type[TrainSettings]] = {
    "spectrum": SpectrumSettings,
    "landscape": LandscapeSettings,
    "train": TrainSettings,
}
_PROGRAM = "python -m regjax"
_DESCRIPTION = "Train networks and see the curvature and the shape of their loss."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: the words of the command line; None takes those of the process.

    Returns:
      The exit status: 0; 2 after a line on stderr that says what was wrong; 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _Bar() as bar:
            _run(words, bar)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "interrupted.", 130)
    except Exception as error:
        if not _is_users(error):
            raise
        return _fail(str(error), 2)
    return 0


def _run(words: list[str], bar: "_Bar") -> None:
    settings = _parse(words)
    settings = _from_checkpoint(words, settings)
    try:
        text = _text_of(settings, bar)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {out_dir(settings)} holds what was computed, --resume goes on."
        ) from None
    bar.close()
    print(f"{text}\n\nResults are in {out_dir(settings)}.")


def _text_of(settings: TrainSettings, bar: "_Bar") -> str:
    """Runs what `settings` describe and returns what is to be printed."""
    if isinstance(settings, LandscapeSettings):
        if settings.compare:
            return _report.landscapes_text(_compare.run_compare(settings, bar))
        record = _landscape_run.run_landscape(settings, bar)
        return f"{_report.training_text(record)}\n\n{_report.landscape_text(record)}"
    if isinstance(settings, SpectrumSettings):
        if settings.compare:
            return _report.comparison_text(_compare.run_compare(settings, bar))
        record = _spectrum_run.run_spectrum(settings, bar)
        return f"{_report.training_text(record)}\n\n{_report.spectrum_text(record)}"
    return _report.training_text(_spectrum_run.run_train(settings, bar))


def _parse(words: list[str], default: TrainSettings | None = None) -> TrainSettings:
    """Parses `words`, with one line instead of tyro's box if they are wrong."""
    import tyro

    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            command = words[0] if words else ""
            if command not in _COMMANDS:
                return tyro.extras.subcommand_cli_from_dict(
                    {**_COMMANDS}, prog=_PROGRAM, description=_DESCRIPTION, args=words
                )
            return tyro.cli(
                _COMMANDS[command],
                prog=f"{_PROGRAM} {command}",
                args=words[1:],
                default=_COMMANDS[command]() if default is None else default,
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_first_sentence(told.getvalue())) from None


def _from_checkpoint(words: list[str], settings: TrainSettings) -> TrainSettings:
    """Returns the settings with the training options of the checkpoint that they start from.

    Parsed again with these for defaults, an option keeps a value of its own only if it was given:
    `restore` then finds the conflict.
    """
    checkpoint = getattr(settings, "checkpoint", None)
    if checkpoint is not None:
        path = checkpoint_path(checkpoint)
    elif settings.resume and not getattr(settings, "compare", None):
        path = out_dir(settings) / "checkpoint.npz"
    else:
        return settings
    stored, _, _ = read_run(path)
    defaults = dataclasses.replace(_COMMANDS[words[0]](), out=out_dir(settings))
    return _parse(words, with_training_options(defaults, stored))


def _first_sentence(box: str) -> str:
    """Returns what tyro says between its title and its next rule, on one line, without frame."""
    lines = [line.strip(" │") for line in box.splitlines()[1:]]
    paragraph: list[str] = []
    for line in lines:
        is_rule = set(line) <= set("─-")
        if is_rule and paragraph:
            break
        if not is_rule:
            paragraph.append(line)
    sentence = re.sub(r"\s+([.,])", r"\1", " ".join(paragraph)).rstrip(".")
    return f"{sentence}; see {_PROGRAM} --help."


def _is_users(error: Exception) -> bool:
    """Tells whether the user can mend it: our own errors, and files that cannot be used."""
    return isinstance(error, (UsageError, DataError, CheckpointError, TrainingError, OSError))


def _fail(message: str, status: int) -> int:
    print(f"regjax: {' '.join(message.split())}", file=sys.stderr)
    return status


class _Bar:
    """A progress bar on stderr, a line for each stage."""

    def __init__(self) -> None:
        self._stage: str | None = None
        self._bar: Any = None

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        """Shows that `done` steps of `total` of a stage are over."""
        if stage != self._stage:
            from tqdm import tqdm

            self.close()
            self._stage, self._bar = stage, tqdm(desc=stage, total=total, mininterval=0.5)
        if self._bar is None:
            return
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def close(self) -> None:
        """Ends the line of the stage."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


if __name__ == "__main__":
    sys.exit(main())
