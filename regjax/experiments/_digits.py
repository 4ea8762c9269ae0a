"""scikit-learn's digits, read from its file: importing scikit-learn takes ten times as long."""

import importlib.util
from pathlib import Path

import numpy as np

from regjax.experiments._dataset import DataError, Source, in_memory

_FILE = "datasets/data/digits.csv.gz"
_NUM_TEST = 300
_FACTOR = 15  # the largest that keeps 16 levels above zero within uint8
_SEED = 0


def read() -> Source:
    """Reads the images and splits them as `train_test_split(stratify=labels)` does with its seed.

    Raises:
      DataError: scikit-learn is not installed, or has no such file.
    """
    found = importlib.util.find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("digits needs scikit-learn: pip install 'regjax[run]'.")
    path = Path(found.origin).parent / _FILE
    try:
        rows = np.loadtxt(path, delimiter=",", dtype=np.int64)  # 64 grey levels and the class
    except (OSError, ValueError) as error:
        raise DataError(f"digits needs a whole scikit-learn; its file {path}: {error}") from error
    images = (rows[:, :-1] * _FACTOR).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = rows[:, -1]
    train, test = _split(labels)
    return Source(
        in_memory(images[train], labels[train]),
        in_memory(images[test], labels[test]),
        num_classes=10,
        source="scikit-learn",
    )


def _split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the examples to train and to test, of each class its share, in random order."""
    draws = np.random.RandomState(_SEED)
    counts = np.bincount(labels)
    num_train = _shares(counts, len(labels) - _NUM_TEST, draws)
    num_test = _shares(counts - num_train, _NUM_TEST, draws)
    train, test = [], []
    for label, first, others in zip(range(len(counts)), num_train, num_test, strict=True):
        of_class = np.flatnonzero(labels == label)[draws.permutation(counts[label])]
        train.append(of_class[:first])
        test.append(of_class[first : first + others])
    return draws.permutation(np.concatenate(train)), draws.permutation(np.concatenate(test))


def _shares(counts: np.ndarray, total: int, draws: np.random.RandomState) -> np.ndarray:
    """How many of each class there are among `total`: rounded up where most is left, by lot."""
    exact = counts / counts.sum() * total
    shares = np.floor(exact).astype(int)
    left = exact - shares
    for value in np.unique(left)[::-1]:
        missing = total - shares.sum()
        if missing > 0:
            places = np.flatnonzero(left == value)
            shares[draws.choice(places, min(missing, len(places)), replace=False)] += 1
    return shares
