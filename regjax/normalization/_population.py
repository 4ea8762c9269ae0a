"""Statistics of the population: from many batches, into the layer before, behind a rescaled one."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from regjax import _checks, _layouts
from regjax._arguments import checked
from regjax._axes import Layout
from regjax.normalization import _statistics


@checked
def exact_population_statistics(
    batch_means: ArrayLike, batch_variances: ArrayLike, *, num_values: int
) -> tuple[jax.Array, jax.Array]:
    """Estimates mean and variance of the population from those of many batches of equal size.

        mean = E[mean_B],   variance = m / (m - 1) E[variance_B]

    Example:
      >>> batch_means, batch_variances = jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [4.0]])
      >>> mean, variance = normalization.exact_population_statistics(
      ...     batch_means, batch_variances, num_values=4
      ... )
      >>> print(mean, variance)
      [2.] [4.]

    Args:
      batch_means: (batches, channels).
      batch_variances: (batches, channels), biased, as batch norm computes them.
      num_values: m, the number of values in each batch and channel: examples times positions, at
        least 2.

    Returns:
      (mean, variance), (channels,) each.

    Raises:
      ValueError: `num_values` is below 2, or the arrays have other shapes.
      TypeError: an array is not real floating point.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithm 2, line 10.
    """
    _checks.integer("num_values", num_values, minimum=2)
    means = _checks.floating_array("batch_means", batch_means)
    variances = _checks.floating_array("batch_variances", batch_variances)
    if means.ndim != 2 or means.shape != variances.shape or not len(means):
        raise ValueError(
            "`batch_means` and `batch_variances` must both have shape (batches, channels), got "
            f"{means.shape} and {variances.shape}."
        )
    return jnp.mean(means, 0), _statistics.unbiased(jnp.mean(variances, 0), num_values)


@checked
def fold_batch_norm(
    kernel: jax.Array,
    bias: jax.Array | None,
    norm_scale: ArrayLike,
    norm_bias: ArrayLike,
    mean: jax.Array,
    variance: jax.Array,
    *,
    epsilon: float,
    layout: Layout | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Combines a layer and the batch norm that follows it into one layer, for evaluation.

        kernel' = kernel * f,   bias' = (bias - mean) * f + norm_bias
        f = norm_scale / sqrt(variance + epsilon)

    Example:
      >>> kernel, mean, variance = jnp.array([[1.0], [2.0]]), jnp.array([1.0]), jnp.array([4.0])
      >>> kernel, bias = normalization.fold_batch_norm(
      ...     kernel, None, 3.0, 0.5, mean, variance, epsilon=0.0
      ... )
      >>> print(kernel.ravel(), bias)  # the kernel times 3 / sqrt(4), and 0.5 - 3 / sqrt(4)
      [1.5 3. ] [-1.]

    Args:
      kernel: (inputs, channels), dense or convolution, or as `layout` says.
      bias: (channels,), or None for zero. For stacked layers this and the arrays below are (layers,
        channels), in the order of the kernel's axes.
      norm_scale: (channels,) or a number, the scale of the batch norm.
      norm_bias: (channels,) or a number, its bias.
      mean: (channels,), running mean.
      variance: (channels,), running variance.
      epsilon: that of the batch norm.
      layout: which axes of the kernel are inputs, channels and layers; None: the channels are last.

    Returns:
      (kernel', bias').

    Raises:
      ValueError: `epsilon` is negative, or an array has not the channels of the kernel.
      TypeError: an array is not real floating point.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithm 2, line 11.
    """
    _checks.number("epsilon", epsilon)
    kernel = _checks.floating_array("kernel", kernel)
    axes = _layouts.of_array("kernel", layout, kernel)
    channels = tuple(kernel.shape[axis] for axis in axes.units)
    for name, array, shapes in (
        ("bias", bias, (channels,)), ("mean", mean, (channels,)),
        ("variance", variance, (channels,)), ("norm_scale", norm_scale, (channels, ())),
        ("norm_bias", norm_bias, (channels, ())),
    ):  # fmt: skip
        if name != "bias" or bias is not None:
            _check_channels(name, array, shapes)
    factor = norm_scale * lax.rsqrt(variance + epsilon)
    offset = -mean if bias is None else bias - mean
    return kernel * axes.spread(factor, kernel.shape), offset * factor + norm_bias


@checked
def rescale_statistics(
    mean: ArrayLike, variance: ArrayLike, *, factor: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Rescales running statistics after the kernel before the normalization was rescaled.

    Running statistics are in units of the pre-activation. Without this correction a rescaled
    network computes something else in evaluation mode. Multiply a bias before the normalization by
    `factor` too.

    Example:
      >>> mean, variance = jnp.array([1.0]), jnp.array([2.0])
      >>> mean, variance = normalization.rescale_statistics(mean, variance, factor=3.0)
      >>> print(mean, variance)  # for three times the kernel
      [3.] [18.]

    Args:
      mean: (channels,), running mean.
      variance: (channels,), running variance.
      factor: number or (channels,) by which each output channel of the kernel was multiplied.

    Returns:
      (mean * factor, variance * factor^2), in the types of the arguments.

    Raises:
      ValueError: the arrays have other shapes, or `factor` is not finite.
      TypeError: an array is not real floating point.
    """
    mean = _checks.floating_array("mean", mean)
    variance = _checks.floating_array("variance", variance)
    _check_channels("variance", variance, (mean.shape,))
    _check_channels("factor", factor, (mean.shape, ()))
    _checks.finite_tree("factor", factor)
    return (
        mean * jnp.asarray(factor, mean.dtype),
        variance * jnp.asarray(factor, variance.dtype) ** 2,
    )


def _check_channels(
    name: str, array: ArrayLike | None, shapes: tuple[tuple[int, ...], ...]
) -> None:
    if array is None:
        raise TypeError(f"`{name}` must be an array, got None.")
    shape = _checks.floating_array(name, array).shape
    if shape not in shapes:
        allowed = " or ".join(map(str, shapes))
        raise ValueError(f"`{name}` must have shape {allowed}, got {shape}.")
