"""A spectrum as a discrete measure, and sums over it with their standard errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _numerics
from regjax._arguments import checked
from regjax.curvature._precision import precisely


class DensityResult(NamedTuple):
    """A discrete measure of mass 1 on the eigenvalues; P probes, m steps, n the order.

    Attributes:
      nodes: (P, m), nodes of Gauss quadrature in the complement, in the units of the matrix; a
        probe that made fewer steps repeats its last one.
      weights: (P, m), their mass, 0 for repeats; sums to (n - num_eigenvalues) / n.
      alphas: (P, m), diagonal of the Lanczos matrix T of each probe, 0 beyond its `num_steps`.
      betas: (P, m), off-diagonal of T; the last one leads to the step that was not made. With
        `alphas`, all that is known of the measure of a probe: see `eigenvalue_count`.
      num_steps: (P,), int32, Lanczos steps of each probe, 0 for one that was not finished.
      node_error_bound: (), what rounding may move an eigenvalue by, as it is added to the residual
        norms of `top_eigenpairs`.
      eigenvalues: (r,), the eigenvalues taken out, descending, 0 beyond `num_eigenvalues`.
      eigenvalue_weights: (r,), 1/n each, 0 beyond `num_eigenvalues`.
      residual_norms: (r,), ||A v - value v|| of the pairs taken out, 0 beyond.
      num_eigenvalues: (), int32, number of eigenvalues taken out.
      trace: (), sum of the eigenvalues.
      trace_standard_error: (), of `trace`, over the draw of the probes.
      num_matvecs: (), int32, products used.
      size: (), n: int32, or from 2^31 on of the type of `weights`.
    """

    nodes: jax.Array
    weights: jax.Array
    alphas: jax.Array
    betas: jax.Array
    num_steps: jax.Array
    node_error_bound: jax.Array
    eigenvalues: jax.Array
    eigenvalue_weights: jax.Array
    residual_norms: jax.Array
    num_eigenvalues: jax.Array
    trace: jax.Array
    trace_standard_error: jax.Array
    num_matvecs: jax.Array
    size: jax.Array


class SpectralSumResult(NamedTuple):
    """A sum over the eigenvalues.

    Attributes:
      value: (...), sum over i of f(lambda_i).
      standard_error: (...), over the draw of the probes.
    """

    value: jax.Array
    standard_error: jax.Array


def dimension_left(size: int, count: jax.Array, dtype: Any) -> jax.Array:
    """Dimension of the complement of `count` vectors among `size`, which may be above 2^31."""
    return jnp.asarray(float(size), dtype) - count.astype(dtype)


@precisely
def spectral_sum(
    density: DensityResult, function: Callable[[jax.Array], jax.Array]
) -> SpectralSumResult:
    """Computes the sum over the eigenvalues of `function`, with the standard error of the probes.

    For a probe v uniform on the unit sphere of d dimensions, v' B v has the variance
    2 / (d + 2) (tr(B B)/d - (tr B/d)^2). Both traces are moments of the density itself, so that
    one probe is enough for an error.

    Args:
      density: from `spectral_density`.
      function: elementwise, real eigenvalues (...,) -> values (..., *shape).

    Returns:
      A `SpectralSumResult` of arrays of `shape`. The error leaves out what quadrature (m steps)
      does not resolve of `function`: nothing for polynomials of degree below 2 m.
    """
    inside = density.eigenvalue_weights > 0
    values = function(jnp.where(inside, density.eigenvalues, 0.0))
    inside = inside.reshape(inside.shape + (1,) * (values.ndim - 1))
    exact = jnp.sum(jnp.where(inside, values, 0.0), axis=0)

    dimension = density.size.astype(values.dtype) - density.num_eigenvalues.astype(values.dtype)
    mass = jnp.sum(density.weights)
    weights = density.weights / jnp.where(mass == 0, 1, mass)
    sampled = function(density.nodes)
    mean = jnp.tensordot(weights, sampled, axes=2)
    # Of numbers near 1, so that their squares are numbers.
    power = _numerics.power_of_two(jnp.max(jnp.abs(sampled)))
    power = jnp.where(power > 0, power, 1)
    squares = jnp.square(power * (sampled - mean[None, None]))
    variance = jnp.tensordot(weights, squares, axes=2)
    num_probes = jnp.sum(jnp.any(density.weights > 0, axis=1)).astype(values.dtype)
    per_probe = 2 * variance / ((dimension + 2) * jnp.maximum(num_probes, 1))
    error = dimension * jnp.sqrt(per_probe) / power
    return SpectralSumResult(exact + dimension * mean, error)


def share_error(share: jax.Array, dimension: jax.Array, num_probes: ArrayLike) -> jax.Array:
    """The standard error of a share of the eigenvalues in `dimension` dimensions.

    It is that of `spectral_sum` for a projector: the mass of a probe in a subspace has a Beta
    distribution.
    """
    count = jnp.asarray(num_probes, share.dtype)
    return jnp.sqrt(2 * share * (1 - share) / ((dimension + 2) * jnp.maximum(count, 1)))


@checked
def effective_dimension(density: DensityResult, damping: ArrayLike) -> SpectralSumResult:
    """Counts the directions that matter beside a damping c.

        sum over the eigenvalues l of max(l, 0) / (max(l, 0) + c)

    Args:
      density: from `spectral_density`.
      damping: c, positive, in the units of the eigenvalues: prior precision over number of
        examples, or weight decay.

    Returns:
      A `SpectralSumResult`, between 0 and n.

    Raises:
      ValueError: `c` is not positive.

    References:
      D. MacKay (1992), Bayesian model comparison and backprop nets, NeurIPS 4 (the number of
      well-determined parameters); negative eigenvalues count as zero here.
    """
    _checks.positive("damping", damping)

    def share(values: jax.Array) -> jax.Array:
        return jnp.maximum(values, 0) / (jnp.maximum(values, 0) + damping)

    return spectral_sum(density, share)
