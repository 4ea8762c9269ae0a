"""XTrace and XDiag: as many estimates as random vectors, each of which is left out of its own.

With Y = A W for s random vectors w_i and an orthonormal basis Q of all of Y, the basis Q_i of Y
without its i-th vector spans what Q does but for one unit vector Q s_i: s_i is orthogonal to all
columns of R = Q'Y but the i-th, so that it is the i-th row of the inverse of R, normalised. What
Q_i holds of A is taken exactly, the rest is sampled by w_i, on which Q_i does not depend. The mean
of the s estimates uses all products for both.

With P_i = I - Q_i Q_i' and h = Q'A Q the i-th estimate is

    of the trace       tr h - s_i' h s_i + c_i (P_i w_i)' A (P_i w_i)
    of the diagonal    diag(QQ'A) - (Q s_i) * (A Q s_i) + w_i * (P_i A w_i)
    of squared rows    the sum of the squares of A Q - (A Q s_i)^2 + c_i (A P_i w_i)^2

with c_i = (n - s + 1) / |P_i w_i|^2, which makes of a normal vector one on the sphere.

For the errors (`_left_out.py`) the j-th vector is left out too: Q_i loses one more unit vector Q b,
with b in the span of s_i and s_j.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _loops, _numerics
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


class LeaveOneOutState(NamedTuple):
    """The estimator between two products.

    Attributes:
      probes: (s, length), the random vectors w_i.
      rows: (s, length), first their images y_i, then an orthonormal basis Q of them.
      mixing: (s, s), R of y_i = sum over j of R_ji rows_j; the identity in the beginning.
      kept: of the images A q_j what is needed: the rows (s, length), or the rows of h (s, s).
      num_matvecs: (), int32, products so far.
    """

    probes: jax.Array
    rows: jax.Array
    mixing: jax.Array
    kept: jax.Array
    num_matvecs: jax.Array


class Small(NamedTuple):
    """Small matrices, of which the rows belong to the probes.

    Attributes:
      along: (s, s), Q'w_i.
      mixed: (s, s), R e_i = Q'y_i.
      missing: (s, s), s_i, what Q_i has not.
      inside: (s, s), Q'P_i w_i subtracted from Q'w_i.
      squares: (s,), |P_i w_i|^2.
      factor: (s,), c_i.
      cosines: (s, s), of s_i and s_j.
      scales: (s, s), of b = scale (s_j - cosine s_i); 0 where rounding leaves nothing of it.
    """

    along: jax.Array
    mixed: jax.Array
    missing: jax.Array
    inside: jax.Array
    squares: jax.Array
    factor: jax.Array
    cosines: jax.Array
    scales: jax.Array

    def second(self, values: jax.Array) -> jax.Array:
        """b'x_i (s, s) from s_j'x_i (s, s)."""
        return self.scales * (values - self.cosines * jnp.diagonal(values)[:, None])


Find = Callable[[LeaveOneOutState, Small, Space], Samples]
"""(the state when all products are made, its small matrices, space) -> the estimates."""


def leave_one_out_solver(
    operator: Operator,
    *,
    name: str,
    key: PRNGKey,
    num_matvecs: int,
    of_trace: bool,
    result: Result,
    of_squares: bool = False,
) -> Solver[LeaveOneOutState, NamedTuple]:
    """The solver of XTrace, XDiag and the norms of rows.

    Args:
      operator: symmetric.
      name: of the public function.
      key: typed key of the random vectors.
      num_matvecs: number of products, an odd one is left out.
      of_trace: whether only the sum is wanted.
      result: what becomes of the estimates.
      of_squares: whether they are of the diagonal of A A, and not of A.
    """
    space = operator.space
    num_rows = min(num_matvecs // 2, space.size)
    block = num_rows if operator.takes_blocks else 1
    # Of signs the diagonal itself has no variance.
    draw = space.normal if of_squares or of_trace else space.signs
    keeps_small = of_trace and not of_squares
    find = _of_squares if of_squares else _of_trace if of_trace else _of_diagonal

    def init() -> LeaveOneOutState:
        small = jnp.eye(num_rows, dtype=space.dtype)
        state = LeaveOneOutState(
            probes=draw(jax.random.fold_in(key, 0), num_rows),
            rows=space.zeros(num_rows),
            mixing=small,
            kept=jnp.zeros_like(small) if keeps_small else space.zeros(num_rows),
            num_matvecs=jnp.int32(0),
        )
        return space.replicate(state)

    def update(state: LeaveOneOutState, images: jax.Array) -> LeaveOneOutState:
        state = _absorbed(state, images, keeps_small, space)
        return _loops.cond(
            state.num_matvecs == num_rows, functools.partial(_orthonormalized, space=space), state
        )

    return Solver(
        name=name,
        operator=operator,
        arguments={"key": key, "num_matvecs": num_matvecs, "products at once": block},
        init=init,
        vectors=functools.partial(_vectors, block=block),
        update=update,
        done=lambda state: False,
        result=lambda state: result(_estimated_anyway(state, find, of_trace, space)),
        max_steps=2 * num_rows // block,
        lower=("num_matvecs",),
        block=block,
    )


@functools.partial(jax.jit, static_argnames="block")
def _vectors(state: LeaveOneOutState, block: int) -> jax.Array:
    """The vectors that come next: probes, then the rows of Q."""
    count, num_rows = state.num_matvecs, state.rows.shape[0]
    start = count % num_rows
    of_probes, of_rows = take(state.probes, start, block), take(state.rows, start, block)
    return jnp.where(count < num_rows, of_probes, of_rows)


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
@precisely
def _absorbed(
    state: LeaveOneOutState, images: jax.Array, keeps_small: bool, space: Space
) -> LeaveOneOutState:
    count, num_rows, block = state.num_matvecs, state.rows.shape[0], images.shape[0]
    is_first, start = count < num_rows, count % num_rows

    def added(rows: jax.Array, new: jax.Array, is_wanted: jax.Array) -> jax.Array:
        return put(rows, jnp.where(is_wanted, new, take(rows, start, block)), start)

    new = inner_products(space, images, state.rows) if keeps_small else images
    kept = added(state.kept, new, ~is_first)
    return state._replace(
        rows=space.constrain(added(state.rows, images, is_first)),
        kept=kept if keeps_small else space.constrain(kept),
        num_matvecs=count + block,
    )


@functools.partial(jax.jit, static_argnames="space", donate_argnums=0)
@precisely
def _orthonormalized(state: LeaveOneOutState, space: Space) -> LeaveOneOutState:
    rows = space.orthonormal(state.rows)
    return state._replace(rows=rows, mixing=inner_products(space, rows, state.rows))


def _estimated_anyway(
    state: LeaveOneOutState, find: Find, of_trace: bool, space: Space
) -> Estimates:
    """The estimates; the error of a single sample is unknown, also where NaN are forbidden."""
    with jax.debug_nans(False):
        return _estimated(state, find, of_trace, space)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
@precisely
def _estimated(state: LeaveOneOutState, find: Find, of_trace: bool, space: Space) -> Estimates:
    """The estimates; before all products are made those of the probes alone."""
    num_rows = state.rows.shape[0]
    found = find(state, _small(state, space), space)
    images = state.mixing.T @ state.rows
    own = images if find is _of_squares else state.probes
    return combined(
        found,
        own * images,
        jnp.sum(state.probes**2, 1) if find is not _of_diagonal else None,
        num_matvecs=state.num_matvecs,
        is_finished=state.num_matvecs >= 2 * num_rows,
        of_trace=of_trace,
        space=space,
    )


def _small(state: LeaveOneOutState, space: Space) -> Small:
    num_rows, mixed = state.rows.shape[0], state.mixing.T
    along = inner_products(space, state.probes, state.rows)
    missing = _missing(state.mixing)
    share = jnp.sum(missing * along, 1)
    outside = jnp.sum(state.probes**2, 1) - jnp.sum(along**2, 1)
    squares = jnp.maximum(outside, 0) + share**2
    cosines = missing @ missing.T
    return Small(
        along=along,
        mixed=mixed,
        missing=missing,
        inside=along - share[:, None] * missing,
        squares=squares,
        factor=_numerics.divide(space.size - num_rows + 1, squares),
        cosines=cosines,
        scales=scales_of(1 - cosines**2),
    )


def _missing(mixing: jax.Array) -> jax.Array:
    """The normalised rows of the inverse; of a singular matrix in the limit of a regular one."""
    is_finite = jnp.all(jnp.isfinite(mixing))
    # The iteration does not end for NaN.
    left, values, right = jnp.linalg.svd(jnp.where(is_finite, mixing, 0))
    least = jnp.finfo(values.dtype).eps * values.size * values[0]
    least = jnp.where(least > 0, least, 1)
    rows = (right.T * (least / jnp.maximum(values, least))[None]) @ left.T
    return jnp.where(is_finite, _numerics.units_along(rows, (1,)), jnp.nan)


def _of_trace(state: LeaveOneOutState, small: Small, space: Space) -> Samples:
    matrix, missing = (state.kept + state.kept.T) / 2, small.missing
    quadratic = missing @ matrix @ missing.T
    own, share = jnp.diagonal(quadratic), jnp.sum(missing * small.along, 1)
    # P_i w_i is the part e outside of Q, and the share of Q s_i: e'A e, and Q'A e.
    rest = small.mixed - small.along @ matrix
    alone = -jnp.sum(small.along * rest, 1)
    energy = alone + 2 * share * jnp.sum(missing * rest, 1) + share**2 * own
    each = jnp.trace(matrix) - own + small.factor * energy

    # The same with Q b outside too.
    shares = small.second(small.along @ missing.T)
    image = rest + share[:, None] * (missing @ matrix)
    cross = small.second(image @ missing.T)
    second = small.scales**2 * (
        own[None] - 2 * small.cosines * quadratic + small.cosines**2 * own[:, None]
    )
    energies = energy[:, None] + 2 * shares * cross + shares**2 * second
    factors = _numerics.divide(space.size - len(own) + 2, small.squares[:, None] + shares**2)
    losses = second + (small.factor * energy)[:, None] - factors * energies
    losses = jnp.where(small.scales > 0, losses, 0)
    covariance = mean_of_pairs(losses)
    return Samples(each[:, None], jnp.trace(matrix)[None], covariance[None], covariance)


def _of_diagonal(state: LeaveOneOutState, small: Small, space: Space) -> Samples:
    del space
    vectors, images = small.missing @ state.rows, small.missing @ state.kept
    sizes = small.mixed @ small.missing.T
    second = small.second(sizes)
    own = jnp.diagonal(sizes)[:, None]
    exact = jnp.sum(state.rows * state.kept, 0)
    each = exact[None] - vectors * images + own * state.probes * vectors

    def loss(at: At, one: Rows, other: Rows) -> jax.Array:
        scale, cosine = at(small.scales), at(small.cosines)
        vector, image = (scale * (b - cosine * a) for a, b in zip(one[:2], other[:2], strict=True))
        return vector * image - at(second) * one[2] * vector

    return with_pairs(each, exact, loss, (vectors, images, state.probes))


def _of_squares(state: LeaveOneOutState, small: Small, space: Space) -> Samples:
    images = small.missing @ state.kept
    rest = small.mixed @ state.rows - small.inside @ state.kept
    exact = jnp.sum(state.kept**2, 0)
    each = exact[None] - images**2 + small.factor[:, None] * rest**2
    shares = small.second(small.along @ small.missing.T)
    factors = _numerics.divide(
        space.size - len(small.factor) + 2, small.squares[:, None] + shares**2
    )
    own = jnp.broadcast_to(small.factor[:, None], factors.shape)

    def loss(at: At, one: Rows, other: Rows) -> jax.Array:
        image = at(small.scales) * (other[0] - at(small.cosines) * one[0])
        after = at(factors) * (one[1] + at(shares) * image) ** 2
        return jnp.where(at(small.scales) > 0, image**2 + at(own) * one[1] ** 2 - after, 0)

    return with_pairs(each, exact, loss, (images, rest))
