"""What a data set is: the arrays a run gets, and what a source of them hands over."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regjax import _files


class DataError(ValueError):
    """Data that are missing or damaged, in one line: which file, and what to do."""


class Dataset(NamedTuple):
    """Images and their classes, on the host.

    Attributes:
      name: as given to `load`.
      train_inputs: (num_train, height, width, channels), uint8, or floating point of own arrays.
      train_targets: int32 (num_train,), from 0 to `num_classes` - 1.
      test_inputs: (num_test, height, width, channels), of the same type.
      test_targets: int32 (num_test,).
      num_classes: number of classes.
      source: where the data came from.
      sha256: of the bytes of the four arrays above, one after the other in this order.
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


def check_file(path: Path) -> None:
    """Checks that data come from a file with an end, which can be read.

    Raises:
      DataError: it is a pipe, a device or a folder, or may not be read.
    """
    try:
        _files.regular_file(path, kind="a file of data")
    except _files.CheckpointError as error:
        raise DataError(str(error)) from None


def in_memory(images: np.ndarray, labels: np.ndarray) -> Split:
    """Makes the split of `images` (n, height, width, channels) and `labels` (n,) as they stand."""
    return Split(len(labels), lambda indices: (images[indices], labels[indices]))
