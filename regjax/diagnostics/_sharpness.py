"""The largest eigenvalue of the Hessian, at a point and between two."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _chunks, _loops, _tree, curvature

# Residual norms below this many units of rounding of the matrix are rounding.
_FLOOR = 8


class SharpnessReport(NamedTuple):
    """The largest Hessian eigenvalue.

    Attributes:
      value: (), its Ritz value, never above the eigenvalue (with `largest_magnitude`: in magnitude)
        but for rounding. Units of the loss per squared parameter; of the loss if spherical.
      residual_norm: (), ||H v - value v||: some eigenvalue lies within it of the value.
      converged: (), bool: the residual norm is at most `tol` |value|.
      smallest: (), the smallest Ritz value, an upper bound of the smallest eigenvalue but for
        rounding: where it is negative, so is the curvature in some direction.
    """

    value: jax.Array
    residual_norm: jax.Array
    converged: jax.Array
    smallest: jax.Array


class SharpnessBetweenReport(NamedTuple):
    """The largest Hessian eigenvalue on a segment; S points.

    Attributes:
      value: (), the largest of `values`.
      residual_norm: (), at that point.
      converged: (), bool: all points have converged, so that none of them hides a larger one.
      values: (S,), at evenly spaced points, both ends included.
      residual_norms: (S,).
    """

    value: jax.Array
    residual_norm: jax.Array
    converged: jax.Array
    values: jax.Array
    residual_norms: jax.Array


class Ritz(NamedTuple):
    """What m Lanczos steps know of a matrix of order n.

    Attributes:
      values: (m,), ascending.
      weights: (m, m), columns: the Ritz vectors in the basis.
      bounds: (m,), norms of the residuals, not below rounding.
      basis: (m, n), orthonormal rows, the first one along the start.
      beta: (), norm of the last residual of the recurrence.
    """

    values: jax.Array
    weights: jax.Array
    bounds: jax.Array
    basis: jax.Array
    beta: jax.Array


def lambda_max(
    loss_fn: Callable[..., Any],
    params: Any,
    *batch: Any,
    key: jax.Array,
    num_steps: int = 50,
    largest_magnitude: bool = False,
    tol: Any = 1e-3,
    chunk_size: int | None = None,
) -> SharpnessReport:
    """The largest eigenvalue of the Hessian of the mean loss, by Lanczos from a random start.

    Costs `num_steps` Hessian products and keeps as many vectors. For comparisons between runs: the
    training loss on the same examples, dropout and augmentation off.

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random start.
      num_steps: number of products, or the number of parameters if that is smaller.
      largest_magnitude: whether the eigenvalue farthest from zero is meant, with its sign;
        otherwise the algebraically largest.
      tol: relative tolerance of `converged`.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `SharpnessReport`.

    Raises:
      ValueError: an argument is out of its range, or the loss is no scalar or cannot be split.
      TypeError: a parameter is not real floating point, or `key` is not a typed key.

    References:
      S. Kaur, J. Cohen, Z. Lipton (2023), arXiv:2206.10654. The paper does not state its solver.
    """
    _checks.non_negative("tol", tol)
    chunk_size = _chunks.checked_size(loss_fn, params, batch, chunk_size)
    hessian = curvature.hessian(loss_fn, params, *batch, chunk_size=chunk_size)
    return report(ritz(hessian, key=key, num_steps=num_steps), tol, largest_magnitude)


def lambda_max_between(
    loss_fn: Callable[..., Any],
    params: Any,
    next_params: Any,
    *batch: Any,
    key: jax.Array,
    num_points: int = 8,
    num_steps: int = 50,
    tol: Any = 1e-3,
    chunk_size: int | None = None,
) -> SharpnessBetweenReport:
    """The largest Hessian eigenvalue on the segment between two successive iterates.

    At a single iterate of a network with batch norm the eigenvalue says little of what the step
    crosses. Costs `num_points` times `num_steps` Hessian products.

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters at one end.
      next_params: tree like `params` at the other end.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random starts.
      num_points: evenly spaced, at least 2; both ends count. 8 in the paper.
      num_steps: as in `lambda_max`.
      tol: as in `lambda_max`.
      chunk_size: as in `lambda_max`.

    Returns:
      A `SharpnessBetweenReport`.

    Raises:
      ValueError: `next_params` is another tree, or as in `lambda_max`.
      TypeError: as in `lambda_max`.

    References:
      S. Kaur, J. Cohen, Z. Lipton (2023), arXiv:2206.10654, on networks with batch norm.
    """
    _checks.integer("num_points", num_points, minimum=2)
    _checks.same_tree("next_params", next_params, params)
    chunk_size = _chunks.checked_size(loss_fn, params, batch, chunk_size)
    keys = jax.random.split(_checks.key("key", key), num_points)

    def measure(found: Any, i: jax.Array) -> Any:
        at = functools.partial(_interpolate, i / (num_points - 1))
        here = lambda_max(
            loss_fn, jax.tree.map(at, params, next_params), *batch,
            key=keys[i], num_steps=num_steps, tol=tol, chunk_size=chunk_size,
        )  # fmt: skip
        return tuple(column.at[i].set(entry) for column, entry in zip(found, here, strict=True))

    zeros = jnp.zeros(num_points, _tree.vector_dtype(params))
    values, residual_norms, converged, _ = _loops.fold_captured(
        measure, (zeros, zeros, zeros.astype(bool), zeros), num_points
    )
    largest = jnp.argmax(values)
    return SharpnessBetweenReport(
        values[largest], residual_norms[largest], jnp.all(converged), values, residual_norms
    )


def ritz(
    operator: curvature.Operator, start: Any = None, *, key: jax.Array | None, num_steps: int
) -> Ritz:
    """Lanczos from `start`, or from a random one; with `key` it goes on after a breakdown."""
    _checks.integer("num_steps", num_steps)
    if start is None:
        size = operator.shape[0]
        noise = jax.random.normal(_checks.key("key", key), (size,), operator.dtype)
        start = _tree.unravel(noise, operator.params)
    steps = min(num_steps, operator.shape[0])
    return _diagonalise(curvature.lanczos(operator, start, steps, key=key))


@jax.jit
def _diagonalise(found: curvature.LanczosResult) -> Ritz:
    pairs = curvature.ritz_pairs(found)
    floor = _FLOOR * jnp.finfo(pairs.values.dtype).eps * jnp.nanmax(jnp.abs(pairs.values))
    bounds = jnp.maximum(pairs.residual_norms, floor)
    beta = jnp.linalg.norm(found.residual)
    return Ritz(pairs.values, pairs.vectors, bounds, found.basis, beta)


@functools.partial(jax.jit, static_argnums=2)
def report(found: Ritz, tol: Any, largest_magnitude: bool = False) -> SharpnessReport:
    """The end of the spectrum that is asked for."""
    values = found.values
    at = jnp.nanargmax(jnp.abs(values)) if largest_magnitude else values.size - 1
    value, bound = values[at], found.bounds[at]
    small = bound <= jnp.asarray(tol, value.dtype) * jnp.abs(value)
    return SharpnessReport(value, bound, small, jnp.nanmin(values))


def _interpolate(share: jax.Array, start: Any, end: Any) -> Any:
    return start + share.astype(start.dtype) * (end - start)
