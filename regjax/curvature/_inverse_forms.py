"""The forms B (A + damping I)^-1 B' of a few vectors at a time, by solved systems, with bounds.

Of two vectors b, c and approximate solutions x, y of their systems

    b'y + x'(c - (A + damping I) y)

is off by the form of x - x* and y - y*, which is of second order in the errors of the solutions.
"""

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax._base import Params
from regjax._space import Space
from regjax.curvature._operators._operator import Operator
from regjax.curvature._operators._positive import lower_bound as known_bound
from regjax.curvature._precision import precisely
from regjax.curvature._solve import solve

# Units of rounding by which a sum of products may be off, relative to the norms of its factors.
_SUM = 4


def inverse_forms(
    rows: Params,
    operator: Operator,
    *,
    damping: ArrayLike,
    lower_bound: ArrayLike | None,
    preconditioner: Operator | None,
    tol: ArrayLike,
    max_matvecs: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The forms of M blocks B (C, n), which are a tree of (M, C, *leaf).

    The operator and the options are those of `solve`.

    Returns:
      The forms (M, C, C), symmetric; how far each may be off, infinite where nothing positive is
      known of the least eigenvalue; (M,), whether all systems of a block have converged; and (),
      the products for each system.
    """
    num_examples, num_outputs = jax.tree.leaves(rows)[0].shape[:2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), rows)
    found = solve(
        operator, flat, damping=damping, preconditioner=preconditioner, tol=tol,
        max_matvecs=max_matvecs, lower_bound=lower_bound,
    )  # fmt: skip
    space = operator.space
    vectors, solutions = space.ravel_rows(flat), space.ravel_rows(found.solution)
    images = operator.block_product(solutions) + jnp.asarray(damping, space.dtype) * solutions
    least = least_eigenvalue(operator, damping, lower_bound)
    values, bounds = _of_blocks(
        vectors, solutions, images, found.error_bound, least, num_outputs=num_outputs,
        space=space,
    )  # fmt: skip
    converged = found.converged.reshape(num_examples, num_outputs).all(1)
    return values, bounds, converged, found.num_matvecs


@functools.partial(jax.jit, static_argnames=("num_outputs", "space"))
@precisely
def _of_blocks(
    vectors: jax.Array, solutions: jax.Array, images: jax.Array, errors: jax.Array,
    least: jax.Array, *, num_outputs: int, space: Space,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """The forms (M, C, C) of the rows of each example, and how far they may be off."""
    blocks = lambda rows: rows.reshape(-1, num_outputs, *rows.shape[1:])
    pairs = jax.vmap(jax.vmap(jax.vmap(space.inner, (None, 0)), (0, None)))
    norms = jax.vmap(space.norm)
    residuals = vectors - images
    ones, others = blocks(vectors), blocks(solutions)
    values = pairs(ones, others) + pairs(others, blocks(residuals))
    # The form leaves open d'(A + damping I) d, d the error of x, and what products and sums round.
    lengths, sizes, rests = (blocks(norms(rows)) for rows in (solutions, vectors, residuals))
    errors = blocks(errors)
    rounding = jnp.maximum(errors * least - rests, 0)
    energies = (rests + rounding) / jnp.sqrt(least)
    outer = lambda one, other: one[:, :, None] * other[:, None, :]
    sums = _SUM * jnp.finfo(vectors.dtype).eps * (outer(sizes, lengths) + outer(lengths, rests))
    off = outer(lengths, rounding) + sums
    bounds = outer(energies, energies) + jnp.maximum(off, off.mT)
    is_known = jnp.isfinite(outer(errors, errors))
    return (values + values.mT) / 2, jnp.where(is_known, bounds, jnp.inf)


def least_eigenvalue(
    operator: Operator, damping: ArrayLike, lower_bound: ArrayLike | None
) -> jax.Array:
    """The least that an eigenvalue of A + damping I can be."""
    known = known_bound(operator) if lower_bound is None else lower_bound
    return jnp.asarray(damping, operator.dtype) + jnp.asarray(known, operator.dtype)
