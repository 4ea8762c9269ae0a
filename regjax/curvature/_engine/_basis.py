"""Rows of an orthonormal basis, kept in a few blocks so that no operation copies a part of it.

XLA materialises a slice of a large array before it multiplies with it, which costs more than the
product. So the rows live in up to ten arrays; each is used whole or not at all, and one pass
costs what reading the filled blocks costs. On a mesh each device has its share of the columns.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from regjax import _platforms
from regjax._base import Params
from regjax._space import Space
from regjax.curvature._engine._accumulation import FEW, inner_products, small_dtype

# Rows of a block but the last one, unless there would be too many blocks: each makes the program
# longer. Products with a block are fastest if its rows are a multiple of so many.
_BLOCK_ROWS = 8
_MOST_BLOCKS = 10
# So few scalars lie in the cache, where all rows are read as fast as some: one block, and of some
# more a few blocks, which take half as long to compile.
_SMALL, _MIDDLE, _FEW_BLOCKS = 2**21, 2**23, 4
# Column width in which the rows are recombined in place, in scalars: two slabs of all rows take no
# more than two vectors, unless the width would be the least.
_RECOMBINED_WIDTH, _LEAST_WIDTH = 2**14, 2**7


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks", "filled", "generation"],
    meta_fields=["space", "accumulation"],
)
@dataclasses.dataclass(frozen=True)
class Basis:
    """Rows in order; those not yet filled are zero.

    Attributes:
      blocks: arrays (rows of a block, length); the last may have fewer rows than the others.
      filled: (), int32, number of filled rows.
      generation: (), int32, changes when filled rows do.
      space: of which the rows are vectors.
      accumulation: how inner products with the rows are summed; see `_accumulation`.
    """

    blocks: tuple[jax.Array, ...]
    filled: jax.Array
    generation: jax.Array
    space: Space
    accumulation: str | None

    @property
    def num_rows(self) -> int:
        """All rows, filled or not."""
        return sum(block.shape[0] for block in self.blocks)


def zeros(
    space: Space, num_rows: int, accumulation: str | None = None, generation: Any = 0
) -> Basis:
    """`num_rows` empty rows."""
    scalars = num_rows * space.length
    most = 1 if scalars <= _SMALL else _FEW_BLOCKS if scalars <= _MIDDLE else _MOST_BLOCKS
    rows = max(_BLOCK_ROWS, -(-num_rows // most))
    rows = -(-rows // _BLOCK_ROWS) * _BLOCK_ROWS
    sizes = [min(rows, num_rows - start) for start in range(0, num_rows, rows)]
    blocks = tuple(space.zeros(size) for size in sizes)
    return Basis(blocks, jnp.int32(0), jnp.asarray(generation, jnp.int32), space, accumulation)


def _is_small(num_rows: int, space: Space) -> bool:
    return num_rows * space.length <= _SMALL


def append(basis: Basis, vector: jax.Array) -> Basis:
    """`vector` as the next row."""

    def in_block(start: int, block: jax.Array) -> jax.Array:
        holds = (basis.filled >= start) & (basis.filled < start + block.shape[0])
        place = jnp.clip(basis.filled - start, 0, block.shape[0] - 1)
        if len(basis.blocks) == 1 and basis.space.mesh is None:
            last = lax.dynamic_index_in_dim(block, place, 0, keepdims=False)
            return lax.dynamic_update_index_in_dim(block, jnp.where(holds, vector, last), place, 0)
        # A loop of one or no turn: unlike a branch it changes the block in place.
        write = lambda _, block: lax.dynamic_update_index_in_dim(block, vector, place, 0)
        return basis.space.constrain(lax.fori_loop(0, jnp.where(holds, 1, 0), write, block))

    blocks = tuple(in_block(start, block) for start, block in _placed(basis))
    return dataclasses.replace(basis, blocks=blocks, filled=basis.filled + 1)


def outside(basis: Basis, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`vector` less its part in the rows, and its coefficients (rows,): one pass over them."""
    coefficients = []
    dtype = small_dtype(vector.dtype, basis.accumulation)
    # Left to itself the compiler has what a branch gives on each device, whole.
    keep = basis.space.constrain

    def remove(block: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        part = inner_products(basis.space, block, vector, basis.accumulation)
        # These roundings, one an element, do not add up.
        return _less(basis, vector, part.astype(vector.dtype), block), part

    def leave(block: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        return keep(vector), jnp.zeros(block.shape[0], dtype)

    for start, block in _placed(basis):
        # The first block is nearly always used, and a branch is more to compile.
        if start == 0:
            vector, part = remove(block, vector)
        else:
            vector, part = lax.cond(start < basis.filled, remove, leave, block, vector)
        coefficients.append(part)
    return keep(vector), jnp.concatenate([*coefficients, jnp.zeros(0, dtype)])


def _less(basis: Basis, vector: jax.Array, weights: jax.Array, block: jax.Array) -> jax.Array:
    """`vector` less the rows of a block times their weights."""
    keep = basis.space.constrain
    at_once = lambda *operands: keep(_less_at_once(*operands))
    if _is_small(basis.num_rows, basis.space):
        return at_once(vector, weights, block)
    # XLA on CPU multiplies a vector with a matrix of few rows at half of the speed of memory.
    in_groups = lambda *operands: keep(_less_in_groups(*operands))
    return keep(_platforms.depending(in_groups, at_once, vector, weights, block))


def _less_at_once(vector: jax.Array, weights: jax.Array, block: jax.Array) -> jax.Array:
    return vector - weights @ block


def _less_in_groups(vector: jax.Array, weights: jax.Array, block: jax.Array) -> jax.Array:
    def less(first: ArrayLike, count: int, vector: jax.Array) -> jax.Array:
        """One pass over `count` rows."""
        row = lambda i: lax.dynamic_index_in_dim(block, first + i, 0, keepdims=False)
        terms = [weights[first + i] * row(i) for i in range(count)]
        return vector - functools.reduce(jnp.add, terms)

    num_groups, rest = divmod(block.shape[0], _BLOCK_ROWS)
    turn = lambda i, vector: less(i * _BLOCK_ROWS, _BLOCK_ROWS, vector)
    vector = lax.fori_loop(0, num_groups, turn, vector)
    return less(num_groups * _BLOCK_ROWS, rest, vector) if rest else vector


def spans_all(basis: Basis) -> jax.Array:
    """(), bool, whether the filled rows span the whole space, which may have more than 2^31."""
    return basis.filled >= min(basis.space.size, basis.num_rows + 1)


def inner(basis: Basis, one: jax.Array, other: jax.Array) -> jax.Array:
    """(), the inner product of two vectors, summed as those with the rows are."""
    if basis.accumulation is None and basis.space.size > FEW:
        return basis.space.inner(one, other)
    return inner_products(basis.space, one[None], other, basis.accumulation)[0]


def combine(basis: Basis, weights: jax.Array) -> jax.Array:
    """The rows of weights' Q, (k, length), from weights (rows, k), a slab of columns at a time.

    A sum of one product for each block would take k vectors for each block, all at once.
    """
    weights = weights.astype(basis.space.dtype)
    return basis.space.constrain(basis.space.map_shards(_combined, basis.blocks, weights))


def _combined(blocks: tuple[jax.Array, ...], weights: jax.Array) -> jax.Array:
    if len(blocks) == 1:
        return weights.T @ blocks[0]
    size, width, count = _slabs(blocks)

    def combine_slab(slab: jax.Array, combined: jax.Array) -> jax.Array:
        start = jnp.minimum(slab * width, size - width)  # the last slab reaches back
        mixed = weights.T @ _columns(blocks, start, width)
        return lax.dynamic_update_slice_in_dim(combined, mixed, start, 1)

    empty = jnp.zeros((weights.shape[1], size), weights.dtype)
    return lax.fori_loop(0, count, combine_slab, empty)


def _slabs(blocks: tuple[jax.Array, ...]) -> tuple[int, int, int]:
    """The number of columns, how many a slab has, and the number of slabs."""
    size, num_rows = blocks[0].shape[1], sum(block.shape[0] for block in blocks)
    width = min(size, _RECOMBINED_WIDTH, max(size // num_rows, _LEAST_WIDTH))
    return size, width, -(-size // width)


def _columns(blocks: tuple[jax.Array, ...], start: jax.Array, width: int) -> jax.Array:
    """All rows of so many columns."""
    return jnp.concatenate([lax.dynamic_slice_in_dim(block, start, width, 1) for block in blocks])


def recombine(basis: Basis, weights: jax.Array, filled: jax.Array) -> Basis:
    """The rows of weights' Q in place of Q, weights (rows, rows), a slab of columns at a time.

    Args:
      basis: Q.
      weights: zero in the columns beyond `filled`.
      filled: (), int32, number of rows that are filled now.
    """
    cuts = [start for start, _ in _placed(basis)][1:]
    recombined = functools.partial(_recombined, cuts)
    return dataclasses.replace(
        basis,
        blocks=basis.space.map_shards(recombined, basis.blocks, weights),
        filled=filled,
        generation=basis.generation + 1,
    )


def _recombined(
    cuts: list[int], blocks: tuple[jax.Array, ...], weights: jax.Array
) -> tuple[jax.Array, ...]:
    size, width, count = _slabs(blocks)

    def recombine_slab(slab: jax.Array, blocks: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The last slab reaches back; its overlap must not be recombined twice.
        start = jnp.minimum(slab * width, size - width)
        columns = _columns(blocks, start, width)
        fresh = start + jnp.arange(width, dtype=start.dtype) >= slab * width
        mixed = (weights.T @ columns.astype(weights.dtype)).astype(columns.dtype)
        columns = jnp.where(fresh[None], mixed, columns)
        return tuple(
            lax.dynamic_update_slice_in_dim(block, part, start, 1)
            for block, part in zip(blocks, jnp.split(columns, cuts), strict=True)
        )

    return lax.fori_loop(0, count, recombine_slab, blocks)


@functools.partial(jax.jit, static_argnums=1)
def to_trees(basis: Basis, num_rows: int) -> Params:
    """The first rows as a tree with a leading axis, of the vectors' dtype, as parameters lie."""
    space = basis.space.wide()

    def row(i: jax.Array, start: int, block: jax.Array) -> jax.Array:
        place = jnp.clip(i - start, 0, block.shape[0] - 1)
        found = lax.dynamic_index_in_dim(block, place, 0, keepdims=False)
        return jnp.where(place == i - start, found, jnp.zeros_like(found))

    # A row at a time. Of all at once XLA for TPU keeps copies whose narrow shards it fills up to
    # its tiles: of 8 billion parameters on 256 chips 32 GB beside 5 GB of rows.
    def tree_of(i: jax.Array) -> Params:
        first, *others = [row(i, start, block) for start, block in _placed(basis)]
        return space.unravel(sum(others, start=first))

    return lax.map(tree_of, jnp.arange(num_rows, dtype=jnp.int32))


def combined(basis: Basis, weights: jax.Array, filled: jax.Array) -> Basis:
    """A basis of the rows of weights' Q, weights (rows, k), of which `filled` are not zero."""
    num_rows = weights.shape[1]
    empty = zeros(basis.space, num_rows, basis.accumulation)
    blocks = tuple(
        combine(basis, weights[:, start : start + block.shape[0]])
        for start, block in _placed(empty)
    )
    return dataclasses.replace(empty, blocks=blocks, filled=filled)


def _placed(basis: Basis) -> list[tuple[int, jax.Array]]:
    """Each block with the number of its first row."""
    starts = itertools.accumulate((block.shape[0] for block in basis.blocks), initial=0)
    return list(zip(starts, basis.blocks, strict=False))
