"""Statistics that follow the weights in front of them, and weights with statistics of their own."""

from typing import Any

import jax
import jax.numpy as jnp

from regjax import _checks, _tree


def rescale_statistics(mean: Any, variance: Any, factor: Any) -> tuple[Any, Any]:
    """Running statistics after the kernel in front of the normalization was multiplied.

    They are in units of the pre-activation: without this, a rescaled network in evaluation mode is
    another network. A bias in front of the normalization has to be multiplied by `factor` too.

    Args:
      mean: (channels,), running mean.
      variance: (channels,), running variance.
      factor: number or (channels,), what each output channel of the kernel was multiplied by.

    Returns:
      (mean * factor, variance * factor^2), in the types of the arguments.
    """
    mean, variance = jnp.asarray(mean), jnp.asarray(variance)
    return (
        mean * jnp.asarray(factor, mean.dtype),
        variance * jnp.asarray(factor, variance.dtype) ** 2,
    )


def standardize_weight(kernel: jax.Array, *, epsilon: float = 1e-5) -> jax.Array:
    """(kernel - mean) / sqrt(variance + epsilon), for each output channel.

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
    if kernel.ndim < 2:
        raise ValueError(f"`kernel` must have at least two axes, got shape {kernel.shape}.")
    axes = _tree.group_axes(kernel, per_filter=True)
    centred = kernel - jnp.mean(kernel, axes, keepdims=True)
    variance = jnp.mean(centred**2, axes, keepdims=True)
    return centred * jax.lax.rsqrt(variance + epsilon)
