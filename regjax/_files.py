"""Checkpoints: a tree of arrays and its metadata in one file.

A checkpoint is an .npz without pickles. Its member `header` is JSON: the schema and its version, a
table of the leaves (path, dtype, shape) and the metadata. Each leaf is a member of its own,
`tree` + its path as `jax.tree_util.keystr` writes it. Every byte of both is under the zip's CRC.

A file is not trusted. What is read of it is bounded by its own size and by what is expected, before
it is read; and what is wrong with it is said by the class of the error: damaged, refused by the
system, of another version, or something else.
"""

import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _archive
from regjax._archive import shown as shown
from regjax._base import Tree
from regjax._disk import CheckpointError as CheckpointError
from regjax._disk import DamagedError as DamagedError
from regjax._disk import KindError as KindError
from regjax._disk import LockedError as LockedError
from regjax._disk import MissingError as MissingError
from regjax._disk import RefusedError as RefusedError
from regjax._disk import check_replaceable as check_replaceable
from regjax._disk import locked as locked
from regjax._disk import regular_file as regular_file
from regjax._disk import remove_leftovers as remove_leftovers
from regjax._disk import replacing as replacing

Json: TypeAlias = dict[str, Any]
"""What JSON calls an object."""

_SCHEMA = "regjax.checkpoint"
_VERSION = 1
_MAX_HEADER = 2**26  # a thousand times that of a large network
_PYTHON_TYPES = {bool: np.dtype(np.bool_), int: np.dtype(np.int64), float: np.dtype(np.float64)}


class VersionError(CheckpointError):
    """Another version of this package wrote it."""


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
    text = _to_json(header).encode()
    if len(text) > _MAX_HEADER:
        raise ValueError(f"`metadata` must be below {_MAX_HEADER} bytes, got {len(text)}.")
    arrays["header"] = np.frombuffer(text, np.uint8)
    try:
        with replacing(path) as file:
            _archive.write(file, arrays)
    except OSError as error:
        raise CheckpointError(f"{path} must be writable, got {error.strerror}.") from error


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
      CheckpointError: the file is missing, damaged, not a checkpoint, of another version, or its
        paths, shapes or dtypes are not those of `like`.
      TypeError: a leaf of `like` is not of a kind that `save` takes.
    """
    path = Path(path)
    named = _named_leaves(like)
    with _archive.opened(path) as archive:
        table = {entry["name"]: entry for entry in _read_header(path, archive)["leaves"]}
        _check_table(path, table, named)
        leaves = [
            _decode(path, name, leaf, table[name], _read_leaf(path, archive, name, leaf))
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
      CheckpointError: the file is missing, damaged, not a checkpoint or of another version.
    """
    path = Path(path)
    with _archive.opened(path) as archive:
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
        return _key(path, name, leaf, entry.get("key_impl"), stored)
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
            raise CheckpointError(f"{rule}it must have no leaf {shown(name)}, got a file with it.")
        for property_ in ("shape", "dtype"):
            found, wanted = table[name][property_], expected[name][property_]
            if found != wanted:
                raise CheckpointError(
                    f"{rule}the leaf {name} must have {property_} {wanted}, got {shown(found)}."
                )


def _read_header(path: Path, archive: zipfile.ZipFile) -> Json:
    array = _archive.read_array(path, archive, "header", _MAX_HEADER)
    try:
        header = json.loads(array.tobytes())
    except (ValueError, RecursionError):  # no text, no JSON, or one without end
        raise _archive.not_ours(path) from None
    if not isinstance(header, dict) or header.get("schema") != _SCHEMA:
        raise _archive.not_ours(path)
    if header.get("version") != _VERSION:
        raise VersionError(
            f"{path} must have schema version {_VERSION}, the one that this regjax reads, got "
            f"{shown(header.get('version'))}."
        )
    leaves, metadata = header.get("leaves"), header.get("metadata")
    if not isinstance(leaves, list) or not all(map(_is_row, leaves)):
        raise CheckpointError(f"{path} must have a table of its leaves, got a file without one.")
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{path} must have metadata by name, got {shown(metadata)}.")
    return header


def _is_row(entry: object) -> bool:
    kinds = {"name": str, "dtype": str, "shape": list}
    return isinstance(entry, dict) and all(isinstance(entry.get(k), t) for k, t in kinds.items())


def _read_leaf(path: Path, archive: zipfile.ZipFile, name: str, leaf: Any) -> np.ndarray:
    size = math.prod(np.shape(leaf)) * _stored_dtype(leaf).itemsize
    if _is_key(leaf):
        size *= leaf.dtype.itemsize
    return _archive.read_array(path, archive, name, size)


def _key(path: Path, name: str, leaf: Any, implementation: object, stored: np.ndarray) -> jax.Array:
    try:
        key = jax.random.wrap_key_data(jnp.asarray(stored), impl=implementation)
        if key.dtype == leaf.dtype:
            return key
    except (TypeError, ValueError):
        pass
    raise CheckpointError(
        f"{path} must hold a key of the kind {leaf.dtype} for the leaf {name}, got "
        f"{shown(implementation)}."
    )


def _to_json(header: Json) -> str:
    metadata = header["metadata"]
    try:
        if isinstance(metadata, dict):
            return json.dumps(header)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`metadata` must be what JSON can hold, got {error}.") from error
    raise TypeError(f"`metadata` must be a dict, got {metadata!r}.")
