"""MNIST and Fashion-MNIST from their IDX files, plain or gzip, checked against known hashes."""

import gzip
import hashlib
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from regjax.experiments._dataset import DataError, Source, check_file, in_memory

NAMES = ("fashion_mnist", "mnist")

_REMEDY = "Fetch the original file again."
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
_SHAPES: dict[str, tuple[int, ...]] = {
    "train-images-idx3-ubyte": (60000, 28, 28),
    "train-labels-idx1-ubyte": (60000,),
    "t10k-images-idx3-ubyte": (10000, 28, 28),
    "t10k-labels-idx1-ubyte": (10000,),
}
# SHA-256 of the uncompressed files, in the order of _SHAPES. fashion_mnist: taken from Debian's
# package dataset-fashion-mnist, whose payload is the authors' own. mnist: as several independent
# projects list them for the files of yann.lecun.com/exdb/mnist.
_SHA256 = {
    "fashion_mnist": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
    "mnist": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}


def read(name: str, folders: Sequence[Path]) -> Source:
    """Reads one of `NAMES` from the first folder that holds any of its files.

    Args:
      name: `fashion_mnist` or `mnist`.
      folders: looked through in this order, each one's subfolder `name` before itself; Debian's
        folder comes last (fashion_mnist only).

    Raises:
      DataError: a file is missing, cannot be read, is not the IDX file it should be, or its
        uncompressed content has another SHA-256 than the original.
    """
    paths = _find(name, folders)
    arrays = [
        read_file(path, shape, sha256)
        for path, shape, sha256 in zip(paths, _SHAPES.values(), _SHA256[name], strict=True)
    ]
    train_inputs, train_targets, test_inputs, test_targets = arrays
    return Source(
        in_memory(train_inputs[..., None], train_targets),
        in_memory(test_inputs[..., None], test_targets),
        num_classes=10,
        source=str(paths[0].parent),
    )


def read_file(path: Path, shape: tuple[int, ...], sha256: str) -> np.ndarray:
    """Reads an IDX file of unsigned bytes.

    Args:
      path: gzip if it ends in `.gz`.
      shape: what it must hold.
      sha256: what the uncompressed file must have.

    Returns:
      uint8 array of `shape`, read-only.

    Raises:
      DataError: the file cannot be read or is not as it must be.
    """
    header = struct.pack(f">{len(shape) + 1}I", 0x0800 | len(shape), *shape)
    size = len(header) + math.prod(shape)
    content = _content(path, size + 1)
    if content[:4] != header[:4]:
        raise DataError(
            f"{path} is not the IDX file it should be: it starts with 0x{content[:4].hex()}, not "
            f"0x{header[:4].hex()}. {_REMEDY}"
        )
    if len(content) >= len(header) and content[: len(header)] != header:
        found = struct.unpack_from(f">{len(shape)}I", content, 4)
        raise DataError(f"{path} must hold an array of shape {shape}, got {found}. {_REMEDY}")
    if len(content) != size:
        found_size = f"{len(content)} bytes" if len(content) < size else "more"
        raise DataError(
            f"{path} must hold {size} bytes (uncompressed), got {found_size}. {_REMEDY}"
        )
    found_sha256 = hashlib.sha256(content).hexdigest()
    if found_sha256 != sha256:
        raise DataError(
            f"{path} is damaged or of another data set: the SHA-256 of its uncompressed content "
            f"must be {sha256}, got {found_sha256}. {_REMEDY}"
        )
    return np.frombuffer(content, np.uint8, offset=len(header)).reshape(shape)


def _content(path: Path, limit: int) -> bytes:
    """Reads the first `limit` bytes, so that no file can fill the memory."""
    if check_file(path) == 0:
        return b""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return file.read(limit)
    except EOFError as error:
        raise DataError(f"{path} is truncated. {_REMEDY}") from error
    except (OSError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}. {_REMEDY}") from error


def _find(name: str, folders: Sequence[Path]) -> list[Path]:
    candidates = [*folders, _DEBIAN_FOLDER] if name == "fashion_mnist" else list(folders)
    for folder in [place for root in candidates for place in (root / name, root)]:
        found = {stem: path for stem in _SHAPES if (path := _plain_or_gzip(folder / stem))}
        missing = [stem for stem in _SHAPES if stem not in found]
        if found and missing:
            raise DataError(
                f"{folder} has only some of the files of {name}: put {', '.join(missing)} "
                "(plain or .gz) there too."
            )
        if found:
            return list(found.values())
    package = " or install Debian's package dataset-fashion-mnist" * (name == "fashion_mnist")
    looked = f" (looked in {', '.join(map(str, candidates))})" if candidates else ""
    raise DataError(
        f"No files of {name} found{looked}: put {', '.join(_SHAPES)} (plain or .gz) into a folder "
        f"and name it with --data-dir or the environment variable REGJAX_DATA{package}."
    )


def _plain_or_gzip(path: Path) -> Path | None:
    for candidate in (path, path.with_name(path.name + ".gz")):
        if candidate.exists():
            return candidate
    return None
