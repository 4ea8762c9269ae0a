"""Sparse recovery: how near a diagonal linear network is to the weights that made its data."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _numerics
from regjax._arguments import checked
from regjax._printing import legible


@legible
class SparseRecoveryResult(NamedTuple):
    """A diagonal linear network beside true weights w*.

    Attributes:
      squared_error: (), ||w - w*||^2.
      largest_error: (), largest |w - w*| on the support, where w* is not 0; 0 if there is none.
      largest_off_support: (), largest |w| off the support, where w* is 0; 0 if there is none.
      share_found: (), share of the support of size k among the k largest |w|; NaN for k = 0 or if a
        weight is not finite.
      is_positive: (), whether all entries of u and v are positive, as in gradient flow. The theory
        does not hold for descent that has crossed 0.
    """

    squared_error: jax.Array
    largest_error: jax.Array
    largest_off_support: jax.Array
    share_found: jax.Array
    is_positive: jax.Array


@legible
class RecoveryBaselinesResult(NamedTuple):
    """What other estimates make of the same data.

    Attributes:
      oracle_squared_error: (), ||w - w*||^2 of least squares on the true support.
      least_norm_squared_error: (), the same of the solution of least norm, where descent on a plain
        linear model from 0 ends.
      noise_level: (), largest |X' xi / n| of the noise xi = y - X w*, for
        `models.early_stopping_window`.
    """

    oracle_squared_error: jax.Array
    least_norm_squared_error: jax.Array
    noise_level: jax.Array


@checked
def sparse_recovery(
    u: jax.Array, v: jax.Array | None, *, depth: int, true_weights: jax.Array
) -> SparseRecoveryResult:
    """Measures how far w = u^N - v^N is from the true weights, on their support and off it.

    Example:
      >>> u, v = jnp.array([2.0, 0.1, 0.2]), jnp.array([0.1, 0.1, 0.1])
      >>> true_weights = jnp.array([4.0, 0.0, 0.0])
      >>> result = diagnostics.sparse_recovery(u, v, depth=2, true_weights=true_weights)
      >>> print(f"{result.largest_error:.2f} {result.largest_off_support:.2f}", result.share_found)
      0.01 0.03 1.0

    Args:
      u: (p,), of `models.DiagonalLinear`.
      v: (p,), or None for u^N alone.
      depth: N, at least 2.
      true_weights: (p,), w*; its entries that are not 0 are the support.

    Returns:
      A `SparseRecoveryResult`.

    Raises:
      ValueError: the shapes differ, or `depth` is below 2.
      TypeError: an array is not real floating point.

    References:
      J. Li, T. Nguyen, C. Hegde, R. Wong (2021), arXiv:2108.05574, for the errors on the support
      and off it. `share_found` and `is_positive` are ours.
    """
    _checks.integer("depth", depth, minimum=2)
    shape = _vector("true_weights", true_weights)
    for name, value in (("u", u), ("v", u if v is None else v)):
        if jnp.shape(_checks.floating_array(name, value)) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {jnp.shape(value)}.")
    weights = u**depth if v is None else u**depth - v**depth
    support = jnp.asarray(true_weights) != 0
    is_known = jnp.all(jnp.isfinite(weights) & jnp.isfinite(true_weights))
    difference, zero = weights - true_weights, jnp.zeros((), weights.dtype)
    size = jnp.sum(support)
    # Rank 0 is the largest magnitude.
    ranks = jnp.argsort(jnp.argsort(-jnp.abs(weights)))
    hits = jnp.sum(support & (ranks < size)).astype(weights.dtype)
    is_positive = jnp.all(u > 0) if v is None else jnp.all((u > 0) & (v > 0))
    return SparseRecoveryResult(
        jnp.sum(difference**2),
        jnp.max(jnp.where(support, jnp.abs(difference), zero)),
        jnp.max(jnp.where(support, zero, jnp.abs(weights))),
        _numerics.divide(
            hits, size.astype(weights.dtype), where=is_known & (size > 0), otherwise=jnp.nan
        ),
        is_positive,
    )


@checked
def recovery_baselines(
    inputs: jax.Array, targets: jax.Array, *, true_weights: jax.Array
) -> RecoveryBaselinesResult:
    """Computes the errors of least squares on the true support and of the solution of least norm.

    Compare `sparse_recovery` with them. Both are computed by singular values, so that the data may
    have any shape.

    Example:
      >>> inputs, targets = jnp.array([[1.0, 1.0]]), jnp.array([2.0])
      >>> true_weights = jnp.array([2.0, 0.0])
      >>> result = diagnostics.recovery_baselines(inputs, targets, true_weights=true_weights)
      >>> print(f"{result.least_norm_squared_error:.2f}")  # the solution of least norm is [1, 1]
      2.00

    Args:
      inputs: (n, p), X.
      targets: (n,), y = X w* + xi.
      true_weights: (p,), w*; its entries that are not 0 are the support.

    Returns:
      A `RecoveryBaselinesResult`; NaN where a traced number is not finite.

    Raises:
      ValueError: the shapes do not fit, or a number is not finite.
      TypeError: an array is not real floating point.
    """
    (num_weights,) = _vector("true_weights", true_weights)
    (num_examples,) = _vector("targets", targets)
    if jnp.shape(inputs) != (num_examples, num_weights):
        raise ValueError(
            f"`inputs` must have shape {(num_examples, num_weights)}, got {jnp.shape(inputs)}."
        )
    for name, value in (("inputs", inputs), ("targets", targets), ("true_weights", true_weights)):
        _checks.finite_tree(name, _checks.floating_array(name, value))
    support = (true_weights != 0).astype(inputs.dtype)
    # The singular values of what is not finite are not to be had: the iteration does not end.
    is_known = jnp.all(jnp.isfinite(inputs))
    safe = jnp.where(is_known, inputs, 0)

    def error(features: jax.Array) -> jax.Array:
        # Where a feature is 0 the solution of least norm is 0 as well.
        weights = jnp.linalg.lstsq(features, targets)[0]
        return jnp.where(is_known, jnp.sum((weights - true_weights) ** 2), jnp.nan)

    with jax.default_matmul_precision("highest"):
        noise = targets - inputs @ true_weights
        level = jnp.max(jnp.abs(inputs.T @ noise)) / num_examples
        return RecoveryBaselinesResult(error(safe * support[None]), error(safe), level)


def _vector(name: str, value: ArrayLike) -> tuple[int, ...]:
    shape = _checks.floating_array(name, value).shape
    if len(shape) != 1 or not shape[0]:
        raise ValueError(f"`{name}` must have one axis, not of length 0, got shape {shape}.")
    return shape
