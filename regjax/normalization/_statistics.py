"""Moments of a batch: one pass, in float32 at least, with one collective under a mapped axis."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _tree


class Moments(NamedTuple):
    """Mean and variance over some axes, which are kept with length one.

    Attributes:
      mean: the mean.
      variance: the biased variance, the mean squared deviation.
      num_values: Python integer, the number of values behind each, over all devices.
      reference: a constant near the mean.
      shift: mean - reference, without the rounding of a large mean.
    """

    mean: jax.Array
    variance: jax.Array
    num_values: int
    reference: jax.Array
    shift: jax.Array


def moments(inputs: jax.Array, axes: Sequence[int], *, axis_name: str | None = None) -> Moments:
    """Computes mean and biased variance over `axes`, and over the devices of a mapped axis.

        d = x - x_0;   mean = x_0 + E[d];   variance = E[d^2] - E[d]^2

    x_0 is the first value along `axes`: the result does not depend on it, but rounding does. With
    x_0 = 0 values far from zero would cancel. Over devices the means and variances are merged, so
    that nothing cancels there either (T. Chan, G. Golub, R. LeVeque, 1983).

    Args:
      inputs: floating point array.
      axes: those to reduce.
      axis_name: of a mapped axis (`shard_map`, `vmap`); None under plain `jit`, where sharded
        inputs give the global moments by themselves.

    Returns:
      `Moments` in float32 at least.
    """
    inputs, axes = _tree.wide(inputs), tuple(axis % jnp.ndim(inputs) for axis in axes)
    reference = first(inputs, axes)
    difference = inputs - reference
    shift = jnp.mean(difference, axes, keepdims=True)
    square = jnp.mean(difference**2, axes, keepdims=True)
    num_values = inputs.size // shift.size if shift.size else 0
    found = from_shifted(reference, shift, square, num_values)
    if axis_name is None:
        return found
    means, variances = gather(axis_name, found.mean, found.variance)
    mean = jnp.mean(means, 0)
    variance = jnp.mean(variances, 0) + jnp.mean((means - mean[None]) ** 2, 0)
    num_values *= int(lax.psum(1, axis_name))
    return Moments(mean, variance, num_values, reference, mean - reference)


def from_shifted(
    reference: jax.Array, shift: jax.Array, square: jax.Array, num_values: int
) -> Moments:
    """Computes the moments of x from E[d] = `shift` and E[d^2] = `square`, d = x - reference."""
    variance = jnp.maximum(square - shift**2, 0)
    return Moments(reference + shift, variance, num_values, reference, shift)


def first(inputs: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Takes the first value along `axes`, which are kept; a constant to the derivative."""
    index = tuple(slice(0, 1) if i in axes else slice(None) for i in range(inputs.ndim))
    return lax.stop_gradient(inputs[index])


def gather(axis_name: str, *arrays: jax.Array) -> jax.Array:
    """Gathers arrays of all devices along a new axis, behind one of the arrays: one collective."""
    return jnp.moveaxis(lax.all_gather(jnp.stack(arrays), axis_name), 1, 0)


def root(square: jax.Array) -> jax.Array:
    """Takes the square root, with the derivative 0 at zero, where it has none."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def unbiased(variance: jax.Array, count: int) -> jax.Array:
    """Multiplies the variance by count / (count - 1); as it is where there is only one value."""
    return variance * (count / (count - 1)) if count > 1 else variance
