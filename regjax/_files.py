"""Files that are whole or not there; checkpoints, a tree of arrays and its metadata in one.

A checkpoint is an .npz without pickles. Its member `header` is JSON: the schema and its version, a
table of the leaves (path, dtype, shape) and the metadata. Each leaf is a member of its own,
`tree` + its path as `jax.tree_util.keystr` writes it. Every byte of both is under the zip's CRC.
"""

import contextlib
import io
import json
import os
import secrets
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from regjax._base import Tree

Json: TypeAlias = dict[str, Any]
"""What JSON calls an object."""

_SCHEMA = "regjax.checkpoint"
_VERSION = 1
# The bytes and the length, where the system can leave the file's times for later.
_SYNC = getattr(os, "fdatasync", os.fsync)
_PYTHON_TYPES = {bool: np.dtype(np.bool_), int: np.dtype(np.int64), float: np.dtype(np.float64)}
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


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used, in one line that names the file."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` at the end: readers see either one whole.

    The bytes go to a hidden name in the same folder and reach the disk before they take the place
    of `path`, so that a process killed at any time, or a power cut, leaves a whole file.
    """
    # A name of its own for each call: two runs in one folder do not write into each other's file.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            _SYNC(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save(path: str | os.PathLike[str], tree: Tree, *, metadata: Json) -> None:
    """Writes a tree to a file, atomically: `path` is the old file or the new one, never a part.

    Args:
      path: the file; its folder must exist.
      tree: tree whose leaves are arrays of numbers (JAX or NumPy, bfloat16 and its like included),
        typed PRNG keys, or Python numbers; on this host.
      metadata: what JSON can hold (tuples come back as lists): the settings that identify the
        problem.

    Raises:
      TypeError: a leaf is none of these, or `metadata` is not a dict that JSON can hold.
      ValueError: two leaves have the same path, or a Python integer needs more than 64 bits.
      CheckpointError: the file cannot be written.
    """
    path = Path(path)
    arrays: dict[str, np.ndarray] = {}
    table = []
    for name, leaf in _named_leaves(tree):
        if name in arrays:
            raise ValueError(f"`tree` must have leaves of different paths, got {name} twice.")
        arrays[name], entry = _encode(name, leaf)
        table.append(entry)
    header = {"schema": _SCHEMA, "version": _VERSION, "leaves": table, "metadata": metadata}
    arrays["header"] = np.frombuffer(_to_json(header).encode(), np.uint8)
    try:
        with replacing(path) as file:
            _write(file, arrays)
    except OSError as error:
        raise CheckpointError(f"{path} must be writable, got {error.strerror}.") from error


def _write(file: IO[bytes], arrays: dict[str, np.ndarray]) -> None:
    """Writes as `np.savez`, but without its copies of each array while it holds the GIL."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            array = np.asarray(array, order="C")
            header = np.lib.format.header_data_from_array_1_0(array)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(array.reshape(-1).view(np.uint8).data)


def load(path: str | os.PathLike[str], like: Tree) -> Tree:
    """Reads the tree that `save` wrote, bit for bit, and checks it against an example.

    Containers without leaves are not in the file; those of the result are the example's.

    Args:
      path: the file.
      like: tree of the same structure. Its leaves (arrays, keys, `jax.ShapeDtypeStruct`, Python
        numbers) give the shapes and dtypes that the file must have; their values are not used.

    Returns:
      A tree like `like`: NumPy arrays where `like` has them, Python numbers where it has those,
      JAX arrays on the default device elsewhere. Weakly typed arrays come back with a strong type.

    Raises:
      CheckpointError: the file is missing, damaged, not a checkpoint, of a later version, or its
        paths, shapes or dtypes are not those of `like`.
      TypeError: a leaf of `like` is not of a kind that `save` takes.
    """
    path = Path(path)
    named = _named_leaves(like)
    with _open(path) as archive:
        table = {entry["name"]: entry for entry in _read_header(path, archive)["leaves"]}
        _check_table(path, table, named)
        leaves = [
            _decode(path, name, leaf, table[name], _read_array(path, archive, name))
            for name, leaf in named
        ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_metadata(path: str | os.PathLike[str]) -> Json:
    """Reads the metadata that `save` was given, without the arrays.

    Args:
      path: the file.

    Returns:
      The dict, as JSON gives it back.

    Raises:
      CheckpointError: the file is missing, damaged, not a checkpoint or of a later version.
    """
    path = Path(path)
    with _open(path) as archive:
        return _read_header(path, archive)["metadata"]


def _named_leaves(tree: Tree) -> list[tuple[str, Tree]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [("tree" + jax.tree_util.keystr(path), leaf) for path, leaf in leaves]


def _has_dtype(leaf: object, kind: Any) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", np.object_), kind)


def _is_key(leaf: object) -> bool:
    return _has_dtype(leaf, jax.dtypes.prng_key)


def _signature(name: str, leaf: Any) -> Json:
    """Returns the row of the table that a leaf, or its ShapeDtypeStruct, stands for."""
    if type(leaf) in _PYTHON_TYPES:
        return {"name": name, "dtype": f"Python {type(leaf).__name__}", "shape": []}
    if any(_has_dtype(leaf, kind) for kind in (np.number, np.bool_, jax.dtypes.prng_key)):
        return {"name": name, "dtype": str(leaf.dtype), "shape": list(leaf.shape)}
    raise TypeError(
        f"`{name}` must be an array of numbers, a typed key or a Python number, got {leaf!r}."
    )


def _stored_dtype(leaf: Any) -> np.dtype:
    """Returns the dtype in the file: unsigned integers for those that NumPy does not know."""
    if type(leaf) in _PYTHON_TYPES:
        return _PYTHON_TYPES[type(leaf)]
    if _is_key(leaf):
        return np.dtype(np.uint32)
    dtype = np.dtype(leaf.dtype)
    return dtype if dtype.isbuiltin != 2 else np.dtype(f"uint{8 * dtype.itemsize}")


def _encode(name: str, leaf: Any) -> tuple[np.ndarray, Json]:
    entry, dtype = _signature(name, leaf), _stored_dtype(leaf)
    if _is_key(leaf):
        entry["key_impl"] = str(jax.random.key_impl(leaf))
        return np.asarray(jax.random.key_data(leaf)), entry
    if type(leaf) in _PYTHON_TYPES:
        try:
            return np.asarray(leaf, dtype), entry
        except OverflowError:
            raise ValueError(f"`{name}` must fit into 64 bits, got {leaf}.") from None
    return np.asarray(leaf).view(dtype), entry


def _decode(path: Path, name: str, leaf: Any, entry: Json, stored: np.ndarray) -> Tree:
    shape = stored.shape[:-1] if _is_key(leaf) else stored.shape
    if stored.dtype != _stored_dtype(leaf) or list(shape) != entry["shape"]:
        raise CheckpointError(
            f"{path} must hold what its table says, got {stored.dtype}{list(stored.shape)} for "
            f"the leaf {name}."
        )
    if type(leaf) in _PYTHON_TYPES:
        return stored.item()
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(stored), impl=entry["key_impl"])
    array = stored.view(leaf.dtype)
    if isinstance(leaf, np.ndarray | np.generic):
        return array if isinstance(leaf, np.ndarray) else array[()]
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        raise CheckpointError(
            f"{path} must be loaded with jax_enable_x64: the leaf {name} has dtype {array.dtype}."
        )
    return jnp.asarray(array)


def _check_table(path: Path, table: Json, named: list[tuple[str, Tree]]) -> None:
    """Checks paths, shapes and dtypes, before any array is read."""
    expected = {name: _signature(name, leaf) for name, leaf in named}
    rule = f"{path} must be a checkpoint of the same model and optimiser: "
    for name in [*expected, *table]:
        if name not in table:
            raise CheckpointError(f"{rule}the leaf {name} must be there, got a file without it.")
        if name not in expected:
            raise CheckpointError(f"{rule}it must have no leaf {name}, got a file with it.")
        for property_ in ("shape", "dtype"):
            found, wanted = table[name][property_], expected[name][property_]
            if found != wanted:
                raise CheckpointError(
                    f"{rule}the leaf {name} must have {property_} {wanted}, got {found}."
                )


def _open(path: Path) -> zipfile.ZipFile:
    try:
        with path.open("rb") as file:
            start = file.read(4)
        return zipfile.ZipFile(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} must be a checkpoint, got no such file.") from None
    except OSError as error:
        if error.errno is None:  # from zipfile, about the contents
            raise _damaged(path, error) from error
        raise CheckpointError(f"{path} must be a readable file, got {error.strerror}.") from error
    except _DAMAGE as error:
        # All zip files that are not empty begin like this.
        if start and start != b"PK\x03\x04":
            raise _not_ours(path) from error
        raise _damaged(path, error) from error


def _read_header(path: Path, archive: zipfile.ZipFile) -> Json:
    if "header.npy" not in archive.namelist():
        raise _not_ours(path)
    try:
        header = json.loads(_read_array(path, archive, "header").tobytes())
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise _not_ours(path) from None
    if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
        raise _not_ours(path)
    if header["version"] != _VERSION:
        raise CheckpointError(
            f"{path} must have schema version {_VERSION}, the one that this regjax reads, got "
            f"{header['version']}."
        )
    return header


def _read_array(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    try:
        # All of the member at once: only at its end does zipfile compare the CRC.
        return np.load(io.BytesIO(archive.read(name + ".npy")), allow_pickle=False)
    except _DAMAGE as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} must be a whole checkpoint, got a damaged file: {error}.")


def _not_ours(path: Path) -> CheckpointError:
    return CheckpointError(f"{path} must be a checkpoint of regjax, got another kind of file.")


def _to_json(header: Json) -> str:
    metadata = header["metadata"]
    try:
        if isinstance(metadata, dict):
            return json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`metadata` must be what JSON can hold, got {error}.") from error
    raise TypeError(f"`metadata` must be a dict, got {metadata!r}.")


def _sync_folder(folder: Path) -> None:
    """Makes the new name durable, where folders can be synchronised."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
