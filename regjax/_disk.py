"""Files and folders as the system has them: what may be read, one run a folder, whole files.

Nothing here knows what is in a file. Each error is one line that names the path, and its class says
what kind of thing went wrong, so that a caller can mend what it understands and leave the rest.
"""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # no Unix
    fcntl = None  # type: ignore[assignment]

# The bytes and the length, where the system can leave the file's times for later.
_SYNC = getattr(os, "fdatasync", os.fsync)
_LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class CheckpointError(ValueError):
    """A file or folder that cannot be written, read or used, in one line that names it."""


class MissingError(CheckpointError):
    """There is no such file."""


class KindError(CheckpointError):
    """A folder, a pipe or a device where a file is wanted, or more bytes than such a file has."""


class DamagedError(CheckpointError):
    """The bytes are not those that were written."""


class RefusedError(CheckpointError):
    """The system does not let this process read or write here."""


class LockedError(CheckpointError):
    """Another process, or another run of this one, uses the folder."""


def regular_file(path: str | os.PathLike[str], *, kind: str, max_bytes: int | None = None) -> int:
    """Checks that a file can be read to its end, before anything is read.

    Pipes would be waited for and devices read without end. Only the file itself is opened, and not
    waited for.

    Args:
      path: the file; a link is followed.
      kind: what it has to be, for the message: "a checkpoint".
      max_bytes: the most that such a file holds; None: any.

    Returns:
      Its number of bytes.

    Raises:
      MissingError: there is none.
      KindError: it is a folder, a pipe, a device, or larger than `max_bytes`.
      RefusedError: it may not be read.
    """
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            what = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
            raise KindError(f"{path} must be {kind}, a regular file, got {what}.")
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
    except (FileNotFoundError, NotADirectoryError):
        raise MissingError(f"{path} must be {kind}, got no such file.") from None
    except OSError as error:
        raise RefusedError(
            f"{path} must be {kind} that can be read, got {error.strerror}."
        ) from error
    except ValueError as error:
        if isinstance(error, KindError):
            raise
        # A null character, say.
        raise MissingError(f"{path!r} must name {kind}, got {error}.") from None
    if max_bytes is not None and found.st_size > max_bytes:
        raise KindError(
            f"{path} must be {kind} of at most {max_bytes:,} bytes, got {found.st_size:,}."
        )
    return found.st_size


def writable_folder(folder: str | os.PathLike[str]) -> Path:
    """Makes a folder where there is none, and tries to write into it.

    Args:
      folder: with all that is above it.

    Returns:
      The folder.

    Raises:
      KindError: it, or something above it, is no folder.
      RefusedError: it cannot be made, or not be written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".{secrets.token_hex(8)}.tmp"
        trial.touch(exist_ok=False)
        trial.unlink()
    except (FileExistsError, NotADirectoryError):
        raise KindError(f"{folder} must be a folder, got something else there.") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RefusedError(f"{folder} must be a folder to write to, got {reason}.") from error
    return folder


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str], *, name: str = _LOCK) -> Iterator[Path]:
    """Keeps all others out of a folder while the block runs.

    The lock is the kernel's, on an open file: it goes with the process, however that ends, and what
    a killed process leaves behind locks nobody out. Other threads of this process are kept out too.

    Args:
      folder: made where it is not there.
      name: of the lock's file in the folder; different names exclude different things.

    Yields:
      The folder.

    Raises:
      LockedError: it is in use; names the process.
      KindError: it is no folder.
      RefusedError: it cannot be written to.
    """
    folder = writable_folder(folder)
    path = folder / name
    descriptor = _lock(folder, path)
    try:
        yield folder
    finally:
        if descriptor is not None:
            # Taken away while it is locked: who opened it before looks again for the name.
            with contextlib.suppress(OSError):
                if _is_same(descriptor, path):
                    path.unlink()
            # Said aloud, since a forked child may have the file open as well.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)


def _lock(folder: Path, path: Path) -> int | None:
    """Returns the open and locked file, None where the system has no locks."""
    if fcntl is None:
        _warn_of_no_lock(folder)
        return None
    while True:
        with contextlib.ExitStack() as stack:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                descriptor = os.open(path, flags, 0o666)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run before may have taken the file away between these two lines.
                if _is_same(descriptor, path):
                    owner = {"process": os.getpid(), "host": socket.gethostname()}
                    os.truncate(descriptor, 0)
                    os.pwrite(descriptor, json.dumps(owner).encode(), 0)
                    stack.pop_all()
                    return descriptor
            except BlockingIOError:
                raise LockedError(
                    f"{folder} must be used by one run at a time, got one that "
                    f"{_holder(descriptor)} is using."
                ) from None
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    _warn_of_no_lock(folder)
                    return None
                raise RefusedError(
                    f"{path} must be a file to lock, got {error.strerror}."
                ) from error


def _warn_of_no_lock(folder: Path) -> None:
    warnings.warn(
        f"{folder} is where files cannot be locked: see to it that no other run uses it.",
        stacklevel=5,
    )


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    """Names the process that has the lock, as far as it has written itself down."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        process, host = int(owner["process"]), str(owner["host"])
    except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError, OSError):
        return "another process"
    if (process, host) == (os.getpid(), socket.gethostname()):
        return f"another run of this process ({process})"
    return f"process {process} on {host}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` at the end: readers see either one whole.

    The bytes go to a hidden name in the same folder and reach the disk before they take the place
    of `path`, so that a process killed at any time, or a power cut, leaves a whole file. Only a
    file is replaced: a pipe, a device or a folder of that name stays what it is.

    Raises:
      KindError: there is one.
      OSError: the file cannot be written.
    """
    # A name of its own for each call: two runs in one folder do not write into each other's file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            _SYNC(file.fileno())
        check_replaceable(path)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def check_replaceable(path: Path) -> None:
    """Checks that a file may take the place of what is there; asked before much is computed.

    Raises:
      KindError: there is a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():
        what = _KINDS.get(stat.S_IFMT(path.stat().st_mode), "something else")
        raise KindError(f"{path} must be a file or not be there, got {what}.")


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes have left that were about to replace `path`.

    Only for whoever has locked the folder: of another process it would take the work in progress.
    """
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}\.tmp")
    for other in path.parent.iterdir():
        if pattern.fullmatch(other.name):
            other.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable, where folders can be synchronised."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
