"""XNysTrace and XNysDiag: leave-one-out estimates of positive semi-definite matrices.

With Y = A W for s random vectors w_i and h = W'Y, the Nystrom approximation B = Y h^-1 Y' is the
best that Y allows, and one product for each vector is all. B without w_i is B - z_i z_i' / g_i with
z_i = Y h^-1 e_i and g_i = (h^-1)_ii, and (A - B_i) w_i = z_i / g_i, so that the i-th estimate is

    of the trace       tr B - |z_i|^2 / g_i + c_i / g_i
    of the diagonal    diag B - z_i * z_i / g_i + w_i * z_i / g_i

with c_i = (n - s + 1) over the squared norm of the part of w_i outside of the other vectors.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _loops
from regjax._base import PRNGKey
from regjax._space import Space
from regjax.curvature._engine._solver import Solver
from regjax.curvature._hutchinson import Estimates, Result
from regjax.curvature._left_out import (
    At,
    Rows,
    Samples,
    combined,
    inner_products,
    mean_of_pairs,
    put,
    scales_of,
    take,
    with_pairs,
)
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely

# Units of rounding of the inner products that may make an eigenvalue of h negative.
_UNITS = 8


class NystromState(NamedTuple):
    """The estimator between two products.

    Attributes:
      probes: (s, length), the random vectors w_i.
      images: (s, length), their images y_i, 0 for those to come.
      num_matvecs: (), int32, products so far.
    """

    probes: jax.Array
    images: jax.Array
    num_matvecs: jax.Array


def nystrom_solver(
    operator: Operator,
    *,
    name: str,
    key: PRNGKey,
    num_matvecs: int,
    of_trace: bool,
    result: Result,
) -> Solver[NystromState, NamedTuple]:
    """The solver of XNysTrace and XNysDiag; arguments as of `hutchinson_solver`."""
    space = operator.space
    num_rows = min(num_matvecs, space.size)
    block = num_rows if operator.takes_blocks else 1
    eps = max(operator.eps, float(jnp.finfo(space.dtype).eps))

    def init() -> NystromState:
        # Of signs the diagonal itself has no variance; as many of them as parameters may depend.
        draw = space.normal if of_trace or num_rows == space.size else space.signs
        probes = draw(jax.random.fold_in(key, 0), num_rows)
        return space.replicate(NystromState(probes, space.zeros(num_rows), jnp.int32(0)))

    def finish(state: NystromState) -> NamedTuple:
        # The error of a single sample is unknown, also where NaN are forbidden.
        with jax.debug_nans(False):
            found, smallest, largest = _estimated(state, of_trace, eps, space)
        if _loops.is_concrete(found) and smallest < 0:
            raise ValueError(
                "`operator` must be positive semi-definite for this `method`, got one whose random "
                f"principal submatrix has an eigenvalue {float(smallest):.3g} beside "
                f'{float(largest):.3g}; "xtrace" and "xdiag" take any symmetric matrix.'
            )
        return result(found)

    return Solver(
        name=name,
        operator=operator,
        arguments={"key": key, "num_matvecs": num_matvecs, "products at once": block},
        init=init,
        vectors=lambda state: take(state.probes, state.num_matvecs, block),
        update=functools.partial(_absorbed, space=space),
        done=lambda state: False,
        result=finish,
        max_steps=num_rows // block,
        lower=("num_matvecs",),
        block=block,
    )


@functools.partial(jax.jit, static_argnames="space", donate_argnums=0)
def _absorbed(state: NystromState, images: jax.Array, *, space: Space) -> NystromState:
    rows = space.constrain(put(state.images, images, state.num_matvecs))
    return NystromState(state.probes, rows, state.num_matvecs + images.shape[0])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
@precisely
def _estimated(
    state: NystromState, of_trace: bool, eps: float, space: Space
) -> tuple[Estimates, jax.Array, jax.Array]:
    """The estimates; and the smallest eigenvalue of h if that is no rounding, beside the largest.

    Before all products are made the estimates are those of the probes alone.
    """
    probes, images, count = state
    num_rows = probes.shape[0]
    is_finished = count >= num_rows
    matrix = inner_products(space, probes, images)
    matrix = (matrix + matrix.T) / 2
    is_finite = jnp.all(jnp.isfinite(matrix))
    # The iteration does not end for NaN.
    values, vectors = jnp.linalg.eigh(jnp.where(is_finite, matrix, 0))
    squares = jnp.sum(probes**2, 1)
    largest = jnp.sqrt(jnp.max(squares) * jnp.max(jnp.sum(images**2, 1)))
    is_negative = is_finished & (values[0] < -_UNITS * eps * num_rows * largest)
    find = _of_trace if of_trace else _of_diagonal
    found = find(state, *_inverse(values, vectors), space)
    bad = ~is_finite | is_negative
    each, exact = (jnp.where(bad, jnp.nan, part) for part in (found.each, found.exact))
    estimates = combined(
        found._replace(each=each, exact=exact),
        probes * images,
        squares if of_trace else None,
        num_matvecs=count,
        is_finished=is_finished,
        of_trace=of_trace,
        space=space,
    )
    return estimates, jnp.where(is_negative, values[0], 0), values[-1]


def _inverse(values: jax.Array, vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
    """h^(-1/2) and h^-1, with what is below rounding of the largest eigenvalue raised to that."""
    info = jnp.finfo(values.dtype)
    kept = jnp.maximum(values, jnp.maximum(info.eps * values.size * values[-1], info.tiny))
    return (vectors / jnp.sqrt(kept)[None]).T, (vectors / kept[None]) @ vectors.T


def _of_trace(state: NystromState, root: jax.Array, inverse: jax.Array, space: Space) -> Samples:
    probes, images, _ = state
    num_rows = len(inverse)
    # In an orthonormal basis of Y, since the squares of Y would lose half of the digits.
    mixed = inner_products(space, images, space.orthonormal(images))
    exact = jnp.sum((root @ mixed) ** 2)
    parts = inverse @ mixed
    gram, own = parts @ parts.T, jnp.diagonal(inverse)
    basis = inner_products(space, probes, space.orthonormal(probes))
    outside = jnp.linalg.inv(basis)
    outside = outside.T @ outside  # the inverse of the probes' Gram matrix
    factor = (space.size - num_rows + 1) * jnp.diagonal(outside)
    each = exact + (factor - jnp.diagonal(gram)) / own

    ratios, scales, shares = _without(inverse, own)
    squares = jnp.diagonal(gram)
    second = squares[None] - 2 * ratios * gram + ratios**2 * squares[:, None]
    left = jnp.diagonal(outside)[:, None] - outside**2 / jnp.diagonal(outside)[None]
    factors = (space.size - num_rows + 2) * left
    losses = second * scales + (factor / own)[:, None] - factors * (1 / own[:, None] + shares)
    covariance = mean_of_pairs(jnp.where(scales > 0, losses, 0))
    return Samples(each[:, None], exact[None], covariance[None], covariance)


def _of_diagonal(state: NystromState, root: jax.Array, inverse: jax.Array, space: Space) -> Samples:
    del space
    probes, images, _ = state
    parts, own = inverse @ images, jnp.diagonal(inverse)
    exact = jnp.sum((root @ images) ** 2, 0)
    each = exact[None] + (probes * parts - parts**2) / own[:, None]
    ratios, scales, _ = _without(inverse, own)

    def loss(at: At, one: Rows, other: Rows) -> jax.Array:
        part = other[0] - at(ratios) * one[0]
        return at(scales) * (part**2 + at(ratios) * one[1] * part)

    return with_pairs(each, exact, loss, (parts, probes))


def _without(inverse: jax.Array, own: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the pairs, all (s, s): g_ij / g_ii, one over g_jj - g_ij^2 / g_ii, and its (w_i'z)^2.

    The vector j less is another z = z_j - (g_ij / g_ii) z_i less, of which w_i'z = -g_ij / g_ii.
    """
    ratios = inverse / own[:, None]
    scales = scales_of(1 - ratios * ratios.T) ** 2 / own[None]
    return ratios, scales, scales * ratios**2
