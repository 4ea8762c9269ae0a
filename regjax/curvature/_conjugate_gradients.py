"""Conjugate gradients: one system between two products, for positive definite matrices.

    alpha = r'z / p'Ap,  x <- x + alpha p,  r <- r - alpha A p,
    z = P r,  p <- z + (r'z / old r'z) p

Where p'Ap is not positive the matrix is not positive definite, and the recurrence means nothing.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _numerics
from regjax._space import Space
from regjax.curvature._engine._accumulation import inner_products
from regjax.curvature._operators._operator import Operator


class Recurrence(NamedTuple):
    """What conjugate gradients keep beside the solution.

    Attributes:
      direction: p, a vector; multiplied next. After negative curvature it is what had it.
      residual: r, a vector.
      energy: (), r'z.
    """

    direction: jax.Array
    residual: jax.Array
    energy: jax.Array


class Step(NamedTuple):
    """What a product has come to.

    Attributes:
      solution: x, a vector.
      recurrence: the method's own.
      residual_norm: (), of the residual as the recurrence has it.
      curvature: (), p'Ap / p'p of the direction that was multiplied.
      is_taken: (), bool; False: the step cannot be made, and nothing of it is to be used.
      goes_on: (), bool; False: it is the last one.
    """

    solution: jax.Array
    recurrence: NamedTuple
    residual_norm: jax.Array
    curvature: jax.Array
    is_taken: jax.Array
    goes_on: jax.Array


def dot(space: Space, one: jax.Array, other: jax.Array) -> jax.Array:
    """(), the inner product of two vectors, summed as exactly as those of a basis are."""
    return inner_products(space, one[None], other)[0]


def preconditioned(preconditioner: Operator | None, residual: jax.Array) -> jax.Array:
    """P r, or r itself."""
    return residual if preconditioner is None else preconditioner.product(residual)


def start(space: Space, residual: jax.Array, preconditioner: Operator | None) -> Recurrence:
    """The beginning, from the residual of some solution."""
    towards = preconditioned(preconditioner, residual)
    # Two arrays: the steps donate their state.
    return Recurrence(towards.copy(), residual, dot(space, residual, towards))


def follow(
    space: Space,
    solution: jax.Array,
    recurrence: Recurrence,
    image: jax.Array,
    preconditioner: Operator | None,
) -> Step:
    """The next solution, from `image` = A p."""
    direction, residual, energy = recurrence
    bend = dot(space, direction, image)
    length = _numerics.divide(energy, bend)
    residual = residual - length * image
    square = dot(space, residual, residual)
    towards, next_energy = residual, square
    if preconditioner is not None:
        towards = preconditioned(preconditioner, residual)
        next_energy = dot(space, residual, towards)
    following = towards + _numerics.divide(next_energy, energy) * direction
    return Step(
        solution=solution + length * direction,
        recurrence=Recurrence(following, residual, next_energy),
        residual_norm=jnp.sqrt(square),
        curvature=_numerics.divide(bend, dot(space, direction, direction)),
        is_taken=(bend > 0) & jnp.isfinite(length) & jnp.isfinite(square),
        # Unless it is zero, a residual has energy if the preconditioner is positive definite.
        goes_on=next_energy > 0,
    )
