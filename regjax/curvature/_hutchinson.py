"""Hutchinson's estimator: the mean of z * A z over random signs z.

Its expectation is the diagonal of A, that of its sum the trace. The variance of an entry is the sum
of the squares of the others in its row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax._base import PRNGKey
from regjax._space import Space
from regjax.curvature._engine._solver import Solver
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precisely


class Moments(NamedTuple):
    """The mean of samples that come in blocks, and what its standard error follows from.

    Attributes:
      mean: (length,) or (), over the samples so far.
      squares: the same shape, sum of squared deviations from the mean.
      num_samples: (), int32.
    """

    mean: jax.Array
    squares: jax.Array
    num_samples: jax.Array


class HutchinsonState(NamedTuple):
    """The estimator between two products.

    Attributes:
      key: typed key of the signs to come.
      vectors: (block, length), random signs, which the next products take.
      moments: of z * A z, or of its sums.
    """

    key: PRNGKey
    vectors: jax.Array
    moments: Moments


Estimate = Callable[[jax.Array, jax.Array, jax.Array], NamedTuple]
"""(value, its standard error, number of products) -> result."""


def hutchinson_solver(
    operator: Operator,
    *,
    name: str,
    key: PRNGKey,
    num_matvecs: int,
    of_trace: bool,
    estimate: Estimate,
) -> Solver[HutchinsonState, NamedTuple]:
    """The solver of `trace` and `diagonal`.

    Args:
      operator: symmetric.
      name: of the public function.
      key: typed key of the random signs.
      num_matvecs: number of products, one for each sample.
      of_trace: whether the samples are summed.
      estimate: what becomes of value and error, vectors of the space or numbers.
    """
    space = operator.space
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = num_matvecs if operator.takes_blocks else 1

    def init() -> HutchinsonState:
        fresh_key, subkey = jax.random.split(jax.random.fold_in(key, 0))
        moments = no_samples(space, of_trace)
        return space.replicate(HutchinsonState(fresh_key, space.signs(subkey, block), moments))

    def result(state: HutchinsonState) -> NamedTuple:
        moments = state.moments
        return estimate(moments.mean, standard_error(moments), moments.num_samples)

    return Solver(
        name=name,
        operator=operator,
        arguments={"key": key, "num_matvecs": num_matvecs, "products at once": block},
        init=init,
        vectors=lambda state: state.vectors,
        update=lambda state, images: _update(state, images, space),
        done=lambda state: False,
        result=result,
        max_steps=num_matvecs // block,
        lower=("num_matvecs",),
        block=block,
    )


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
@precisely
def _update(state: HutchinsonState, images: jax.Array, space: Space) -> HutchinsonState:
    key, subkey = jax.random.split(state.key)
    num_new = jnp.int32(images.shape[0])
    moments = with_samples(state.moments, state.vectors * images, num_new)
    return HutchinsonState(key, space.signs(subkey, images.shape[0]), moments)


def no_samples(space: Space, of_trace: bool) -> Moments:
    """The moments before the first sample."""
    zeros = jnp.zeros((), space.dtype) if of_trace else space.zeros(1)[0]
    return Moments(zeros, zeros.copy(), jnp.int32(0))


def with_samples(moments: Moments, samples: jax.Array, num_new: jax.Array) -> Moments:
    """The moments with the first `num_new` of some samples (block, length)."""
    if moments.mean.ndim == 0:
        samples = jnp.sum(samples, 1)
    is_new = jnp.arange(samples.shape[0], dtype=jnp.int32) < num_new
    is_new = is_new.reshape(-1, *[1] * moments.mean.ndim)
    before, new = (count.astype(samples.dtype) for count in (moments.num_samples, num_new))
    mean = jnp.sum(jnp.where(is_new, samples, 0), 0) / new
    squares = jnp.sum(jnp.where(is_new, (samples - mean[None]) ** 2, 0), 0)
    # T. Chan, G. Golub, R. LeVeque (1983), of two parts.
    deviation = mean - moments.mean
    return Moments(
        mean=moments.mean + deviation * new / (before + new),
        squares=moments.squares + squares + deviation**2 * before * new / (before + new),
        num_samples=moments.num_samples + num_new,
    )


def standard_error(moments: Moments) -> jax.Array:
    """Of the mean; NaN with a single sample."""
    count = moments.num_samples.astype(moments.squares.dtype)
    variance = moments.squares / jnp.maximum(count - 1, 1)
    error = jnp.sqrt(variance / jnp.maximum(count, 1))
    return jnp.where(count > 1, error, jnp.nan)
