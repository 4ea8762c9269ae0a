"""Image classification sets of tensorflow-datasets, already prepared, without TensorFlow."""

import contextlib
import difflib
import functools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from regjax.experiments._dataset import DataError, Source, Split, check_file

# Without namespaces and keyword arguments: those ask the network or choose other code.
_NAME = re.compile(r"\w+(/[\w.-]+)?(:\d+\.\d+\.\d+)?", re.ASCII)


def read(name: str, folder: Path | None, *, others: Sequence[str]) -> Source:
    """Opens a prepared data set; what is missing shows at once, the examples are read later.

    Args:
      name: `name[/config][:version]`.
      folder: where tensorflow-datasets keeps its data. None: its own default.
      others: names that `load` knows besides, for the message about an unknown one.

    Raises:
      DataError: the name is unknown, or the data set is not prepared here, has no `train` and
        `test` splits or no `image` and `label` features. The splits raise it for damaged files,
        images that differ in size and labels that are no class.
    """
    place = f"{folder or 'the default folder of tensorflow-datasets'}"
    with _one_line_errors(f"{name} in {place}"):
        if folder is not None and _NAME.fullmatch(name):
            _check_files(folder / re.split("[/:]", name)[0])
        import tensorflow_datasets as tfds  # a second, and only these names need it

        builder = _builder(tfds, name, folder, others)
        try:
            # With download=True a missing set means minutes of retries when offline.
            train, test = tfds.data_source(
                name, split=["train", "test"], data_dir=folder, download=False
            )
        except Exception as error:
            # Asked only now: tfds.testing.mock_data serves sets that are not there.
            if builder.is_prepared() and not isinstance(error, NotImplementedError):
                raise
            raise DataError(
                f"{name} is not prepared as ArrayRecord in {place}. {_how_to_prepare(name)}"
            ) from error
        num_classes = _num_classes(name, train.dataset_info.features)
    train_split, test_split = (
        Split(len(data), functools.partial(_examples, data, f"{name} ({split}) in {place}"))
        for split, data in (("train", train), ("test", test))
    )
    source = f"tensorflow-datasets {train.dataset_info.full_name} in {place}"
    return Source(train_split, test_split, num_classes, source)


def _check_files(folder: Path) -> None:
    """Checks that nothing in the folder would be waited for, or read without end."""
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_file(path)


def _how_to_prepare(name: str) -> str:
    return (
        "Prepare it once where there is a network and TensorFlow: tfds.builder("
        f"{name!r}, data_dir=..., file_format='array_record').download_and_prepare(); then name "
        "that folder with --data-dir or the environment variable REGJAX_DATA."
    )


def _builder(tfds: Any, name: str, folder: Path | None, others: Sequence[str]) -> Any:
    if _NAME.fullmatch(name):
        with contextlib.suppress(tfds.core.DatasetNotFoundError):
            return tfds.builder(name, data_dir=folder)
    names = tfds.list_builders(with_community_datasets=False)  # the others need TensorFlow
    close = difflib.get_close_matches(name.lower(), [*others, *names], n=3, cutoff=0.65)
    hint = f" (did you mean {' or '.join(close)}?)" if close else ""
    raise DataError(
        f"Unknown data set {name!r}{hint}: it must be {', '.join(others)}, or the name of an image "
        "classification set of tensorflow-datasets, or one prepared in the folder that --data-dir "
        "or the environment variable REGJAX_DATA names."
    )


def _num_classes(name: str, features: Any) -> int:
    found = sorted(features) if hasattr(features, "keys") else []
    if not {"image", "label"} <= set(found):
        raise DataError(
            f"{name} is not for image classification: it must have the features image and label, "
            f"got {', '.join(found) or features}. Choose another data set."
        )
    image, label = features["image"], features["label"]
    if getattr(label, "num_classes", None) is None or np.dtype(image.np_dtype) != np.uint8:
        raise DataError(
            f"{name} must have uint8 images and a class label, got {image} and {label}. "
            "Choose another data set."
        )
    return int(label.num_classes)


def _examples(data: Any, what: str, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, height, width, channels) and labels (n,), converted one at a time."""
    num_classes = data.dataset_info.features["label"].num_classes
    labels = np.empty(len(indices), np.int32)
    images = np.empty(0, np.uint8)
    with _one_line_errors(what):
        for position, index in enumerate(indices.tolist()):
            example = data[index]
            image = example["image"]
            if position == 0:
                images = np.empty((len(indices), *image.shape), np.uint8)
            if image.shape != images.shape[1:]:
                raise DataError(
                    f"{what} must have images of one size, got {images.shape[1:]} and "
                    f"{image.shape}. Choose another data set."
                )
            images[position], labels[position] = image, example["label"]
    if not np.all((labels >= 0) & (labels < num_classes)):
        raise DataError(
            f"{what} must have labels from 0 to {num_classes - 1}, got {labels.min()} to "
            f"{labels.max()}. Choose another data set."
        )
    return (images[..., None] if images.ndim == 3 else images), labels


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turns whatever is raised below into a DataError, and mutes the warnings that go with it."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    except DataError:
        raise
    except ImportError as error:
        raise DataError(
            f"{what} needs a Python package that is missing ({_first_line(error)}): "
            "pip install 'regjax[run]' has all that reading prepared data takes."
        ) from error
    except Exception as error:
        raise DataError(
            f"{what} cannot be read ({_first_line(error)}): prepare it again, or name another "
            "folder with --data-dir or the environment variable REGJAX_DATA."
        ) from error
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
