"""Ritz pairs: what a basis Q with Q A Q' knows of the spectrum of A, and how well.

With the eigenpairs (theta, s) of the small matrix Q A Q' a Ritz pair is (theta, Q' s). The norm of
its residual A y - theta y is read off: |beta s_last| for what A q of the last row has outside of
the basis, and the same for directions that were dropped before. An eigenvalue of A lies within it.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _numerics
from regjax._printing import legible
from regjax.curvature._engine import _basis
from regjax.curvature._krylov import Krylov
from regjax.curvature._lanczos import LanczosResult
from regjax.curvature._precision import precisely, rounding


@legible
class RitzResult(NamedTuple):
    """What m Lanczos steps know of the spectrum: the eigenpairs of T.

    Attributes:
      values: (m,), Ritz values, ascending; for steps that were not done copies of the smallest, at
        the front, of weight 0.
      residual_norms: (m,), of the Ritz pairs: an eigenvalue of the matrix as the products have it
        lies within it. It includes what rounding may add, relative to the largest |Ritz value|: 8
        units of the narrowest type in a product and 2.5 sqrt(m) of the rows' own; and the error of
        products that are differences. Copies for steps that were not done, as in `values`.
      weights: (m,), the squared component of the start along each Ritz vector, which is its weight
        in Gauss quadrature; sum 1; 0 for steps that were not done.
      vectors: (m, m), columns: the Ritz vectors in the basis, `basis.T @ vectors` in full.
    """

    values: jax.Array
    residual_norms: jax.Array
    weights: jax.Array
    vectors: jax.Array


class SmallPairs(NamedTuple):
    """Eigenpairs of a small matrix of which only the first rows are filled.

    Attributes:
      values: (rows,), ascending; below all others, at the front, for rows that are not filled.
      vectors: (rows, rows), columns.
      valid: (rows,), bool, which belong to filled rows.
    """

    values: jax.Array
    vectors: jax.Array
    valid: jax.Array


@precisely
@jax.jit
def ritz_pairs(result: LanczosResult) -> RitzResult:
    """Computes the eigenpairs of the tridiagonal matrix of a Lanczos run.

    They are estimates of eigenvalues of the matrix (Ritz values), each with a residual norm within
    which an eigenvalue lies.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> ritz = curvature.ritz_pairs(curvature.lanczos(hessian, jnp.ones(8), 2))
      >>> print(ritz.values, ritz.residual_norms)
      [2.209 6.791] [1.414 1.414]

    Args:
      result: from `lanczos`.

    Returns:
      A `RitzResult`.
    """
    matrix = jnp.diag(result.alphas) + jnp.diag(result.betas, 1) + jnp.diag(result.betas, -1)
    done = jnp.arange(result.alphas.size, dtype=jnp.int32) < result.num_steps
    pairs = small_pairs(jnp.where(done[:, None] & done[None], matrix, 0), result.num_steps)
    first = pairs.values.size - result.num_steps
    values = jnp.where(pairs.valid, pairs.values, pairs.values[first])
    beta = _numerics.scaled_norm(result.residual).astype(values.dtype)
    outside = beta * jnp.abs(pairs.vectors[result.num_steps - 1])
    outside = jnp.where(pairs.valid, outside, outside[first])
    dtype = jnp.result_type(*jax.tree.leaves(result.basis))
    unknown = rounding(values, eps=result.eps, dtype=dtype, num_rows=result.num_steps)
    return RitzResult(
        values=values,
        residual_norms=outside + unknown + result.product_error.astype(outside.dtype),
        weights=jnp.where(pairs.valid, pairs.vectors[0] ** 2, 0),
        vectors=jnp.where(pairs.valid[None], pairs.vectors, 0),
    )


def small_pairs(matrix: jax.Array, filled: jax.Array) -> SmallPairs:
    """The eigenpairs of a matrix (rows, rows) that is zero beyond its first `filled` rows."""
    rows = jnp.arange(matrix.shape[0], dtype=jnp.int32)
    # Rows that are not filled get an eigenvalue below all others, so that they mix with none.
    norm = _numerics.scaled_norm(matrix)
    below = -2 * jnp.where(norm > 0, norm, 1)
    values, vectors = jnp.linalg.eigh(matrix + jnp.diag(jnp.where(rows < filled, 0, below)))
    # eigh sorts: those come first.
    return SmallPairs(values, vectors, rows >= rows.size - filled)


def residual_parts(krylov: Krylov, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the residual norms of the Ritz pairs of `vectors` (columns) are made of, both (rows,).

    Returns:
      The part along the direction to come, which goes on to shrink, and a bound on what was dropped
      for good; the residual norm is at most their sum.
    """
    dropped = jnp.sum(jnp.abs(krylov.lost @ vectors), 0)
    # A basis of the whole space has all directions, those that were dropped as well.
    dropped = jnp.where(_basis.spans_all(krylov.basis), 0, dropped)
    return jnp.abs(krylov.coupling @ vectors), dropped + krylov.blur


def recurrence(krylov: Krylov) -> tuple[jax.Array, jax.Array]:
    """The coefficients of scale times A, both (m,): the last beta leads out of T."""
    alphas = jnp.diagonal(krylov.projected)
    betas = jnp.append(jnp.diagonal(krylov.projected, 1), 0).astype(alphas.dtype)
    return alphas, betas.at[krylov.filled - 1].set(krylov.beta)
