"""What lies outside of the rows of a basis: of a vector, or a random direction.

One pass over the rows is enough unless the norm dropped by more than 1/sqrt(2), which is when
rounding can have spoilt it; then there is a second one (Daniel, Gragg, Kaufman, Stewart 1976).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _numerics
from regjax.curvature._engine import _basis

# A norm below this many units of rounding of the matrix is rounding itself: the space is invariant.
_BREAKDOWN = 8


class _Turn(NamedTuple):
    """Where the orthogonalization is; `again`: whether one more pass is due."""

    passes: jax.Array
    vector: jax.Array
    coefficients: jax.Array
    beta: jax.Array
    rounding: jax.Array
    again: jax.Array


def orthogonalized(
    basis: _basis.Basis, vector: jax.Array, coefficients: jax.Array, largest: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The part outside of the rows after one pass, or two, its norm, and whether it is rounding.

    Args:
      basis: the rows.
      vector: of which the part is.
      coefficients: (rows,), to which those of the passes are added; they come second.
      largest: (), of the numbers of the matrix so far.
    """
    eps = _BREAKDOWN * float(jnp.finfo(vector.dtype).eps)

    def turn(at: _Turn) -> _Turn:
        residual, part = _basis.outside(basis, at.vector)
        coefficients = at.coefficients + part
        beta = jnp.sqrt(_basis.inner(basis, residual, residual))
        found = eps * jnp.maximum(largest, jnp.max(jnp.abs(coefficients)))
        is_first = at.passes == 0
        rounding = jnp.where(is_first, found, at.rounding)
        spoilt = beta < jnp.linalg.norm(part)  # the norm dropped by more than 1/sqrt(2)
        again = is_first & (spoilt | (beta <= rounding))
        return _Turn(at.passes + 1, residual, coefficients, beta, rounding, again)

    zero = jnp.zeros((), coefficients.dtype)
    vector = basis.space.constrain(vector)  # what a loop carries lies where it says
    first = _Turn(jnp.int32(0), vector, coefficients, zero, zero, jnp.bool_(True))
    # One program for both passes: most of the time of a short run is spent compiling them.
    last = lax.while_loop(lambda at: at.again, turn, first)
    broke_down = (last.passes > 1) & (last.beta <= last.rounding)
    return last.vector, last.coefficients, last.beta, broke_down


def drawn_outside(basis: _basis.Basis, noise: jax.Array) -> jax.Array:
    """The direction of a random vector outside of the filled rows, zero if they span all."""
    space = basis.space
    noise = lax.fori_loop(
        0, 2, lambda _, noise: _basis.outside(basis, noise / space.norm(noise))[0], noise
    )
    noise = jnp.where(_basis.spans_all(basis), jnp.zeros_like(noise), noise)
    return space.constrain(unit(noise, space.norm(noise)))


def unit(vector: jax.Array, norm: jax.Array) -> jax.Array:
    """`vector` / `norm`, or zeros where the norm is zero."""
    norm = norm.astype(vector.dtype)
    return _numerics.divide(vector, norm, where=norm > 0)
