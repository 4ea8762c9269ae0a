"""Rows of an orthonormal basis, kept in a few blocks so that no operation copies a part of it.

XLA materialises a slice of a large array before it multiplies with it, which costs more than the
product. So the rows live in up to eight arrays; each is used whole or not at all, and one pass
costs what reading the filled blocks costs. On a mesh each device has its share of the columns.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

from regjax._sharding import Columns
from regjax.curvature._accumulation import inner_products, small_dtype

# Rows of a block, unless there would be too many blocks: each makes the program longer.
_BLOCK_ROWS = 16
_MOST_BLOCKS = 8
# Products with a block are fastest if its rows are a multiple of this.
_ROUND_ROWS = 8
# Column width in which the rows are recombined in place, in scalars.
_RECOMBINED_WIDTH = 2**14


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks"],
    meta_fields=["columns", "accumulation"],
)
@dataclasses.dataclass(frozen=True)
class Basis:
    """Rows in order; those not yet filled are zero.

    Attributes:
      blocks: arrays (rows of a block, n), all of the same shape; divided as `columns` says.
      columns: whether and how the n columns are divided over devices.
      accumulation: how inner products with the rows are summed; see `_accumulation`.
    """

    blocks: tuple[jax.Array, ...]
    columns: Columns
    accumulation: str | None

    @property
    def num_rows(self) -> int:
        """All rows, filled or not."""
        return sum(block.shape[0] for block in self.blocks)


def zeros(
    num_rows: int,
    size: int,
    dtype: Any,
    mesh: Mesh | None = None,
    accumulation: str | None = None,
) -> Basis:
    """At least `num_rows` empty rows."""
    columns = Columns(size, mesh)
    rows = max(_BLOCK_ROWS, -(-num_rows // _MOST_BLOCKS))
    rows = -(-rows // _ROUND_ROWS) * _ROUND_ROWS
    count = -(-num_rows // rows)
    return Basis(tuple(columns.zeros(rows, dtype) for _ in range(count)), columns, accumulation)


def put(basis: Basis, row: jax.Array, vector: jax.Array) -> Basis:
    """`vector` (n,) as row number `row`."""
    vector = basis.columns.divide(vector)

    def in_block(start: int, block: jax.Array) -> jax.Array:
        holds = (row >= start) & (row < start + block.shape[0])
        place = jnp.clip(row - start, 0, block.shape[0] - 1)
        # A loop of one or no turn: unlike a branch it changes the block in place.
        write = lambda _, block: lax.dynamic_update_index_in_dim(block, vector, place, 0)
        return basis.columns.keep(lax.fori_loop(0, jnp.where(holds, 1, 0), write, block))

    blocks = tuple(in_block(start, block) for start, block in _placed(basis))
    return dataclasses.replace(basis, blocks=blocks)


def outside(basis: Basis, filled: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`vector` less its part in the rows, and its coefficients (rows,): one pass over them."""
    coefficients, vector = [], basis.columns.divide(vector)
    dtype = small_dtype(vector.dtype, basis.accumulation)

    def remove(block: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = inner_products(block, vector, basis.columns, basis.accumulation)
        # These roundings, one an element, do not add up.
        return vector - part.astype(vector.dtype) @ block, part

    def leave(block: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        return vector, jnp.zeros(block.shape[0], dtype)

    for start, block in _placed(basis):
        vector, part = lax.cond(start < filled, remove, leave, block, vector)
        coefficients.append(part)
    return basis.columns.join(vector), jnp.concatenate(coefficients)


def vdot(basis: Basis, one: jax.Array, other: jax.Array) -> jax.Array:
    """(), the inner product of two vectors (n,), summed as those with the rows are."""
    if basis.accumulation is None:
        return jnp.vdot(one, other)
    divide, accumulation = basis.columns.divide, basis.accumulation
    return inner_products(divide(one)[None], divide(other), basis.columns, accumulation)[0]


def combine(basis: Basis, weights: jax.Array) -> jax.Array:
    """The rows of weights' Q, (k, n) divided as `columns` says, from weights (rows, k)."""
    weights = weights.astype(basis.blocks[0].dtype)
    parts = [weights[start : start + block.shape[0]].T @ block for start, block in _placed(basis)]
    return basis.columns.keep(sum(parts[1:], start=parts[0]))


def recombine(basis: Basis, weights: jax.Array) -> Basis:
    """The rows of weights' Q in place of Q, weights (rows, rows), a slab of columns at a time."""
    cuts = [start for start, _ in _placed(basis)][1:]
    recombined = functools.partial(_recombined, cuts)
    blocks = basis.columns.locally(recombined, basis.blocks, weights)
    return dataclasses.replace(basis, blocks=blocks)


def _recombined(
    cuts: list[int], blocks: tuple[jax.Array, ...], weights: jax.Array
) -> tuple[jax.Array, ...]:
    size = blocks[0].shape[1]
    width = min(size, _RECOMBINED_WIDTH)

    def recombine_slab(slab: jax.Array, blocks: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last slab reaches back; its overlap must not be recombined twice.
        start = jnp.minimum(slab * width, size - width)
        columns = jnp.concatenate(
            [lax.dynamic_slice_in_dim(block, start, width, 1) for block in blocks]
        )
        fresh = start + jnp.arange(width, dtype=start.dtype) >= slab * width
        mixed = (weights.T @ columns.astype(weights.dtype)).astype(columns.dtype)
        columns = jnp.where(fresh[None], mixed, columns)
        return tuple(
            lax.dynamic_update_slice_in_dim(block, part, start, 1)
            for block, part in zip(blocks, jnp.split(columns, cuts), strict=True)
        )

    return lax.fori_loop(0, -(-size // width), recombine_slab, blocks)


def to_array(basis: Basis, num_rows: int) -> jax.Array:
    """The first rows as one array (num_rows, n)."""
    return jnp.concatenate(basis.blocks)[:num_rows, : basis.columns.size]


def _placed(basis: Basis) -> list[tuple[int, jax.Array]]:
    """Each block with the number of its first row."""
    rows = basis.blocks[0].shape[0]
    return [(i * rows, block) for i, block in enumerate(basis.blocks)]
