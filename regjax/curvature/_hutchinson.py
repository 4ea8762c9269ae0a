"""Hutchinson's estimator: the mean of z * A z over random signs z.

Its expectation is the diagonal of A, that of its sum the trace. The variance of an entry is the sum
of the squares of the others in its row.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _loops
from regjax._base import PRNGKey, Tree
from regjax._space import Space
from regjax.curvature._derivatives import Slopes, tangent_product
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


class Samples(NamedTuple):
    """What is known of z * A z: of its sums, and of its entries where these are wanted.

    Attributes:
      sums: moments of z' A z, ().
      entries: moments (length,); None where only the trace is wanted.
    """

    sums: Moments
    entries: Moments | None


class Estimates(NamedTuple):
    """Trace and diagonal from the same products.

    Attributes:
      trace: ().
      trace_standard_error: ().
      diagonal: (length,); () and 0 where only the trace is wanted.
      diagonal_standard_error: likewise.
      num_matvecs: (), int32.
    """

    trace: jax.Array
    trace_standard_error: jax.Array
    diagonal: jax.Array
    diagonal_standard_error: jax.Array
    num_matvecs: jax.Array


class HutchinsonState(NamedTuple):
    """The estimator between two products.

    Attributes:
      key: typed key of the signs to come.
      vectors: (block, length), random signs, which the next products take.
      samples: of z * A z.
    """

    key: PRNGKey
    vectors: jax.Array
    samples: Samples


Result = Callable[[Estimates], NamedTuple]
"""Estimates -> the result of the public function."""


def hutchinson_solver(
    operator: Operator,
    *,
    name: str,
    key: PRNGKey,
    num_matvecs: int,
    of_trace: bool,
    result: Result,
) -> Solver[HutchinsonState, NamedTuple]:
    """The solver of `trace` and `diagonal`.

    Args:
      operator: symmetric.
      name: of the public function.
      key: typed key of the random signs.
      num_matvecs: number of products, one for each sample.
      of_trace: whether only the trace is wanted.
      result: what becomes of the estimates.
    """
    space = operator.space
    # One at a time on CPU, where a block of vectors costs as much as its members.
    block = num_matvecs if operator.takes_blocks else 1

    def init() -> HutchinsonState:
        fresh_key, subkey = jax.random.split(jax.random.fold_in(key, 0))
        samples = no_samples(space, of_trace)
        return space.replicate(HutchinsonState(fresh_key, space.signs(subkey, block), samples))

    return Solver(
        name=name,
        operator=operator,
        arguments={"key": key, "num_matvecs": num_matvecs, "products at once": block},
        init=init,
        vectors=lambda state: state.vectors,
        update=lambda state, images: _update(state, images, space),
        done=lambda state: False,
        result=lambda state: result(estimated(state.samples, state.samples.sums.num_samples)),
        max_steps=num_matvecs // block,
        lower=("num_matvecs",),
        block=block,
    )


@functools.partial(jax.jit, static_argnums=2, donate_argnums=0)
@precisely
def _update(state: HutchinsonState, images: jax.Array, space: Space) -> HutchinsonState:
    key, subkey = jax.random.split(state.key)
    num_new = jnp.int32(images.shape[0])
    samples = with_samples(state.samples, state.vectors * images, num_new)
    return HutchinsonState(key, space.signs(subkey, images.shape[0]), samples)


def derivative(num_matvecs: int, operator: Operator, tangent: Slopes, key: PRNGKey) -> jax.Array:
    """The mean of z * dA z, a vector, over the same signs z."""
    block = num_matvecs if operator.takes_blocks else 1
    carry = jax.random.fold_in(key, 0), operator.space.zeros(1)[0]
    turn, operands = functools.partial(_add_block, block), (operator, tangent)
    _, total = _loops.scan(turn, carry, num_matvecs // block, operands=operands)
    return total / num_matvecs


def _add_block(block: int, operands: Tree, carry: Tree, i: jax.Array) -> Tree:
    del i
    (operator, tangent), (key, total) = operands, carry
    key, subkey = jax.random.split(key)
    signs = operator.space.signs(subkey, block)
    images = jax.vmap(functools.partial(tangent_product, operator, tangent))(signs)
    return key, total + jnp.sum(signs * images, 0)


def no_samples(space: Space, of_trace: bool) -> Samples:
    """What is known before the first sample."""
    zero, zeros = jnp.zeros((), space.dtype), None if of_trace else space.zeros(1)[0]
    entries = None if zeros is None else Moments(zeros, zeros.copy(), jnp.int32(0))
    return Samples(Moments(zero, zero.copy(), jnp.int32(0)), entries)


def with_samples(samples: Samples, new: jax.Array, num_new: jax.Array) -> Samples:
    """What is known with the first `num_new` of some samples (block, length)."""
    entries = None if samples.entries is None else _joined(samples.entries, new, num_new)
    return Samples(_joined(samples.sums, jnp.sum(new, 1), num_new), entries)


def estimated(samples: Samples, num_matvecs: jax.Array, exact: ArrayLike = 0) -> Estimates:
    """The estimates, with a vector that is known exactly and comes on top."""
    sums, entries = samples
    nothing = jnp.zeros_like(sums.mean)
    # Without a sample nothing is known, and with one no error, also where NaN are forbidden.
    with jax.debug_nans(False):
        return Estimates(
            trace=_mean(sums) + jnp.sum(jnp.asarray(exact, sums.mean.dtype)),
            trace_standard_error=standard_error(sums),
            diagonal=nothing if entries is None else _mean(entries) + exact,
            diagonal_standard_error=nothing if entries is None else standard_error(entries),
            num_matvecs=num_matvecs,
        )


def _joined(moments: Moments, samples: jax.Array, num_new: jax.Array) -> Moments:
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


def _mean(moments: Moments) -> jax.Array:
    """The mean; NaN without a sample, as before the first product."""
    return jnp.where(moments.num_samples > 0, moments.mean, jnp.nan)


def standard_error(moments: Moments) -> jax.Array:
    """Of the mean; NaN with a single sample."""
    count = moments.num_samples.astype(moments.squares.dtype)
    variance = moments.squares / jnp.maximum(count - 1, 1)
    error = jnp.sqrt(variance / jnp.maximum(count, 1))
    return jnp.where(count > 1, error, jnp.nan)
