"""Hutch++: what dominates exactly, only the rest by random signs.

With Q an orthonormal basis of A's image of s random vectors, the trace and the diagonal of QQ' A
are computed, and those of the remainder are sampled by u = (I - QQ') z: the mean of u * A u has the
expectation diag((I - QQ') A).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _loops
from regjax._base import PRNGKey
from regjax._space import Space
from regjax.curvature._engine._accumulation import inner_products
from regjax.curvature._engine._solver import Solver
from regjax.curvature._hutchinson import (
    Estimates,
    Result,
    Samples,
    estimated,
    no_samples,
    with_samples,
)
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely


class HutchPlusPlusState(NamedTuple):
    """The estimator between two products.

    Attributes:
      key: typed key of the signs to come.
      vectors: (block, length), what the next products take: signs, then the rows of Q, then signs
        outside of Q.
      rows: (s, length), first the images of random signs, then their orthonormal basis Q.
      images: (s, length), rows of (A Q)'.
      samples: of u * A u.
      num_matvecs: (), int32, products so far that count.
    """

    key: PRNGKey
    vectors: jax.Array
    rows: jax.Array
    images: jax.Array
    samples: Samples
    num_matvecs: jax.Array


def hutchpp_solver(
    operator: Operator,
    *,
    name: str,
    key: PRNGKey,
    num_matvecs: int,
    of_trace: bool,
    result: Result,
) -> Solver[HutchPlusPlusState, NamedTuple]:
    """The solver of `trace` and `diagonal`; arguments as of `hutchinson_solver`."""
    space = operator.space
    num_rows = min(num_matvecs // 3, space.size)
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = num_rows if operator.takes_blocks else 1

    def init() -> HutchPlusPlusState:
        fresh_key, subkey = jax.random.split(jax.random.fold_in(key, 0))
        state = HutchPlusPlusState(
            key=fresh_key,
            vectors=space.signs(subkey, block),
            rows=space.zeros(num_rows),
            images=space.zeros(num_rows),
            samples=no_samples(space, of_trace),
            num_matvecs=jnp.int32(0),
        )
        return space.replicate(state)

    def update(state: HutchPlusPlusState, images: jax.Array) -> HutchPlusPlusState:
        state = _absorbed(state, images, num_matvecs, space)
        state = _loops.cond(
            state.num_matvecs == num_rows, functools.partial(_orthonormalized, space=space), state
        )
        return _with_vectors(state, space)

    return Solver(
        name=name,
        operator=operator,
        arguments={"key": key, "num_matvecs": num_matvecs, "products at once": block},
        init=init,
        vectors=lambda state: state.vectors,
        update=update,
        done=lambda state: False,
        result=lambda state: result(_estimated_anyway(state)),
        max_steps=-(-num_matvecs // block),
        lower=("num_matvecs",),
        block=block,
    )


def _estimated_anyway(state: HutchPlusPlusState) -> Estimates:
    """The estimates; the error of a single sample is unknown, also where NaN are forbidden."""
    with jax.debug_nans(False):
        return _estimated(state)


# In one program, so that the products are added up as they are made.
@jax.jit
def _estimated(state: HutchPlusPlusState) -> Estimates:
    exact = jnp.sum(state.rows * state.images, axis=0)
    return estimated(state.samples, state.num_matvecs, exact)


@functools.partial(jax.jit, static_argnums=(2, 3), donate_argnums=0)
@precisely
def _absorbed(
    state: HutchPlusPlusState, images: jax.Array, num_matvecs: int, space: Space
) -> HutchPlusPlusState:
    count, num_rows, block = state.num_matvecs, state.rows.shape[0], images.shape[0]
    start = count % num_rows

    def put(rows: jax.Array, is_wanted: jax.Array) -> jax.Array:
        there = jax.lax.dynamic_slice_in_dim(rows, start, block)
        new = jnp.where(is_wanted, images, there)
        return space.constrain(jax.lax.dynamic_update_slice_in_dim(rows, new, start, 0))

    # Beyond the total the vectors of a block are idle.
    num_new = jnp.minimum(num_matvecs - count, block)
    sampled = with_samples(state.samples, state.vectors * images, num_new)
    is_sample = count >= 2 * num_rows
    return state._replace(
        rows=put(state.rows, count < num_rows),
        images=put(state.images, (count >= num_rows) & (count < 2 * num_rows)),
        samples=jax.tree.map(
            lambda new, old: jnp.where(is_sample, new, old), sampled, state.samples
        ),
        num_matvecs=jnp.minimum(count + block, num_matvecs),
    )


@functools.partial(jax.jit, static_argnames="space", donate_argnums=0)
@precisely
def _orthonormalized(state: HutchPlusPlusState, space: Space) -> HutchPlusPlusState:
    """With an orthonormal basis of the rows; directions at rounding level are harmless extras."""
    return state._replace(rows=space.orthonormal(state.rows))


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
@precisely
def _with_vectors(state: HutchPlusPlusState, space: Space) -> HutchPlusPlusState:
    """With the vectors that come next."""
    key, subkey = jax.random.split(state.key)
    num_rows, block = state.rows.shape[0], state.vectors.shape[0]
    signs = space.signs(subkey, block)
    start = jnp.clip(state.num_matvecs - num_rows, 0, num_rows - block)
    of_range = jax.lax.dynamic_slice_in_dim(state.rows, start, block)

    def outside(vector: jax.Array) -> jax.Array:
        return vector - inner_products(space, state.rows, vector) @ state.rows

    rest, stage = jax.vmap(outside)(signs), state.num_matvecs // num_rows
    vectors = jnp.where(stage == 0, signs, jnp.where(stage == 1, of_range, rest))
    return state._replace(key=key, vectors=vectors)
