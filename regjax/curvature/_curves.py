"""Densities as curves: a discrete measure seen through a Gaussian of stated width."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _checks
from regjax.curvature._measure import DensityResult, spectral_sum

_SCALES = ("linear", "symlog")


class DensityCurveResult(NamedTuple):
    """A spectral density on a grid.

    Attributes:
      grid: (num_points,), eigenvalues.
      density: (num_points,), mass per unit of the eigenvalue.
      standard_error: (num_points,), of the density, over the draw of the probes.
      kernel_width: (), standard deviation of the Gaussian: in units of the eigenvalue on a linear
        scale, of asinh(eigenvalue / linear_threshold) on a symmetric-log scale.
    """

    grid: jax.Array
    density: jax.Array
    standard_error: jax.Array
    kernel_width: jax.Array


def density_grid(
    density: DensityResult,
    *,
    num_points: int = 512,
    axis_scale: str = "linear",
    linear_threshold: float | None = None,
    margin: float = 0.05,
) -> jax.Array:
    """Spaces a grid over all nodes and eigenvalues of `density`, with a margin on both sides.

    Args:
      density: from `spectral_density`; concrete arrays.
      num_points: number of grid points.
      axis_scale: "linear", or "symlog" for equal steps in asinh(eigenvalue / linear_threshold).
      linear_threshold: positive, in units of the eigenvalue; None takes 1e-3 of the largest
        magnitude. Ignored on a linear scale.
      margin: share of the (transformed) range added at each end.

    Returns:
      Ascending eigenvalues (num_points,).

    Raises:
      ValueError: `axis_scale` is unknown or a number is out of range.
    """
    _checks.integer("num_points", num_points, minimum=2)
    _checks.non_negative("margin", margin)
    support = _transform(_support(density), _threshold(density, axis_scale, linear_threshold))
    low, high = np.min(support), np.max(support)
    room = margin * (high - low) or 1.0
    grid = np.linspace(low - room, high + room, num_points)
    return jnp.asarray(
        _inverse(grid, _threshold(density, axis_scale, linear_threshold)), density.nodes.dtype
    )


def evaluate_density(
    density: DensityResult,
    grid: Any,
    *,
    kernel_width: float | None = None,
    axis_scale: str = "linear",
    linear_threshold: float | None = None,
) -> DensityCurveResult:
    """Computes the density on a grid, every node and eigenvalue a Gaussian of the same width.

    On the symmetric-log scale the Gaussian is one in t = asinh(x / linear_threshold), and the
    density is still per unit of x (the kernel times dt/dx), so that it integrates to 1 over x.

    Args:
      density: from `spectral_density`.
      grid: eigenvalues (num_points,).
      kernel_width: positive standard deviation in units of x (linear) or t (symlog). None takes
        1 % of the range of the (transformed) nodes and eigenvalues.
      axis_scale: "linear" or "symlog".
      linear_threshold: as in `density_grid`.

    Returns:
      A `DensityCurveResult`.

    Raises:
      ValueError: `axis_scale` is unknown or a number is out of range.
    """
    threshold = _threshold(density, axis_scale, linear_threshold)
    if kernel_width is None:
        support = _transform(_support(density), threshold)
        kernel_width = 0.01 * float(np.ptp(support)) or 1.0
    _checks.positive("kernel_width", kernel_width)
    grid = jnp.asarray(grid, density.nodes.dtype)
    points = _transform(grid, threshold)
    slope = jnp.ones_like(grid)
    if threshold is not None:
        slope = 1 / jnp.sqrt(jnp.square(grid) + threshold**2)

    def kernel(values: jax.Array) -> jax.Array:
        places = jnp.expand_dims(_transform(values, threshold), -1)
        one_each = (1,) * values.ndim + (-1,)
        distance = (points.reshape(one_each) - places) / kernel_width
        height = slope.reshape(one_each) / (kernel_width * np.sqrt(2 * np.pi))
        return height * jnp.exp(-0.5 * jnp.square(distance))

    total, size = spectral_sum(density, kernel), density.size.astype(grid.dtype)
    return DensityCurveResult(
        grid=grid,
        density=total.value / size,
        standard_error=total.standard_error / size,
        kernel_width=jnp.asarray(kernel_width, grid.dtype),
    )


def _support(density: DensityResult) -> np.ndarray:
    taken = np.asarray(density.eigenvalues)[np.asarray(density.eigenvalue_weights) > 0]
    return np.concatenate([np.asarray(density.nodes).ravel(), taken])


def _threshold(density: DensityResult, axis_scale: str, given: float | None) -> float | None:
    """None on a linear scale, else the eigenvalue below which the scale is nearly linear."""
    if _checks.choice("axis_scale", axis_scale, _SCALES) == "linear":
        return None
    if given is not None:
        return _checks.positive("linear_threshold", given)
    return 1e-3 * float(np.max(np.abs(_support(density)))) or 1.0


def _transform(values: Any, threshold: float | None) -> Any:
    return values if threshold is None else jnp.arcsinh(values / threshold)


def _inverse(points: Any, threshold: float | None) -> Any:
    return points if threshold is None else threshold * np.sinh(points)
