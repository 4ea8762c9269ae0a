"""MINRES: the smallest residual in the Krylov space, for any symmetric matrix.

The Lanczos vectors are made by their three-term recurrence, T is factored by one rotation a step,
and the solution moves along w_k of W = V R^-1. With a preconditioner P the residual is the smallest
in the norm r'P r.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _numerics
from regjax._space import Space
from regjax.curvature._conjugate_gradients import Step, dot, preconditioned
from regjax.curvature._operators._operator import Operator

# Units of rounding of |r|^2 that count as none.
_LEAST = 16


class Recurrence(NamedTuple):
    """What MINRES keeps beside the solution; P = I without a preconditioner.

    Attributes:
      direction: P u / beta, a vector; multiplied next.
      newest: u, a vector: the newest Lanczos vector times its norm. before: the one before.
      along: w of the last step. along_before: that of the step before.
      beta: (), norm of the newest Lanczos vector, sqrt(u'P u). old_beta: of the one before.
      cosine: (), of the last rotation. sine: likewise.
      delta: (), what the last rotation has left beside the diagonal. epsilon: and beyond that.
      rest: (), norm of the residual, with its sign.
      relative: (), Euclidean norm of the residual at the beginning over `rest` there.
    """

    direction: jax.Array
    newest: jax.Array
    before: jax.Array
    along: jax.Array
    along_before: jax.Array
    beta: jax.Array
    old_beta: jax.Array
    cosine: jax.Array
    sine: jax.Array
    delta: jax.Array
    epsilon: jax.Array
    rest: jax.Array
    relative: jax.Array


def start(space: Space, residual: jax.Array, preconditioner: Operator | None) -> Recurrence:
    """The beginning, from the residual of some solution."""
    towards = preconditioned(preconditioner, residual)
    beta = _root(dot(space, residual, towards))
    nothing, zero = jnp.zeros_like(residual), jnp.zeros_like(beta)
    return Recurrence(
        direction=_numerics.divide(towards, beta),
        newest=residual,
        before=nothing,
        along=nothing.copy(),
        along_before=nothing.copy(),
        beta=beta,
        old_beta=zero,
        cosine=zero - 1,
        sine=zero.copy(),
        delta=zero.copy(),
        epsilon=zero.copy(),
        rest=beta.copy(),
        relative=_numerics.divide(space.norm(residual), beta),
    )


def follow(
    space: Space,
    solution: jax.Array,
    recurrence: Recurrence,
    image: jax.Array,
    preconditioner: Operator | None,
) -> Step:
    """The next solution, from `image` = A times the direction."""
    old = recurrence
    image = image - _numerics.divide(old.beta, old.old_beta) * old.before
    alpha = dot(space, old.direction, image)
    newest = image - _numerics.divide(alpha, old.beta) * old.newest
    towards = preconditioned(preconditioner, newest)
    energy = dot(space, newest, towards)
    beta = _root(energy)
    # Two old rotations on the new column (0, ..., beta, alpha, new beta), then one of its own.
    beside = old.cosine * old.delta + old.sine * alpha
    diagonal = old.sine * old.delta - old.cosine * alpha
    gamma = jnp.hypot(diagonal, beta)
    cosine, sine = _numerics.divide(diagonal, gamma), _numerics.divide(beta, gamma)
    along = old.direction - old.epsilon * old.along_before - beside * old.along
    along = _numerics.divide(along, gamma)
    rest = sine * old.rest
    following = Recurrence(
        direction=_numerics.divide(towards, beta),
        newest=newest,
        before=old.newest,
        along=along,
        along_before=old.along,
        beta=beta,
        old_beta=old.beta,
        cosine=cosine,
        sine=sine,
        delta=-old.cosine * beta,
        epsilon=old.sine * beta,
        rest=rest,
        relative=old.relative,
    )
    size = jnp.abs(alpha) + beta + old.beta
    eps = float(jnp.finfo(gamma.dtype).eps)
    # |A r| / |r| of the residual so far: where its square is rounding and this step gains no more,
    # the residual is what no solution reaches, and what follows is long and of rounding alone.
    gradient = jnp.hypot(diagonal, following.delta)
    is_least = (gradient**2 <= _LEAST * eps * size**2) & (cosine**2 <= _LEAST * eps)
    return Step(
        solution=solution + cosine * old.rest * along,
        recurrence=following,
        residual_norm=jnp.abs(rest) * old.relative,
        curvature=_numerics.divide(alpha, dot(space, old.direction, old.direction)),
        # A space that is exhausted and on which the matrix is singular has no solution.
        is_taken=(gamma > eps * size) & ~is_least & jnp.isfinite(energy),
        goes_on=beta > 0,
    )


def _root(energy: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.maximum(energy, 0))
