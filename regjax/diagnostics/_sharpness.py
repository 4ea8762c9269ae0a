"""The largest eigenvalue of the Hessian between two points, and of any operator."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _loops, _numerics, _tree, curvature
from regjax._arguments import checked
from regjax._base import LossFn, Params, PRNGKey, Tree
from regjax._printing import legible


@legible
class SharpnessResult(NamedTuple):
    """The largest Hessian eigenvalue.

    Attributes:
      value: (), its estimate (Ritz value), which is not above the eigenvalue except for rounding.
        In units of the loss per squared parameter, or of the loss if it is spherical.
      residual_norm: (), ||H v - value v||: some eigenvalue lies within it of the value.
      converged: (), bool: the residual norm is within the tolerance.
    """

    value: jax.Array
    residual_norm: jax.Array
    converged: jax.Array


@legible
class SharpnessBetweenResult(NamedTuple):
    """The largest Hessian eigenvalue on a segment; S points.

    Attributes:
      value: (), the largest of `values`.
      residual_norm: (), at that point.
      converged: (), bool: all points have converged to an eigenvalue. That it is the largest one is
        very likely from a random start, but not checked.
      values: (S,), at evenly spaced points, both ends included.
      residual_norms: (S,), at these points.
    """

    value: jax.Array
    residual_norm: jax.Array
    converged: jax.Array
    values: jax.Array
    residual_norms: jax.Array


@checked
def lambda_max_between(
    loss_fn: LossFn,
    params: Params,
    other_params: Params,
    *batch: Tree,
    key: PRNGKey,
    num_points: int = 8,
    max_matvecs: int = 50,
    tol: ArrayLike = 1e-3,
    chunk_size: int | None = None,
) -> SharpnessBetweenResult:
    """Finds the largest Hessian eigenvalue on the segment between two successive iterates.

    For networks with batch norm, in which the eigenvalue at a single iterate says little about the
    region that a step crosses. For the eigenvalue at a single point use `curvature.top_eigenpairs`
    of a `curvature.hessian`.

    Example:
      >>> loss_fn = lambda w: jnp.sum(w**4) / 12.0  # of curvature w^2
      >>> params, other_params = jnp.array([1.0, 0.5]), jnp.array([2.0, 0.5])
      >>> result = diagnostics.lambda_max_between(
      ...     loss_fn, params, other_params, key=jax.random.key(0), num_points=3
      ... )
      >>> print(result.values, result.value)
      [1.   2.25 4.  ] 4.0

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters at one end.
      other_params: tree like `params` at the other end.
      *batch: arrays with a leading axis of examples.
      key: typed key of the random starts.
      num_points: number of evenly spaced points, both ends included; at least 2. The paper takes 8.
      max_matvecs: limit of the number of Hessian products at each point.
      tol: relative tolerance: the residual norm over the largest magnitude of an eigenvalue.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `SharpnessBetweenResult`.

    Raises:
      ValueError: an argument is out of its range, `other_params` is another tree, or the loss is
        not a scalar or cannot be split into chunks.
      TypeError: a parameter is not real floating point, or `key` is not a typed key.

    References:
      S. Kaur, J. Cohen, Z. Lipton (2023), arXiv:2206.10654, on networks with batch norm.
    """
    _checks.integer("num_points", num_points, minimum=2)
    _checks.floating_like("other_params", other_params, params)
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    keys = jax.random.split(_checks.key("key", key), num_points)

    def measure(_: None, found: SharpnessResult, i: jax.Array) -> SharpnessResult:
        here = _numerics.between(params, other_params, i / (num_points - 1))
        hessian = curvature.hessian(loss_fn, here, *batch, chunk_size=chunk_size)
        largest = largest_eigenvalue(hessian, key=keys[i], max_matvecs=max_matvecs, tol=tol)
        return jax.tree.map(lambda column, entry: column.at[i].set(entry), found, largest)

    zeros = jnp.zeros(num_points, _tree.vector_dtype(params))
    values, residual_norms, converged = _loops.scan(
        measure, SharpnessResult(zeros, zeros, zeros.astype(bool)), num_points
    )
    largest = jnp.argmax(values)
    return SharpnessBetweenResult(
        values[largest], residual_norms[largest], jnp.all(converged), values, residual_norms
    )


def largest_eigenvalue(
    operator: curvature.Operator, *, key: PRNGKey, max_matvecs: int, tol: ArrayLike
) -> SharpnessResult:
    """Finds the algebraically largest eigenvalue; arguments as in `curvature.top_eigenpairs`."""
    # No certificate that nothing was missed, which costs a third as many products more. A second
    # copy would change the vectors, not the value, and a random start has a part along every
    # eigenspace.
    found = curvature.top_eigenpairs(
        operator, 1, key=key, tol=tol, max_matvecs=max_matvecs, search=False
    )
    return SharpnessResult(found.values[0], found.residual_norms[0], found.converged[0])
