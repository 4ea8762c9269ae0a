"""Small pieces of arithmetic that are easily written wrong: guarded division, errors, parts."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from regjax import _loops, _tree
from regjax._base import Params, Tree
from regjax._one_program import one_program


@one_program()
def divide(
    numerator: ArrayLike,
    denominator: ArrayLike,
    *,
    where: ArrayLike | None = None,
    otherwise: ArrayLike = 0,
) -> jax.Array:
    """Divides where that is allowed, and gives `otherwise` elsewhere; derivatives stay finite.

    Args:
      numerator: any shape that broadcasts; real floating point.
      denominator: likewise.
      where: bool, where to divide; None: where the denominator is not zero.
      otherwise: value elsewhere.
    """
    denominator = jnp.asarray(denominator)
    allowed = jnp.asarray(denominator != 0 if where is None else where)
    # The branch that is not taken must not divide by zero either, or its derivative is NaN.
    quotient = numerator / jnp.where(allowed, denominator, jnp.ones_like(denominator))
    return jnp.where(allowed, quotient, jnp.asarray(otherwise, quotient.dtype))


@one_program()
def mean_and_error(values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gives the mean over the leading axis and its standard error, NaN for a single value."""
    count = jnp.asarray(values.shape[0], values.dtype)
    return jnp.mean(values, 0), jnp.std(values, 0, ddof=1) / jnp.sqrt(count)


def part_outside(vectors: jax.Array, rows: jax.Array) -> jax.Array:
    """Subtracts from `vectors` (..., n) their parts in the span of orthonormal `rows` (k, n).

    In full precision, or what is to be left out leaks in.
    """
    vectors = _tree.wide(vectors)
    rows = rows.astype(vectors.dtype)
    along = jnp.matmul(vectors, rows.T, precision="highest")
    return vectors - jnp.matmul(along, rows, precision="highest")


@one_program()
def finite_svd(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes singular values (r,), falling, and right singular vectors (r, d).

    NaN if an entry is NaN or infinite: the iteration does not end for such matrices.
    """
    is_finite = jnp.all(jnp.isfinite(matrix))
    matrix = _tree.wide(jnp.where(is_finite, matrix, 0))
    _, values, rows = jnp.linalg.svd(matrix, full_matrices=False)
    return jnp.where(is_finite, values, jnp.nan), jnp.where(is_finite, rows, jnp.nan)


@one_program()
def between(params: Params, other_params: Params, share: ArrayLike) -> Params:
    """Gives (1 - share) params + share other_params, leaf by leaf; exact at both ends."""

    def mixed(one: jax.Array, other: jax.Array) -> jax.Array:
        part = jnp.asarray(share, _tree.wide_dtype(one))
        mean = (1 - part) * _tree.wide(one) + part * _tree.wide(other)
        return mean.astype(jnp.result_type(one))

    return jax.tree.map(mixed, params, other_params)


@one_program()
def scaled_norm(tree: Tree) -> jax.Array:
    """Computes the Euclidean norm of all scalars of an array or a tree, in float32 at least.

    Of any size: no square under- or overflows. The derivative at zero is zero.
    """
    leaves, power = _leaves_near_one(tree)
    return _length(leaves, power) / power


@one_program()
def unit(tree: Params) -> Params:
    """Divides a tree by its norm, of any size, in the widest of its dtypes; zero stays zero."""
    leaves, power = _leaves_near_one(tree)
    length = _length(leaves, power)
    return jax.tree.unflatten(jax.tree.structure(tree), [divide(leaf, length) for leaf in leaves])


@one_program()
def cosine(one: Params, other: Params) -> jax.Array:
    """Computes the cosine of the angle between two trees of any size; 0 if one of them is zero."""
    squares = _tree.inner(one, one), _tree.inner(other, other)

    def plain(pair: tuple[Params, Params]) -> jax.Array:
        product = _tree.inner(*pair)
        lengths = [jnp.sqrt(square).astype(product.dtype) for square in squares]
        return product / (lengths[0] * lengths[1])

    scaled = lambda pair: _tree.inner(*map(unit, pair))
    are_plain = _is_plain(squares[0]) & _is_plain(squares[1])
    return _loops.switch(are_plain.astype(jnp.int32), (scaled, plain), (one, other))


def _is_plain(square: jax.Array) -> jax.Array:
    """Tells where a sum of squares neither overflowed nor lost a part that counts.

    That is nearly always so: scaling takes up to three times as many passes over all numbers.
    """
    return (square > float(jnp.finfo(square.dtype).tiny) ** 0.5) & jnp.isfinite(square)


@one_program(static="axes")
def norms_along(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Computes Euclidean norms over `axes`, which stay with length one; of any size."""
    array, power = near_one(array, axes)
    return _root(jnp.sum(array**2, axes, keepdims=True)) / power


@one_program(static="axes")
def units_along(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Divides groups over `axes` by their norms, of any size; zero groups stay zero."""
    square = jnp.sum(array**2, axes, keepdims=True)

    def scaled(array: jax.Array) -> tuple[jax.Array, jax.Array]:
        array, power = near_one(array, axes)
        return power, _root(jnp.sum(array**2, axes, keepdims=True))

    # Out of the branch come small arrays, so that the product is part of what follows.
    plain = lambda _: (jnp.ones_like(square), jnp.sqrt(square))
    is_plain = jnp.all(_is_plain(square)).astype(jnp.int32)
    power, length = _loops.switch(is_plain, (scaled, plain), array)
    return power * array * divide(1, length)


@one_program()
def _leaves_near_one(tree: Tree) -> tuple[list[jax.Array], jax.Array]:
    """Gives the leaves times the power of two that brings the largest magnitude near one."""
    dtype = _tree.vector_dtype(tree)
    leaves = [jnp.asarray(leaf).astype(dtype) for leaf in jax.tree.leaves(tree)]
    sizes = [jnp.max(jnp.abs(lax.stop_gradient(leaf)), initial=0) for leaf in leaves]
    power = power_of_two(functools.reduce(jnp.maximum, sizes, jnp.zeros((), dtype)))
    power = jnp.where(power > 0, power, 1)
    return [power * leaf for leaf in leaves], power


def _length(leaves: list[jax.Array], like: jax.Array) -> jax.Array:
    squares = [jnp.sum(leaf**2) for leaf in leaves]
    return _root(functools.reduce(jnp.add, squares, jnp.zeros_like(like)))


def _root(square: jax.Array) -> jax.Array:
    """Computes the square root, whose derivative at zero is taken to be zero."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


@one_program()
def power_of_two(size: jax.Array) -> jax.Array:
    """Finds the power of two that brings a positive `size` near 1; 0 for 0, NaN and infinity.

    From the bits: whoever follows a network's operations (pruning does) sees none that JAX hides,
    as newer releases do those of `frexp` and `ldexp`.
    """
    info = jnp.finfo(size.dtype)
    largest = info.maxexp - 8  # its reciprocal is a normal number too
    word = jnp.dtype(f"int{info.bits}")
    bias, places = jnp.asarray(info.maxexp - 1, word), jnp.asarray(info.nmant, word)
    exponent = lax.bitcast_convert_type(jnp.abs(size), word) >> places
    exponent = jnp.clip(bias - exponent - 1, -largest, largest)
    power = lax.bitcast_convert_type((exponent + bias) << places, size.dtype)
    return jnp.where((size > 0) & jnp.isfinite(size), power, 0)


@one_program(static=("axes", "at_least"))
def near_one(
    array: jax.Array, axes: tuple[int, ...], *, at_least: float = 0
) -> tuple[jax.Array, jax.Array]:
    """Brings groups of entries near one, so that no square of them under- or overflows.

    Args:
      array: real floating point.
      axes: those of a group.
      at_least: what a group's largest magnitude counts as, if it is smaller.

    Returns:
      power * array and power, a power of two for each group with `axes` of length one: a constant
      to the derivative; 1 for groups of zeros and those that are not finite.
    """
    largest = jnp.max(jnp.abs(lax.stop_gradient(array)), axes, keepdims=True, initial=at_least)
    power = power_of_two(largest)
    power = jnp.where(power > 0, power, 1)
    return power * array, power
