"""Image classification data by name, offline: `load`."""

import hashlib
import os
from pathlib import Path

import numpy as np

from regjax import _checks
from regjax.experiments import _arrays, _digits, _idx, _tfds
from regjax.experiments._dataset import DataError as DataError
from regjax.experiments._dataset import Dataset as Dataset
from regjax.experiments._dataset import Source, Split


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Loads images and their classes from this machine; nothing is downloaded.

    - `digits`: the 8 x 8 images of scikit-learn, 1497 to train and 300 to test, in a stratified
      split that is always the same. Grey levels 0 to 16 are multiplied by 15, which is exact.
    - `fashion_mnist`, `mnist`: IDX files (plain or .gz) in `data_dir`. Without `data_dir` the
      folder is that of the environment variable REGJAX_DATA, or for fashion_mnist
      /usr/share/datasets/fashion-mnist of Debian's package dataset-fashion-mnist. The files are in
      this folder or in its subfolder with the name of the data set. Their SHA-256 is checked.
    - a name that ends in `.npz`: a file with this path. It contains the arrays `train_inputs` and
      `test_inputs`, uint8 or floating point, of shape (examples, height, width, channels),
      (examples, height, width) or (examples, features), and the integer arrays `train_targets` and
      `test_targets` of shape (examples,), with classes from 0 on.
    - any other name: a data set of TensorFlow Datasets, `name[/config][:version]`, with the splits
      `train` and `test` and the features `image` and `label`. It must already be prepared as
      ArrayRecord in `data_dir`, in the folder of REGJAX_DATA, or where TensorFlow Datasets looks.

    Example:
      >>> dataset = experiments.load("digits", num_train=256, num_test=64)
      >>> print(dataset.train_inputs.shape, dataset.train_inputs.dtype, dataset.num_classes)
      (256, 8, 8, 1) uint8 10

    Args:
      name: name of the data set, or path of an `.npz` file.
      data_dir: folder of the files; not used for digits and own arrays.
      num_train: number of training examples to take, the first ones; None: all.
      num_test: number of test examples to take, the first ones; None: all.
      seed: 0 leaves the order of the source; any other seed shuffles both splits before the first
        examples are taken.

    Returns:
      A `Dataset` of numpy arrays.

    Raises:
      DataError: the name is unknown; files are missing, damaged or have another shape; or there are
        fewer examples than asked for.
      TypeError: the name is not a string, or a number is not an integer.
      ValueError: a number is out of its range.
    """
    if not isinstance(name, str):
        raise TypeError(f"`name` must be a text, got {name!r}.")
    for argument, value in (("num_train", num_train), ("num_test", num_test)):
        if value is not None:
            _checks.integer(argument, value)
    _checks.integer("seed", seed, minimum=0, maximum=(2**32 - 1, "the largest seed of NumPy"))
    source = _source(name, data_dir)
    train_inputs, train_targets = _take("num_train", num_train, name, source.train, seed)
    test_inputs, test_targets = _take("num_test", num_test, name, source.test, seed)
    digest = hashlib.sha256()
    for array in (train_inputs, train_targets, test_inputs, test_targets):
        digest.update(array.data)
    return Dataset(
        name,
        train_inputs,
        train_targets,
        test_inputs,
        test_targets,
        num_classes=source.num_classes,
        source=source.source,
        sha256=digest.hexdigest(),
    )


def _take(
    argument: str, count: int | None, name: str, split: Split, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    available = split.num_examples
    if count is not None and count > available:
        raise DataError(
            f"`{argument}` must be at most {available}, the examples of {name}, got {count}."
        )
    order = np.random.default_rng(seed).permutation(available) if seed else np.arange(available)
    images, labels = split.read(order[:count])
    return np.ascontiguousarray(images), labels.astype(np.int32)


def _source(name: str, data_dir: str | os.PathLike[str] | None) -> Source:
    if name == "digits":
        return _digits.read()
    if name.endswith(_arrays.SUFFIX):
        return _arrays.read(Path(name).expanduser())
    named = [place for place in (data_dir, os.environ.get("REGJAX_DATA")) if place]
    folders = [Path(place).expanduser() for place in named]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder: --data-dir or REGJAX_DATA must name one.")
    if name in _idx.NAMES:
        return _idx.read(name, folders)
    return _tfds.read(name, folders[0] if folders else None, others=("digits", *_idx.NAMES))
