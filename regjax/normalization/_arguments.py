"""What every normalization layer asks of its options, its inputs and its arrays."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks
from regjax.normalization._statistics import Groups

_MAX_AXES = 32  # NumPy's


def axes(name: str, value: int | Sequence[int]) -> tuple[int, ...]:
    """Returns one or several axes as a tuple of integers, none of them twice."""
    several = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    found = tuple(_checks.integer(name, axis, minimum=-_MAX_AXES) for axis in several)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"`{name}` must name different axes, one at least, got {value}.")
    return found


def axes_of(name: str, value: Sequence[int], ndim: int) -> tuple[int, ...]:
    """Returns axes of an array with `ndim` axes, from the first on."""
    for axis in value:
        if not -ndim <= axis < ndim:
            raise ValueError(f"`{name}` must be one of the inputs' {ndim} axes, got {axis}.")
    return tuple(sorted({axis % ndim for axis in value}))


def groups(value: Groups, axis_name: str | None) -> Groups:
    """Returns the groups of a mapped axis as tuples: lists do not hash, and flax hashes layers."""
    lists = (list, tuple)
    if not isinstance(value, lists) or not all(isinstance(group, lists) for group in value):
        raise TypeError(f"`axis_index_groups` must be a list of lists of indices, got {value!r}.")
    found = tuple(
        tuple(_checks.integer("axis_index_groups", i, minimum=0) for i in group) for group in value
    )
    if axis_name is None:
        raise ValueError("`axis_name` must be given with `axis_index_groups`, got None.")
    if len({len(group) for group in found}) != 1 or not found[0]:
        raise ValueError(f"`axis_index_groups` must be of one size, got {found}.")
    return found


def numbers(name: str, value: ArrayLike) -> jax.Array:
    """Returns `value` as an array if it is one of numbers."""
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, bool, int, float, complex)):
        raise TypeError(f"`{name}` must be an array, got {type(value).__name__}.")
    dtype = value.dtype if isinstance(value, (jax.Array, np.ndarray)) else np.result_type(value)
    if not (jnp.issubdtype(dtype, jnp.number) or jnp.issubdtype(dtype, jnp.bool_)):
        raise TypeError(f"`{name}` must hold numbers, got {dtype}.")
    return jnp.asarray(value)


def check_arrays(name: str, arrays: Mapping[str, ArrayLike], sizes: Mapping[str, int]) -> None:
    """Checks the names of a layer's arrays, and that they have the channels of the inputs."""
    if not isinstance(arrays, Mapping) or set(arrays) != set(sizes):
        found = sorted(arrays) if isinstance(arrays, Mapping) else type(arrays).__name__
        raise ValueError(f"`{name}` must be a mapping of {sorted(sizes)}, got {found}.")
    for key, array in arrays.items():
        if numbers(f"{name}['{key}']", array).size != sizes[key]:
            raise ValueError(
                f"`{name}['{key}']` must have the channels of the inputs, {sizes[key]}, got shape "
                f"{jnp.shape(array)}."
            )


def mask_of(mask: ArrayLike, shape: tuple[int, ...]) -> jax.Array:
    """Returns a mask with the rank of the inputs, whose shape it can be broadcast to."""
    mask = numbers("mask", mask)
    if jnp.issubdtype(mask.dtype, jnp.inexact):
        raise TypeError(f"`mask` must be boolean, got {mask.dtype}.")
    lengths = (1,) * (len(shape) - mask.ndim) + mask.shape
    fits = [length in (1, size) for length, size in zip(lengths, shape, strict=False)]
    if len(lengths) != len(shape) or not all(fits):
        raise ValueError(f"`mask` must be broadcastable to the inputs' {shape}, got {mask.shape}.")
    return mask.astype(bool).reshape(lengths)
