"""What the checkpoint of a training run says of itself, which anybody may have written."""

import math
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from regjax import _files
from regjax.experiments._options import UsageError, option
from regjax.experiments._settings import (
    COMPARISON,
    INCIDENTAL,
    TrainSettings,
    option_types,
    replace,
    training_options,
)


def read_run(path: Path) -> tuple[dict[str, Any], list[float], str]:
    """Reads the training options, the losses and the SHA-256 of the data in a checkpoint.

    Raises:
      CheckpointError: it is missing, damaged or not one of a training run; or an entry is missing,
        unknown, or not what it should be.
    """
    metadata = _metadata(path)
    return metadata["settings"], metadata["losses"], metadata["data_sha256"]


def read_shape(path: Path) -> tuple[tuple[int, int, int], int]:
    """Reads the shape (height, width, channels) of the inputs and the number of classes.

    Raises:
      CheckpointError: as `read_run`.
    """
    metadata = _metadata(path)
    height, width, channels = metadata["input_shape"]
    return (height, width, channels), metadata["num_classes"]


def read_marks(path: Path) -> dict[int, str]:
    """Reads the SHA-256 of the weights after each epoch, by its number.

    Raises:
      CheckpointError: as `read_run`.
    """
    marks = _metadata(path)["weights_sha256"]
    return {int(epochs): sha256 for epochs, sha256 in marks.items()}


def _metadata(path: Path) -> dict[str, Any]:
    """Reads the metadata of a checkpoint, which anybody may have written: all is checked."""
    metadata = _files.read_metadata(path)
    for name in metadata:
        if name not in _ENTRIES:
            raise _files.CheckpointError(
                f"{path} must be the checkpoint of a training run, got one with "
                f"{_files.shown(name)!r}."
            )
    for name, is_right in _ENTRIES.items():
        if name not in metadata:
            raise _files.CheckpointError(
                f"{path} must be the checkpoint of a training run, got one without {name!r}."
            )
        if not is_right(metadata[name]):
            raise _files.CheckpointError(
                f"{path} must be the checkpoint of a training run, got something else for {name!r}."
            )
    try:
        _check_options(metadata["settings"])
    except UsageError as error:
        raise _files.CheckpointError(
            f"{path} must have the options of a training run: {error}"
        ) from None
    return metadata


def _check_options(stored: dict[str, Any]) -> None:
    """Checks what a file says the options of a training run are.

    Only what decides which network comes out may come from a file: no folder, and nothing that is
    to be followed or replaced.

    Raises:
      UsageError: an option is missing, unknown, or no value that it can have.
    """
    known = option_types(TrainSettings)
    for name, value in stored.items():
        if name not in known or name in (*INCIDENTAL, *COMPARISON):
            raise UsageError(f"{_files.shown(name)!r} is no option of training in this version.")
        if not _is_of(known[name], value):
            raise UsageError(f"{option(name)} cannot be {_files.shown(value)}.")
    expected = training_options(replace(TrainSettings(), stored))
    for name in [*expected, *stored]:
        if name not in stored or name not in expected:
            has = "is missing" if name not in stored else "does not belong to the others"
            raise UsageError(f"{option(name)} {has}: another version's, or not what was written.")


def _is_of(hint: Any, value: object) -> bool:
    """Whether a value from JSON is of the type of an option."""
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    kinds = typing.get_args(hint) or (hint,)
    if float in kinds and type(value) is int:
        return True
    return type(value) in kinds


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def _is_losses(value: object) -> bool:
    # Booleans are integers in Python, but not in JSON.
    return isinstance(value, list) and all(type(x) is float and math.isfinite(x) for x in value)


def _is_marks(value: object) -> bool:
    is_mark = lambda key, mark: re.fullmatch("[0-9]{1,9}", key) is not None and _is_sha256(mark)
    return isinstance(value, dict) and all(is_mark(*item) for item in value.items())


def _are_counts(value: object, number: int) -> bool:
    if not isinstance(value, list) or len(value) != number:
        return False
    return all(type(x) is int and 0 < x < 2**31 for x in value)


_ENTRIES: dict[str, Callable[[object], bool]] = {
    "settings": lambda value: isinstance(value, dict),
    "losses": _is_losses,
    "data_sha256": _is_sha256,
    "weights_sha256": _is_marks,
    "input_shape": lambda value: _are_counts(value, 3),
    "num_classes": lambda value: _are_counts([value], 1),
}
