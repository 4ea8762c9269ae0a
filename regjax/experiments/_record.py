"""What a run leaves behind, as JSON: options, versions, data and numbers."""

import json
import math
import platform
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax

import regjax
from regjax import _files
from regjax.experiments._data import Dataset

Record = dict[str, Any]


def write(path: Path, record: Record) -> None:
    """Writes `record` as JSON in one go: readers see the old file or the new one.

    Args:
      path: the file.
      record: numbers that are not finite become null.
    """
    text = json.dumps(_plain(record), indent=1, allow_nan=False) + "\n"
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one go, its folder too if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _files.replacing(path) as file:
        file.write(content)


def versions() -> Record:
    """Versions of Python and of the packages that decide the numbers."""
    packages = {"jax": jax, "flax": flax, "optax": optax, "numpy": np, "regjax": regjax}
    found = {name: package.__version__ for name, package in packages.items()}
    return {"python": platform.python_version(), **found}


def describe(dataset: Dataset) -> Record:
    """Name, source, hash and sizes of the data."""
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
    """The name of a matrix among the options as one reads it."""
    return matrix.replace("_", " ").title()


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
