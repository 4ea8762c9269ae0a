"""What a run leaves behind, as JSON: options, versions, data and numbers."""

import datetime
import json
import math
import platform
import time
from pathlib import Path
from typing import Any, TypeAlias

import flax
import jax
import numpy as np
import optax

import regjax
from regjax import _files
from regjax.experiments._data import Dataset

Record: TypeAlias = dict[str, Any]
"""What a JSON file holds, by name: numbers, texts, and lists and records of these."""

# A surface of 1000 x 1000 points and a thousand epochs of probes have a tenth of it.
_MAX_BYTES = 2**28
_TITLES = {
    "hessian": "Hessian",
    "gauss_newton": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical_fisher": "empirical Fisher matrix",
}


def write(path: Path, record: Record) -> None:
    """Writes `record` as JSON in one go: readers see the old file or the new one.

    Args:
      path: the file.
      record: numbers that are not finite become null.
    """
    text = json.dumps(plain(record), indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def read(path: Path) -> Record:
    """Reads what `write` has written; numbers that were not finite are None.

    Raises:
      CheckpointError: there is none, it cannot be read, or it is no record.
    """
    size = _files.regular_file(path, kind="a record", max_bytes=_MAX_BYTES)
    try:
        # What the system makes up as it is read has no size, and may have no end.
        record = json.loads(path.read_bytes() if size else b"")
    except OSError as error:
        raise _files.RefusedError(f"{path} must be readable, got {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise _files.DamagedError(f"{path} must be a whole record, got a damaged one.") from error
    if not isinstance(record, dict):
        raise _files.CheckpointError(f"{path} must be a record of regjax, got another file.")
    return record


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one go, its folder too if need be.

    Raises:
      CheckpointError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _files.replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise _files.RefusedError(f"{path} must be writable, got {error.strerror}.") from error


def versions() -> Record:
    """Returns the versions of Python and of the packages that decide the numbers."""
    packages = {"jax": jax, "flax": flax, "optax": optax, "numpy": np, "regjax": regjax}
    found = {name: package.__version__ for name, package in packages.items()}
    return {"python": platform.python_version(), **found}


def finished(start: float) -> Record:
    """Returns the date, and the seconds since `start` on the monotonic clock."""
    now = datetime.datetime.now(datetime.UTC)
    return {"date": now.isoformat(timespec="seconds"), "seconds": time.monotonic() - start}


def describe(dataset: Dataset) -> Record:
    """Returns name, source, hash and sizes of the data."""
    return {
        "name": dataset.name,
        "source": dataset.source,
        "sha256": dataset.sha256,
        "num_train": len(dataset.train_targets),
        "num_test": len(dataset.test_targets),
        "image_shape": list(dataset.train_inputs.shape[1:]),
        "num_classes": int(dataset.num_classes),
    }


def title(matrix: str) -> str:
    """Returns the name of a matrix among the options as one reads it."""
    return _TITLES[matrix]


def plain(value: Any) -> Any:
    """Returns a value as JSON gives it back; None where a number is not finite."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
