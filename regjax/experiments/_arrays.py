"""A data set of own arrays, from an .npz file."""

import zipfile
from pathlib import Path

import numpy as np

from regjax.experiments._dataset import DataError, Source, in_memory
from regjax.experiments._memory import available_bytes
from regjax.experiments._ranges import LARGEST

SUFFIX = ".npz"
_NAMES = ("train_inputs", "train_targets", "test_inputs", "test_targets")


def read(path: Path) -> Source:
    """Reads `train_inputs`, `train_targets`, `test_inputs` and `test_targets` of an .npz file.

    Inputs are uint8 or floating point, (examples, height, width, channels), (examples, height,
    width) or (examples, features); targets are integers (examples,), the classes from 0 on.

    Raises:
      DataError: there is no such file, or it does not hold such arrays.
    """
    arrays = _load(path)
    rule = f"{path} must hold "
    for part in ("train", "test"):
        inputs, targets = arrays[f"{part}_inputs"], arrays[f"{part}_targets"]
        if inputs.dtype != np.uint8 and not np.issubdtype(inputs.dtype, np.floating):
            raise DataError(
                f"{rule}{part}_inputs of uint8 or of a floating-point type, got {inputs.dtype}."
            )
        if inputs.ndim not in (2, 3, 4) or 0 in inputs.shape:
            raise DataError(
                f"{rule}{part}_inputs of 2, 3 or 4 axes, examples first and none of length 0, got "
                f"the shape {inputs.shape}."
            )
        if not np.isfinite(inputs).all():
            raise DataError(f"{rule}{part}_inputs that are finite, got NaN or infinity.")
        if float(np.abs(inputs).max()) > LARGEST:
            raise DataError(
                f"{rule}{part}_inputs of at most {LARGEST:g}, got {np.abs(inputs).max():g}."
            )
        if not np.issubdtype(targets.dtype, np.integer) or targets.shape != inputs.shape[:1]:
            raise DataError(
                f"{rule}{part}_targets of integers with the shape {inputs.shape[:1]}, got "
                f"{targets.dtype} with {targets.shape}."
            )
        if targets.min() < 0 or targets.max() >= 2**31:
            raise DataError(
                f"{rule}{part}_targets that are classes from 0 on, got {targets.min()} to "
                f"{targets.max()}."
            )
    shapes = [arrays[f"{part}_inputs"].shape[1:] for part in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"{rule}inputs of one shape, got {shapes[0]} to train, {shapes[1]} to test."
        )
    num_classes = 1 + max(int(arrays[f"{part}_targets"].max()) for part in ("train", "test"))
    train, test = (
        in_memory(_as_images(arrays[f"{part}_inputs"]), arrays[f"{part}_targets"])
        for part in ("train", "test")
    )
    return Source(train, test, num_classes, f"{path}")


def _load(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        kind = "something else" if path.exists() else "no such file"
        raise DataError(f"{path} must be a file of arrays, got {kind}.")
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
        missing = [name for name in _NAMES if f"{name}.npy" not in sizes]
        if missing:
            found = ", ".join(name.removesuffix(".npy") for name in sizes) or "none"
            raise DataError(f"{path} must hold the array {missing[0]}, got {found}.")
        needed, room = sum(sizes[f"{name}.npy"] for name in _NAMES), available_bytes()
        if needed > room:
            raise DataError(f"{path} must fit into memory, {room:.3g} bytes, got {needed}.")
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in _NAMES}
    except DataError:
        raise
    except PermissionError as error:
        raise DataError(f"{path} must be readable, got {error.strerror}.") from None
    except Exception as error:  # whatever zipfile and NumPy meet in a damaged file
        raise DataError(f"{path} must be a whole .npz file of arrays, got {error}.") from error


def _as_images(inputs: np.ndarray) -> np.ndarray:
    """Returns inputs (examples, height, width, channels); features are channels of one pixel."""
    if inputs.ndim == 2:
        return inputs[:, None, None, :]
    return inputs[..., None] if inputs.ndim == 3 else inputs
