"""Inner products of many rows with a vector, summed as exactly as is asked for.

A sum of n terms in one accumulator is off by up to n units of rounding of its largest partial sum.
XLA on CPU multiplies a matrix with one vector that way: among a million parameters, vectors that
live on a few of them were orthogonal to 4e-4 only. So the sum runs in many lanes and in groups, at
little more than the cost of reading the rows.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from regjax import _checks, _platforms
from regjax._arguments import ACCUMULATIONS
from regjax._base import Tree
from regjax._space import Space

# Partial sums of a row; those of a block of rows stay in a core's own cache.
_LANES = 1024
# So few columns are summed in one operation, for which XLA has no code to make; of more it would
# write down what is to be summed.
FEW = 2**15
# Slabs, of as many columns, in a turn of the loop; turns whose sum is made before it meets others.
_TURN, _GROUP = 4, 64


def small_dtype(dtype: jnp.dtype, accumulation: str | None) -> jnp.dtype:
    """Type of inner products, norms and small matrices, of rows of type `dtype`.

    Raises:
      ValueError: `accumulation` is none of the choices, or JAX has no float64 now.
    """
    if (
        accumulation is None
        or _checks.choice("accumulation", accumulation, ACCUMULATIONS) != "float64"
    ):
        return dtype
    if jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise ValueError(
            "`accumulation` must be 'compensated' or None unless JAX may use float64 "
            "(jax_enable_x64), got 'float64'."
        )
    return jnp.dtype(np.float64)


def inner_products(
    space: Space, rows: jax.Array, vector: jax.Array, accumulation: str | None = None
) -> jax.Array:
    """(r,), those of the rows (r, length) with `vector`, all of them vectors of `space`.

    Args:
      space: of the vectors.
      rows: any number of them.
      vector: of the same dtype.
      accumulation: None: in their dtype; "compensated": what rounding takes from each addition is
        added at the end; "float64": products and sums in float64, which the result has too.
    """
    if accumulation == "compensated":
        high, low = space.psum(_compensated, rows, vector)
        return high + low
    dtype = small_dtype(rows.dtype, accumulation)
    return space.psum(functools.partial(_plain, dtype), rows, vector)


def _plain(dtype: jnp.dtype, rows: jax.Array, vector: jax.Array) -> jax.Array:
    multiply = lambda one, other: one.astype(dtype) * other.astype(dtype)

    def in_lanes(rows: jax.Array, vector: jax.Array) -> jax.Array:
        if vector.size <= FEW:
            fill = -vector.size % _LANES
            terms = jnp.pad(multiply(rows, vector[None]), ((0, 0), (0, fill)))
            return jnp.sum(jnp.sum(terms.reshape(rows.shape[0], -1, _LANES), 1), 1)
        return jnp.sum(_over_slabs(jnp.add, multiply, rows, vector), 1)

    def at_once(rows: jax.Array, vector: jax.Array) -> jax.Array:
        if dtype == rows.dtype:
            return jnp.matmul(rows, vector, precision=lax.Precision.HIGHEST)
        return jnp.sum(multiply(rows, vector[None]), 1)

    return _in_lanes_on_cpu(in_lanes, at_once, rows, vector)


def _compensated(rows: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The inner products, and what rounding took from them."""
    multiply = lambda one, other: (one * other, jnp.zeros_like(one))
    zero = jnp.zeros((), rows.dtype)
    total = lambda sums: lax.reduce(sums, (zero, zero), _add, (1,))
    return _in_lanes_on_cpu(
        lambda rows, vector: total(_over_slabs(_add, multiply, rows, vector)),
        lambda rows, vector: total(multiply(rows, vector[None])),
        rows, vector,
    )  # fmt: skip


def _add(one: Tree, other: Tree) -> tuple[jax.Array, jax.Array]:
    """Adds two sums, each with its correction (D. Knuth's two-sum)."""
    total = one[0] + other[0]
    shown = total - one[0]
    error = (one[0] - (total - shown)) + (other[0] - shown)
    return total, one[1] + other[1] + error


def _in_lanes_on_cpu(
    in_lanes: Callable[..., Tree],
    at_once: Callable[..., Tree],
    rows: jax.Array,
    vector: jax.Array,
) -> Any:
    if vector.size < 2 * _LANES:
        return at_once(rows, vector)
    # Elsewhere a matrix product sums as a tree.
    return _platforms.depending(in_lanes, at_once, rows, vector)


def _over_slabs(
    add: Callable[[Tree, Tree], Tree],
    multiply: Callable[..., Tree],
    rows: jax.Array,
    vector: jax.Array,
) -> Tree:
    """Folds the terms of the inner products, a few slabs of columns at a time, with `add`."""

    def terms(start: ArrayLike, width: int) -> Tree:
        part = lax.dynamic_slice_in_dim(rows, start, width, 1)
        return multiply(part, lax.dynamic_slice_in_dim(vector, start, width)[None])

    def slabs(first: ArrayLike, count: int) -> Tree:
        parts = [terms((first + i) * _LANES, _LANES) for i in range(count)]
        return functools.reduce(add, parts)

    def add_turn(turn: ArrayLike, sums: Tree) -> Tree:
        return add(sums, slabs(turn * _TURN, _TURN))

    def add_group(group: ArrayLike, sums: Tree) -> Tree:
        start = group * _GROUP
        end = jnp.minimum(start + _GROUP, num_turns)
        return add(sums, lax.fori_loop(start, end, add_turn, jax.tree.map(jnp.zeros_like, sums)))

    num_turns, left = divmod(vector.size, _TURN * _LANES)
    num_slabs, rest = divmod(left, _LANES)
    # The ragged rest comes first, in as many lanes as it needs.
    fill = lambda leaf: jnp.pad(leaf, ((0, 0), (0, _LANES - rest)))
    sums = jax.tree.map(fill, terms(vector.size - rest, rest))
    if num_slabs:
        sums = add(sums, slabs(num_turns * _TURN, num_slabs))
    return lax.fori_loop(0, -(-num_turns // _GROUP), add_group, sums)
