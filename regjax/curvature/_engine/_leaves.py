"""The leaves of a solver's state by name, and the rows of its bases one by one."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from regjax._base import Tree
from regjax.curvature._engine import _own
from regjax.curvature._engine._basis import Basis
from regjax.curvature._engine._saved import Piece, wrong


def shapes(state: Tree) -> Tree:
    """Its shapes, each with where it lies; what NumPy has lies nowhere."""

    def shape(leaf: jax.Array | np.ndarray) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, state)


def named(tree: Tree) -> dict[str, Tree]:
    """Its leaves by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def bases(state: Tree) -> dict[str, Basis]:
    """The bases in a state by the paths of their rows."""
    is_basis = lambda node: isinstance(node, Basis)
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_basis)
    return {f"{jax.tree_util.keystr(path)}.blocks": n for path, n in nodes if is_basis(n)}


def blocks(named: dict[str, Tree], prefix: str) -> dict[str, Tree]:
    """The arrays (..., rows, n) of a basis, in the order of their rows."""
    return {name: leaf for name, leaf in named.items() if name.startswith(prefix)}


def rest(named: dict[str, Tree], prefixes: Iterable[str]) -> dict[str, Tree]:
    """All leaves but the rows of bases."""
    return {name: leaf for name, leaf in named.items() if not name.startswith(tuple(prefixes))}


def num_rows(blocks: dict[str, Tree]) -> int:
    """Of all blocks, filled or not."""
    return sum(block.shape[-2] for block in blocks.values())


def piece(path: Path, loaded: dict[str, Tree], piece: Piece, prefix: str) -> list[Tree]:
    """The rows of a basis that are in a file.

    Raises:
      CheckpointError: it has others.
    """
    rows = loaded[piece.file]["rows"].get(prefix, [])
    if len(rows) != piece.stop - piece.start:
        raise wrong(path, "parts", list(piece))
    return rows


def cut(blocks: dict[str, Tree], start: int, stop: int) -> list[jax.Array]:
    """Copies of rows; one at a time is one program, however many there are."""
    rows = []
    for block in blocks.values():
        size, sharding = block.shape[-2], _own.without_rows(block.sharding)
        cut = range(max(start, 0), min(stop, size))
        rows += [_row(block, jnp.int32(i), sharding) for i in cut]
        start, stop = start - size, stop - size
    return rows


def assemble(blocks: dict[str, Tree], rows: Iterator[Tree]) -> dict[str, Tree]:
    """The blocks, in pieces, from their filled rows; the others are zero."""
    zeros = lambda shape: np.zeros(shape.shape, shape.dtype)
    arrays = {name: jax.tree.map(zeros, _own.shapes(shape)) for name, shape in blocks.items()}
    for name, shape in blocks.items():
        # The basis comes to an end before its room does.
        for i, row in zip(range(shape.shape[-2]), rows, strict=False):
            for array, piece in zip(
                jax.tree.leaves(arrays[name]), jax.tree.leaves(row), strict=True
            ):
                array[..., i, :] = piece
    return arrays


def empty_row(blocks: dict[str, Tree]) -> Tree:
    """Arrays like the pieces of a row."""
    first = next(iter(blocks.values()))
    shape, sharding = (*first.shape[:-2], first.shape[-1]), _own.without_rows(first.sharding)
    row = jax.ShapeDtypeStruct(shape, first.dtype, sharding=sharding)
    return jax.tree.map(lambda piece: np.empty(piece.shape, piece.dtype), _own.shapes(row))


@functools.partial(jax.jit, static_argnums=2)
def _row(block: jax.Array, i: jax.Array, sharding: Sharding | None) -> jax.Array:
    row = jax.lax.dynamic_index_in_dim(block, i, axis=-2, keepdims=False)
    if not isinstance(sharding, NamedSharding):
        return row
    return jax.lax.with_sharding_constraint(row, sharding)


@jax.jit
def copies(leaves: dict[str, Tree]) -> dict[str, Tree]:
    """What the next step may not overwrite."""
    return jax.tree.map(jnp.copy, leaves)
