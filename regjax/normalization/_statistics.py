"""Moments of a batch: one pass, where a mask holds, and over the devices of a mapped axis."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from regjax._one_program import one_program

Groups: TypeAlias = Sequence[Sequence[int]]
"""Indices along a mapped axis, one list for each group that shares its statistics."""


# Numbers in a row beyond which XLA on CPU is slow to sum rows.
_LONG_ROW = 16_384


class Moments(NamedTuple):
    """Mean and variance over some axes, which are kept with length one.

    Attributes:
      mean: the mean.
      variance: the biased variance, the mean squared deviation; NaN where it overflows.
      num_values: the number of values behind each, over all devices: a Python integer, or an array
        with a mask.
      reference: a constant near the mean.
      shift: mean - reference, without the rounding of a large mean.
    """

    mean: jax.Array
    variance: jax.Array
    num_values: int | jax.Array
    reference: jax.Array
    shift: jax.Array


class Devices(NamedTuple):
    """The devices that share their statistics.

    Attributes:
      axis_name: of a mapped axis (`shard_map`, `vmap`); None under plain `jit`, where sharded
        inputs give the global moments by themselves.
      axis_index_groups: those of them that belong together; None: all.
    """

    axis_name: str | None = None
    axis_index_groups: Groups | None = None

    def size(self) -> int:
        """Returns how many they are."""
        if self.axis_name is None:
            return 1
        if self.axis_index_groups is not None:
            return len(self.axis_index_groups[0])
        return int(lax.psum(1, self.axis_name))

    def gather(self, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        """Stacks arrays of one shape over all devices, in one collective: (devices, ...) each.

        The first is complex if any is.
        By a sum, whose outcome is known to be the same on all devices; `all_gather`'s is not.
        """
        if self.axis_name is None:
            return tuple(array[None] for array in arrays)
        size, index = self.size(), lax.axis_index(self.axis_name)
        if self.axis_index_groups is not None:
            index = jnp.argmax(jnp.any(jnp.asarray(self.axis_index_groups) == index, 0))
        row = jnp.stack([array.astype(arrays[0].dtype) for array in arrays])
        rows = jnp.zeros((size, *row.shape), row.dtype).at[index].set(row)
        rows = lax.psum(rows, self.axis_name, axis_index_groups=self.axis_index_groups)
        real = lambda array: jnp.iscomplexobj(rows) and not jnp.iscomplexobj(array)
        return tuple(rows[:, i].real if real(a) else rows[:, i] for i, a in enumerate(arrays))


ALONE = Devices()


def moments(
    inputs: jax.Array,
    axes: Sequence[int],
    *,
    devices: Devices = ALONE,
    mask: jax.Array | None = None,
    use_fast_variance: bool = True,
    num_groups: int | None = None,
) -> Moments:
    """Computes mean and biased variance over `axes`, and over devices.

        d = x - x_0;   mean = x_0 + E[d];   variance = E[|d|^2] - |E[d]|^2

    x_0 is one of the first two values along `axes`: the result does not depend on it, but rounding
    does. With x_0 = 0 values far from zero would cancel. Over devices the means and variances are
    merged, so that nothing cancels there either (T. Chan, G. Golub, R. LeVeque, 1983).

    Args:
      inputs: real or complex floating point array; the sums are of its type.
      axes: those to reduce.
      devices: those that share the statistics.
      mask: bool, of the rank of `inputs` and broadcastable to them, which values count.
      use_fast_variance: whether x_0 is such a value; else it is the mean, in a second pass, as it
        is with a mask: that does not cancel where the first values are outliers either.
      num_groups: groups of entries of the last axis, which is none of `axes`; a group shares its
        statistics, and the last axis of these is that of the groups. None: each entry has its own.

    Returns:
      `Moments`; NaN where a mask leaves no value.
    """
    axes = tuple(axis % inputs.ndim for axis in axes)
    # Axes first, which is most of the work.
    pooled = lambda reduce, values: _over_group(reduce, _over(reduce, values, axes), num_groups)
    count = None
    if mask is not None:
        counted = jnp.broadcast_to(mask, inputs.shape).astype(jnp.finfo(inputs.dtype).dtype)
        count = pooled(jnp.sum, counted)

    def mean_of(values: jax.Array) -> jax.Array:
        if count is None:
            return pooled(jnp.mean, values)
        return pooled(jnp.sum, values) / jnp.maximum(count, 1)

    # A value that does not count may be NaN, and its derivative with it.
    counting = lambda values: values if mask is None else jnp.where(mask, values, 0)
    if use_fast_variance and mask is None:
        reference = _over_group(jnp.mean, near(inputs, axes), num_groups)
    else:
        reference = lax.stop_gradient(mean_of(counting(inputs)))
    difference = counting(inputs - of_channels(reference, inputs.shape[-1]))
    shift, square = mean_of(difference), mean_of(squared(difference))
    each = inputs.size // shift.size if inputs.size else 0
    found = from_shifted(reference, shift, square, each if count is None else count)
    return _over_devices(found, devices)


def mean(
    values: jax.Array,
    axes: Sequence[int],
    *,
    devices: Devices = ALONE,
    mask: jax.Array | None = None,
) -> jax.Array:
    """Computes the mean of values of one sign, which do not cancel, over `axes` and over devices.

    NaN where a mask leaves no value. XLA sums them in the pass that makes them.
    """
    axes = tuple(axes)
    if mask is None:
        return jnp.mean(devices.gather(jnp.mean(values, axes, keepdims=True))[0], 0)
    counted = jnp.broadcast_to(mask, values.shape).astype(values.dtype)
    sums = (jnp.where(mask, values, 0), counted)
    total, count = (
        jnp.sum(parts, 0)
        for parts in devices.gather(*(jnp.sum(part, axes, keepdims=True) for part in sums))
    )
    return jnp.where(count > 0, total / jnp.maximum(count, 1), jnp.nan)


def from_shifted(
    reference: jax.Array, shift: jax.Array, square: jax.Array, num_values: int | jax.Array
) -> Moments:
    """Computes the moments of x from E[d] and E[|d|^2] = `square`, d = x - reference."""
    variance = jnp.maximum(square - squared(shift), 0)
    return Moments(reference + shift, variance, num_values, reference, shift)


def _over_devices(found: Moments, devices: Devices) -> Moments:
    mean, variance, num_values, reference, shift = found
    if devices.axis_name is not None:
        has_mask = not isinstance(num_values, int)
        counted = [jnp.asarray(num_values)] if has_mask else []
        means, variances, *counts = devices.gather(mean, variance, *counted)
        share = (
            counts[0] / jnp.maximum(jnp.sum(counts[0], 0, keepdims=True), 1)
            if has_mask
            else 1 / len(means)
        )
        mean = jnp.sum(share * means, 0)
        variance = jnp.sum(share * (variances + squared(means - mean[None])), 0)
        num_values = jnp.sum(counts[0], 0) if has_mask else num_values * devices.size()
        shift = mean - reference
    variance = jnp.where(jnp.isfinite(variance), variance, jnp.nan)
    if isinstance(num_values, int):
        return Moments(mean, variance, num_values, reference, shift)
    exists = num_values > 0
    mean, variance, shift = (jnp.where(exists, a, jnp.nan) for a in (mean, variance, shift))
    return Moments(mean, variance, num_values, reference, shift)


def _over_group(
    reduce: Callable[..., jax.Array], values: jax.Array, num_groups: int | None
) -> jax.Array:
    """Reduces the groups of the last axis."""
    if num_groups is None:
        return values
    return reduce(values.reshape(*values.shape[:-1], num_groups, -1), -1)


def of_channels(values: ArrayLike, num_channels: int) -> ArrayLike:
    """Repeats what each group of the last axis has for the channels of the group."""
    if not jnp.ndim(values) or jnp.shape(values)[-1] == num_channels:
        return values
    array = jnp.asarray(values)
    *shape, num_groups = array.shape
    repeated = jnp.broadcast_to(array[..., None], (*array.shape, num_channels // num_groups))
    return repeated.reshape(*shape, num_channels)


def near(inputs: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Takes a value along `axes`, which are kept: the larger of the first two; a constant.

    A maximum, which is computed once. XLA computes a slice of what was computed from the inputs
    again for each of them.
    """
    longer = next((axis for axis in axes if inputs.shape[axis] > 1), None)
    length = lambda axis: (2 if axis == longer else 1) if axis in axes else None
    index = tuple(slice(length(axis)) for axis in range(inputs.ndim))
    return jnp.max(lax.stop_gradient(inputs[index]), tuple(axes), keepdims=True)


def _over(reduce: Callable[..., jax.Array], values: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Takes the sum or the mean over `axes`, which are kept; of long rows as a product.

    XLA on CPU takes 20 to 250 times as long for the sum of rows beyond 16,384 numbers.
    """
    if axes != (0,) or not _is_long(values.shape):
        return reduce(values, axes, keepdims=True)
    length = len(values)
    weights = jnp.full(length, 1 if reduce is jnp.sum else 1 / length, values.dtype)
    total = jnp.tensordot(weights, values.reshape(length, -1), 1, precision="highest")
    return total.reshape(1, *values.shape[1:])


def spread(array: ArrayLike, shape: tuple[int, ...]) -> ArrayLike:
    """Broadcasts long rows along the leading axis, so that the derivative is such a product too."""
    if jnp.shape(array) != (1, *shape[1:]) or not _is_long(shape):
        return array  # which the operation broadcasts
    row = jnp.ravel(array)
    product = jnp.tensordot(jnp.ones(shape[0], row.dtype), row, 0, precision="highest")
    return product.reshape(shape)


def _is_long(shape: tuple[int, ...]) -> bool:
    return shape[0] > 1 and math.prod(shape[1:]) > _LONG_ROW


def squared(array: jax.Array) -> jax.Array:
    """Computes |x|^2 of real or complex numbers."""
    return array.real**2 + array.imag**2 if jnp.iscomplexobj(array) else array**2


@one_program()
def root(square: jax.Array) -> jax.Array:
    """Takes the square root, with the derivative 0 at zero, where it has none."""
    is_zero = square == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def unbiased(variance: jax.Array, count: int | jax.Array) -> jax.Array:
    """Multiplies the variance by count / (count - 1); as it is where there is only one value."""
    if isinstance(count, int):
        return variance * (count / (count - 1)) if count > 1 else variance
    return variance * jnp.where(count > 1, count / jnp.maximum(count - 1, 1), 1)
