"""An .npz whose members are arrays stored as they are, written in one go and read with care.

A file is not trusted. What is read of it is bounded by its own size and by what is expected, before
it is read.
"""

import contextlib
import errno
import io
import math
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from regjax._disk import CheckpointError, DamagedError, RefusedError, regular_file

# The list of members: a thousand times that of a large network.
_MAX_DIRECTORY = 2**26
_MAX_NPY_HEADER = 2**16
# What reading a damaged zip raises; most of it found by flipping every bit of one.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    KeyError,
    OSError,  # an offset before the start
    RuntimeError,  # a flag or a method that zipfile does not know
    ValueError,  # no array, or one of objects, in a file of others
)


def write(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Writes as `np.savez`, but without its copies of each array while it holds the GIL."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            array = np.asarray(array, order="C")
            header = np.lib.format.header_data_from_array_1_0(array)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(array.reshape(-1).view(np.uint8).data)


class _Bounded(io.FileIO):
    """A file of which no more than `limit` bytes are read in one go."""

    limit = _MAX_DIRECTORY

    def read(self, size: int | None = -1) -> bytes:
        """Reads as a file does, unless that is more than `limit`."""
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.limit:
            raise zipfile.BadZipFile(f"a list of members of {size} bytes")
        return super().read(size)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Opens what `write` has written; no array is read yet.

    Raises:
      CheckpointError: the file is missing, refused by the system, damaged, or of another kind.
    """
    size = regular_file(path, kind="a checkpoint")
    if size == 0:
        # What the system makes up as it is read may have no end.
        raise _damaged(path, EOFError("it is empty"))
    with contextlib.ExitStack() as stack:
        start = b""
        try:
            file = stack.enter_context(_Bounded(path))
            start = file.read(4)
            archive = zipfile.ZipFile(file)
        except _DAMAGE as error:
            # All zip files that are not empty begin like this.
            if start and start != b"PK\x03\x04":
                raise not_ours(path) from error
            raise _misread(path, error) from error
        file.limit = size
        header = archive.NameToInfo.get("header.npy")
        if header is None or header.compress_type != zipfile.ZIP_STORED:
            raise not_ours(path)
        yield archive


def read_array(path: Path, archive: zipfile.ZipFile, name: str, max_bytes: int) -> np.ndarray:
    """Reads a member, unless it holds more than it should.

    Raises:
      DamagedError: it is not as it was written.
      RefusedError: the system does not give it.
    """
    try:
        member = archive.getinfo(name + ".npy")
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{name} is compressed")
        if member.file_size > max_bytes + _MAX_NPY_HEADER:
            raise ValueError(f"{member.file_size} bytes for {name}, which has at most {max_bytes}")
        # All of the member at once: only at its end does zipfile compare the CRC.
        return _to_array(archive.read(member))
    except _DAMAGE as error:
        raise _misread(path, error) from error


def _to_array(content: bytes) -> np.ndarray:
    """Reads an .npy; NumPy alone makes room for what its header says before it looks."""
    file = io.BytesIO(content)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of .npy")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("Object arrays cannot be loaded")
    size, room = math.prod(shape) * dtype.itemsize, len(content) - file.tell()
    if min(shape, default=0) < 0 or size != room:
        raise ValueError(f"{room} bytes for an array of shape {shown(shape)}")
    return np.load(io.BytesIO(content), allow_pickle=False)


def shown(value: object, limit: int = 100) -> str:
    """Returns what stands in a file as a message can show it: short, and on one line."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def _misread(path: Path, error: Exception) -> CheckpointError:
    """Tells a file that the system does not give from one whose bytes are wrong."""
    # Of a wrong position in the file the system says that the argument is invalid.
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return RefusedError(f"{path} must be readable, got {error.strerror}.")
    return _damaged(path, error)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return DamagedError(f"{path} must be a whole checkpoint, got a damaged file: {error}.")


def not_ours(path: Path) -> CheckpointError:
    """Makes the error of a file that is none of ours, or none that is known here."""
    return CheckpointError(f"{path} must be a checkpoint of regjax, got another kind of file.")
