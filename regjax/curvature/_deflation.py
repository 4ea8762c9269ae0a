"""The extreme eigenpairs that a density takes out, and what is left of vectors without them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax._on_host import on_host
from regjax._one_program import one_program
from regjax.curvature._engine import _basis
from regjax.curvature._krylov import Krylov
from regjax.curvature._precision import precisely, rounding
from regjax.curvature._ritz import residual_parts, small_pairs

# A Ritz pair is taken out when its residual norm is below the one share of the largest distance of
# a Ritz value from the mean, and below the other of its own. Left-over coupling moves the numbers
# of eigenvalues up to a place as little as residual^2 / distance to the pair does.
_DEFLATION_TOLERANCE, _OWN_TOLERANCE = 1e-3, 1e-2


class Deflation(NamedTuple):
    """The eigenpairs that are taken out.

    Attributes:
      rows: their vectors.
      values: (r,), 0 beyond the rows that are filled.
      residual_norms: (r,), likewise.
    """

    rows: _basis.Basis
    values: jax.Array
    residual_norms: jax.Array


def taken_out(krylov: Krylov, num_rows: int, eps: float) -> Deflation:
    """The Ritz pairs that converged, in descending order."""
    weights, count, values, residual_norms = _converged(krylov, num_rows, eps)
    return Deflation(_combined(krylov.basis, weights, count), values, residual_norms)


_combined = one_program()(precisely(_basis.combined))


@on_host(static=(1, 2))
@precisely
def _converged(
    krylov: Krylov, num_rows: int, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The weights of the rows (rows, r), how many pairs there are, their values and residuals."""
    values, vectors, _ = small_pairs(krylov.projected, krylov.filled)
    values, vectors = values[::-1][:num_rows], vectors[:, ::-1][:, :num_rows]
    beyond, dropped = residual_parts(krylov, vectors)
    bounds = beyond + dropped
    sizes = jnp.abs(values - krylov.projected[0, 0])  # of a random direction: near the mean
    take = bounds <= jnp.minimum(_DEFLATION_TOLERANCE * jnp.max(sizes), _OWN_TOLERANCE * sizes)
    # A run cut short by Ctrl-C has empty rows, whose pairs are nobody's.
    take &= krylov.filled == num_rows
    order = jnp.argsort(~take, stable=True)
    dtype = krylov.basis.space.dtype
    bounds += rounding(values, eps=eps, dtype=dtype, num_rows=krylov.filled)
    count = jnp.sum(take, dtype=jnp.int32)
    inside = jnp.arange(num_rows, dtype=jnp.int32) < count
    weights = jnp.where(inside[None], vectors[:, order], 0)
    values, bounds = krylov.unscaled(values), krylov.unscaled(bounds)
    return (
        weights,
        count,
        jnp.where(inside, values[order], 0),
        jnp.where(inside, bounds[order], 0),
    )


def outside(rows: _basis.Basis, vectors: jax.Array) -> jax.Array:
    """A vector, or several, less the part in the rows; twice is enough."""
    once = lambda vector: _basis.outside(rows, vector)[0]
    once = once if vectors.ndim == 1 else jax.vmap(once)
    return jax.lax.fori_loop(0, 2, lambda _, vectors: once(vectors), vectors)
