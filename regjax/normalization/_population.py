"""Statistics of the population: from many batches, into the layer before, behind a rescaled one."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _checks
from regjax.normalization import _statistics


def exact_population_statistics(
    batch_means: Any, batch_variances: Any, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Population mean and variance from those of many training batches of one size.

        mean = E[mean_B],   variance = m / (m - 1) E[variance_B]

    Args:
      batch_means: (batches, channels).
      batch_variances: (batches, channels), biased, as batch norm computes them.
      batch_size: values m behind each, examples times positions, at least 2.

    Returns:
      (mean, variance), (channels,) each.

    Raises:
      ValueError: `batch_size` is below 2, or the arrays have other shapes.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithm 2, line 10.
    """
    _checks.integer("batch_size", batch_size, minimum=2)
    means, variances = jnp.asarray(batch_means), jnp.asarray(batch_variances)
    if means.ndim != 2 or means.shape != variances.shape or not len(means):
        raise ValueError(
            "`batch_means` and `batch_variances` must both have shape (batches, channels), got "
            f"{means.shape} and {variances.shape}."
        )
    return jnp.mean(means, 0), _statistics.unbiased(jnp.mean(variances, 0), batch_size)


def fold_batch_norm(
    kernel: jax.Array,
    bias: jax.Array | None,
    scale: Any,
    shift: Any,
    mean: jax.Array,
    variance: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """The layer that does what a layer and a batch norm in evaluation mode behind it do.

        kernel' = kernel * f,   bias' = (bias - mean) * f + shift,   f = scale / sqrt(var + epsilon)

    Args:
      kernel: (..., channels), dense or convolution.
      bias: (channels,), or None for zero.
      scale: (channels,) or number.
      shift: (channels,) or number, the bias of the batch norm.
      mean: (channels,), running mean.
      variance: (channels,), running variance.
      epsilon: of the batch norm.

    Returns:
      (kernel', bias').

    Raises:
      ValueError: `epsilon` is negative.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithm 2, line 11.
    """
    _checks.non_negative("epsilon", epsilon)
    factor = scale * lax.rsqrt(variance + epsilon)
    offset = -mean if bias is None else bias - mean
    return kernel * jnp.broadcast_to(factor, kernel.shape), offset * factor + shift


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
