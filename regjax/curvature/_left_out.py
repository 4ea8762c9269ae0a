"""What the estimators share that leave one of their random vectors out at a time.

Their estimates are correlated, so that their spread alone is too small an error (by a factor of 3
where there are about as many vectors as outliers). What the i-th one becomes without the j-th
vector as well does not depend on that, and the j-th one has mean zero over it: the covariance of
the two is the mean of d_ij d_ji, d_ij what the i-th one loses by that. It is added, and makes the
squared error unbiased.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _numerics
from regjax._space import Space
from regjax.curvature._hutchinson import Estimates, estimated, no_samples, with_samples

# How many other vectors each is compared with where the estimates are as long as vectors: a mean
# over some pairs is unbiased too, and all of them would cost as much as the products.
_MOST_PAIRS = 4

Rows = tuple[jax.Array, ...]
"""Several (s, length)."""
At = Callable[[jax.Array], jax.Array]
"""(s, s) -> its entries (s, 1) at the pairs."""
Loss = Callable[[At, Rows, Rows], jax.Array]
"""(at, rows of i, rows of j) -> d_ij (s, length)."""


class Samples(NamedTuple):
    """Estimates that leave one vector out, and their covariance.

    Attributes:
      each: (s, length), or (s, 1) of a single number.
      exact: (length,), or (1,), what all vectors know without a sample.
      covariance: (length,), or (1,), of two of them.
      covariance_of_sums: (), of the sums of two of them.
    """

    each: jax.Array
    exact: jax.Array
    covariance: jax.Array
    covariance_of_sums: jax.Array


def combined(
    found: Samples,
    plain: jax.Array,
    squares: jax.Array | None,
    *,
    num_matvecs: jax.Array,
    is_finished: jax.Array,
    of_trace: bool,
    space: Space,
) -> Estimates:
    """The estimates of leaving one out, or until then of the probes alone.

    Args:
      found: what leaves one vector out.
      plain: (s, length), samples of the diagonal by the probes alone.
      squares: (s,), squared norms of the probes; None of signs.
      num_matvecs: products so far.
      is_finished: whether `found` may be used.
      of_trace: whether only the sum is wanted.
      space: of the vectors.
    """
    num_rows = plain.shape[0]
    if squares is not None:
        plain = plain * _numerics.divide(space.size, squares)[:, None]
    ours, covariance, of_sums = found.each, found.covariance, found.covariance_of_sums
    if num_rows == space.size:  # nothing is left to be sampled
        ours = jnp.broadcast_to(found.exact, ours.shape)
        covariance, of_sums = jnp.zeros_like(covariance), jnp.zeros_like(of_sums)
    if of_trace:
        plain, ours = (jnp.sum(samples, 1, keepdims=True) for samples in (plain, ours))
    each = jnp.where(is_finished, ours, plain)
    count = jnp.where(is_finished, num_rows, jnp.minimum(num_matvecs, num_rows))
    estimates = estimated(with_samples(no_samples(space, of_trace), each, count), num_matvecs)

    def error(spread: jax.Array, covariance: jax.Array) -> jax.Array:
        more = jnp.maximum(covariance, 0)
        # A single vector has neither, and no covariance may hide that.
        return jnp.where(is_finished, jnp.sqrt(spread**2 + more), spread)

    diagonal_error = estimates.diagonal_standard_error
    return estimates._replace(
        trace_standard_error=error(estimates.trace_standard_error, of_sums),
        diagonal_standard_error=(diagonal_error if of_trace else error(diagonal_error, covariance)),
    )


def scales_of(squares: jax.Array) -> jax.Array:
    """One over the roots of numbers up to 1 off the diagonal; 0 where they are mostly rounding."""
    least = jnp.sqrt(jnp.finfo(squares.dtype).eps)
    is_other = ~jnp.eye(len(squares), dtype=bool)
    is_known = is_other & (squares > least)
    return jnp.where(is_known, 1 / jnp.sqrt(jnp.where(is_known, squares, 1)), 0)


def mean_of_pairs(losses: jax.Array) -> jax.Array:
    """The mean of d_ij d_ji over pairs, of (s, s) with zeros on the diagonal."""
    count = losses.shape[0] * (losses.shape[0] - 1)
    return jnp.sum(losses * losses.T) / max(count, 1)


def with_pairs(each: jax.Array, exact: jax.Array, loss: Loss, rows: Rows) -> Samples:
    """The estimates with the mean of d_ij d_ji over some pairs: the neighbours in a ring."""
    num_rows = each.shape[0]
    i, count = jnp.arange(num_rows), min(_MOST_PAIRS, num_rows - 1)
    total, of_sums = jnp.zeros_like(each[0]), jnp.zeros((), each.dtype)
    for k in range(1, count + 1):
        j = (i + k) % num_rows
        others = tuple(jnp.roll(row, -k, 0) for row in rows)
        here = loss(functools.partial(_entries, i, j), rows, others)
        there = loss(functools.partial(_entries, j, i), others, rows)
        total = total + jnp.sum(here * there, 0)
        of_sums = of_sums + jnp.sum(jnp.sum(here, 1) * jnp.sum(there, 1))
    pairs = max(count * num_rows, 1)
    return Samples(each, exact, total / pairs, of_sums / pairs)


def _entries(i: jax.Array, j: jax.Array, matrix: jax.Array) -> jax.Array:
    return matrix[i, j][:, None]


def inner_products(space: Space, rows: jax.Array, others: jax.Array) -> jax.Array:
    """(k, l), of each row (k, length) with each other one (l, length)."""
    return space.psum(lambda own, other: own @ other.T, rows, others)


def take(rows: jax.Array, start: jax.Array, count: int) -> jax.Array:
    """So many rows from one on."""
    return jax.lax.dynamic_slice_in_dim(rows, start, count)


def put(rows: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """`rows` with new ones from one on."""
    return jax.lax.dynamic_update_slice_in_dim(rows, new, start, 0)
