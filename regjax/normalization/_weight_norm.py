"""Kernels made of others: direction and length apart, or standardized, for each output unit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _tree
from regjax._base import Mask, Params, Tree


class SplitWeightResult(NamedTuple):
    """A kernel as direction and length.

        w = g v / |v|

    Attributes:
      v: like the kernel, its direction; its own length does not change w.
      g: (channels,), the length of each output unit's weights.
    """

    v: jax.Array
    g: jax.Array


def weight_normalize(v: jax.Array, g: jax.Array, *, axis: int = -1) -> jax.Array:
    """Makes a kernel of direction and length, one norm for each output unit.

        w = g v / |v|

    A zero column of v gives zero and has gradient zero.

    Args:
      v: (..., channels, ...), direction.
      g: (channels,), length.
      axis: of the channels; the norm goes over all others.

    Returns:
      An array like `v`.

    Raises:
      ValueError: `v` has no input axes, or `g` another shape.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868, equation 2.
    """
    _check_kernel("v", v)
    if jnp.shape(g) != (v.shape[axis],):
        raise ValueError(f"`g` must have shape {(v.shape[axis],)}, got {jnp.shape(g)}.")
    wide, others = _tree.wide(v), _others(v, axis)
    square = jnp.sum(wide**2, others, keepdims=True)
    # The norm has no derivative at zero.
    inverse = jnp.where(square == 0, 0, jax.lax.rsqrt(jnp.where(square == 0, 1, square)))
    factor = jnp.expand_dims(_tree.wide(g), others) * inverse
    return (wide * jnp.broadcast_to(factor, v.shape)).astype(v.dtype)


def split_weight(w: jax.Array, *, axis: int = -1) -> SplitWeightResult:
    """Splits a kernel into direction v = w and length g = |w|: the same kernel.

    Args:
      w: (..., channels, ...), kernel.
      axis: of the channels.

    Returns:
      A `SplitWeightResult`.

    Raises:
      ValueError: `w` has no input axes.
    """
    _check_kernel("w", w)
    return SplitWeightResult(
        w, jnp.sqrt(jnp.sum(_tree.wide(w) ** 2, _others(w, axis))).astype(w.dtype)
    )


def split_weights(params: Params, *, mask: Mask) -> Tree:
    """Splits the masked kernels into direction and length: weight norm for any model.

    `join_weights` is the inverse: `loss_fn(join_weights(params), *batch)`.

    Args:
      params: tree of parameters, output channels last.
      mask: tree of bools like it.

    Returns:
      A tree like `params` with a `SplitWeightResult` in the place of each masked kernel.

    Raises:
      ValueError: the mask is another tree, or a masked leaf has no input axes.
    """
    _checks.same_structure("mask", mask, params)
    return jax.tree.map(lambda leaf, split: split_weight(leaf) if split else leaf, params, mask)


def join_weights(params: Tree) -> Params:
    """Joins the split kernels of a tree from `split_weights`.

    Args:
      params: tree of parameters with `SplitWeightResult`s.

    Returns:
      The tree that the model knows.
    """
    is_split = lambda leaf: isinstance(leaf, SplitWeightResult)
    join = lambda leaf: weight_normalize(leaf.v, leaf.g) if is_split(leaf) else leaf
    return jax.tree.map(join, params, is_leaf=is_split)


def standardize_weight(kernel: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
    """Standardizes the weights of each output channel.

        (kernel - mean) / sqrt(variance + epsilon)

    A baseline for weight rescaling, applied inside of the forward pass: the gradient goes through.
    The form is the one in common use; the paper was not read.

    Args:
      kernel: (..., channels) with at least one input axis.
      epsilon: added to the variance, in units of the kernel squared, at least 0.

    Returns:
      An array like `kernel`; the variance is the mean squared deviation.

    Raises:
      ValueError: `kernel` has no input axes, or `epsilon` is negative.

    References:
      S. Qiao et al. (2019), arXiv:1903.10520.
    """
    _checks.non_negative("epsilon", epsilon)
    _check_kernel("kernel", kernel)
    axes = _tree.group_axes(kernel, per_filter=True)
    centred = kernel - jnp.mean(kernel, axes, keepdims=True)
    variance = jnp.mean(centred**2, axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)


def _others(array: jax.Array, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(array.ndim) if i != axis % array.ndim)


def _check_kernel(name: str, kernel: jax.Array) -> None:
    if jnp.ndim(kernel) < 2:
        raise ValueError(f"`{name}` must have at least two axes, got shape {jnp.shape(kernel)}.")
