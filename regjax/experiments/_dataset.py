"""What a data set is: the arrays a run gets, and what a source of them hands over."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regjax import _files


class DataError(ValueError):
    """Data that are missing or damaged, in one line: which file, and what to do."""


class Dataset(NamedTuple):
    """Images and their classes as numpy arrays, from `load` or of your own.

    Example:
      >>> dataset = experiments.load("digits", num_train=256, num_test=64)
      >>> print(dataset.name, dataset.test_inputs.shape, dataset.test_targets[:5])
      digits (64, 8, 8, 1) [4 0 7 8 7]

    Attributes:
      name: name of the data set.
      train_inputs: (num_train, height, width, channels), uint8 or floating point.
      train_targets: int32 (num_train,), from 0 to `num_classes` - 1.
      test_inputs: (num_test, height, width, channels), of the same type.
      test_targets: int32 (num_test,).
      num_classes: number of classes.
      source: where the data came from.
      sha256: SHA-256 of the bytes of these four arrays, one after the other.
    """

    name: str
    train_inputs: np.ndarray
    train_targets: np.ndarray
    test_inputs: np.ndarray
    test_targets: np.ndarray
    num_classes: int
    source: str
    sha256: str


class Split(NamedTuple):
    """The training or the test examples of a source, read when asked for.

    Attributes:
      num_examples: how many there are.
      read: from int64 indices (n,) to images (n, height, width, channels) and their labels (n,),
        of any integer type.
    """

    num_examples: int
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


class Source(NamedTuple):
    """A data set before the choice of examples; attributes as in `Dataset`."""

    train: Split
    test: Split
    num_classes: int
    source: str


def check_file(path: Path) -> int:
    """Checks that data come from a file with an end, which can be read.

    Returns:
      Its number of bytes. What the system makes up as it is read has none, and may have no end.

    Raises:
      DataError: it is a pipe, a device or a folder, or may not be read.
    """
    try:
        return _files.regular_file(path, kind="a file of data")
    except _files.CheckpointError as error:
        raise DataError(str(error)) from None


def in_memory(images: np.ndarray, labels: np.ndarray) -> Split:
    """Makes the split of `images` (n, height, width, channels) and `labels` (n,) as they stand."""
    return Split(len(labels), lambda indices: (images[indices], labels[indices]))


def check_dataset(dataset: Dataset) -> None:
    """Checks that a data set is one: images and as many classes, of both parts.

    Raises:
      TypeError: it is none, or its arrays are of other types.
      ValueError: its arrays have other shapes, or a class is none.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`dataset` must be a Dataset, got {type(dataset).__name__}.")
    for part in ("train", "test"):
        names = f"{part}_inputs", f"{part}_targets"
        inputs, targets = (getattr(dataset, name) for name in names)
        for name, array in zip(names, (inputs, targets), strict=True):
            if not isinstance(array, np.ndarray):
                kind = type(array).__name__
                raise TypeError(f"`dataset.{name}` must be a NumPy array, got {kind}.")
        if inputs.ndim != 4 or 0 in inputs.shape or targets.shape != inputs.shape[:1]:
            raise ValueError(
                f"`dataset.{names[0]}` must be (examples, height, width, channels) and "
                f"`dataset.{names[1]}` (examples,), got {inputs.shape} and {targets.shape}."
            )
        if not np.issubdtype(targets.dtype, np.integer):
            raise TypeError(f"`dataset.{names[1]}` must be integers, got {targets.dtype}.")
        if targets.min() < 0 or targets.max() >= dataset.num_classes:
            raise ValueError(
                f"`dataset.{names[1]}` must be classes from 0 to {dataset.num_classes - 1}, got "
                f"{targets.min()} to {targets.max()}."
            )
