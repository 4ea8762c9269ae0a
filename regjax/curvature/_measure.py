"""A spectrum as a discrete measure, and sums over it with their standard errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _numerics
from regjax._arguments import checked
from regjax._on_host import on_host
from regjax._printing import legible
from regjax.curvature._precision import precisely
from regjax.curvature._quadrature import gauss_rule


@legible
class DensityResult(NamedTuple):
    """A spectral density: a discrete measure of mass 1 on the eigenvalues.

    With P probes and m Lanczos steps for each, of a matrix of order n.

    Attributes:
      nodes: (P, m), nodes of Gauss quadrature in the complement of the eigenvectors taken out, in
        the units of the matrix; a probe that made fewer steps repeats its last one.
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
      trace_standard_error: (), of `trace`, from the random draw of the probes.
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


@legible
class SpectralSumResult(NamedTuple):
    """A sum over the eigenvalues.

    Attributes:
      value: (...), sum over i of f(lambda_i).
      standard_error: (...), from the random draw of the probes.
      quadrature_error: (...), the change that the later half of the Lanczos steps has made: about
        what quadrature without them leaves open. An estimate; 0 for polynomials of degree below m.
    """

    value: jax.Array
    standard_error: jax.Array
    quadrature_error: jax.Array


def dimension_left(size: int, count: jax.Array, dtype: Any) -> jax.Array:
    """Dimension of the complement of `count` vectors among `size`, which may be above 2^31."""
    return jnp.asarray(float(size), dtype) - count.astype(dtype)


@precisely
def spectral_sum(
    density: DensityResult, function: Callable[[jax.Array], jax.Array]
) -> SpectralSumResult:
    """Computes the sum over the eigenvalues of `function`, tr f(A), with its errors.

    Eigenvalues that were taken out of the density are summed exactly; only the rest is sampled. For
    a probe v uniform on the unit sphere of d dimensions, v' B v has the variance

        2 / (d + 2) (tr(B B)/d - (tr B/d)^2)

    Both traces are moments of the density itself, so that one probe is enough for a standard error.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> print(curvature.spectral_sum(density, jnp.square))  # 1 + 4 + ... + 64
      SpectralSumResult(value=204, standard_error=0, quadrature_error=0)

    Args:
      density: from `spectral_density`.
      function: elementwise, real eigenvalues (...,) -> values (..., *shape).

    Returns:
      A `SpectralSumResult` of arrays of `shape`. Its `quadrature_error` is about what the m Lanczos
      steps do not resolve of `function`, nothing for polynomials of degree below 2 m.
    """
    eigenvalues, nodes, weights = _places(density)
    return _summed(density, weights, *map(function, (eigenvalues, density.nodes, nodes)))


@on_host(gives_arrays=True)
def _places(density: DensityResult) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The eigenvalues taken out, 0 beyond, and the rule of half the steps: nodes and weights."""
    inside = density.eigenvalue_weights > 0
    return jnp.where(inside, density.eigenvalues, 0.0), *_with_fewer_steps(density)


@on_host(gives_arrays=True)
@precisely
def _summed(
    density: DensityResult,
    fewer_weights: jax.Array,
    taken_out: jax.Array,
    sampled: jax.Array,
    with_fewer: jax.Array,
) -> SpectralSumResult:
    """The sum of what a function gives of the eigenvalues, the nodes, and those of fewer steps."""
    exact = jnp.sum(_where(density.eigenvalue_weights > 0, taken_out), axis=0)
    mean, error, dimension = sampled_sum(density, sampled)
    fewer = jnp.tensordot(fewer_weights, _where(fewer_weights > 0, with_fewer), axes=2)
    # Where all is taken out the nodes are of nothing, and the function need not be finite there.
    left_open = jnp.where(dimension > 0, dimension * jnp.abs(mean - fewer), 0)
    return SpectralSumResult(exact + dimension * mean, error, left_open)


def sampled_sum(
    density: DensityResult, sampled: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The mean of what a function gives of the nodes, its sum's standard error, the dimension."""
    weights = density.weights
    # Where no step was made the function need not be finite.
    sampled = _where(weights != 0, sampled)
    dtype = sampled.dtype
    dimension = density.size.astype(dtype) - density.num_eigenvalues.astype(dtype)
    mass = jnp.sum(weights)
    shares = weights / jnp.where(mass == 0, 1, mass)
    mean = jnp.tensordot(shares, sampled, axes=2)
    # Of numbers near 1, so that their squares are numbers.
    power = _numerics.power_of_two(jnp.max(jnp.abs(sampled)))
    power = jnp.where(power > 0, power, 1)
    squares = jnp.square(power * (sampled - mean[None, None]))
    variance = jnp.tensordot(shares, squares, axes=2)
    num_probes = jnp.sum(jnp.any(weights > 0, axis=1)).astype(sampled.dtype)
    per_probe = 2 * variance / ((dimension + 2) * jnp.maximum(num_probes, 1))
    return mean, dimension * jnp.sqrt(per_probe) / power, dimension


def _where(condition: jax.Array, values: jax.Array) -> jax.Array:
    """`values` (..., *shape) where `condition` (...) holds, else 0."""
    condition = condition.reshape(condition.shape + (1,) * (values.ndim - condition.ndim))
    return jnp.where(condition, values, jnp.zeros_like(values))


def _with_fewer_steps(density: DensityResult) -> tuple[jax.Array, jax.Array]:
    """Nodes and weights (P, m), of sum 1, of the first half of the steps."""
    counts = density.num_steps
    fewer = jnp.where(counts > 0, jnp.maximum(counts // 2, 1), 0)
    nodes, weights = jax.vmap(gauss_rule)(density.alphas, density.betas, fewer)
    num_probes = jnp.maximum(jnp.sum(counts > 0), 1).astype(weights.dtype)
    return nodes, jnp.where(counts[:, None] > 0, weights / num_probes, 0)


def share_error(share: jax.Array, dimension: jax.Array, num_probes: ArrayLike) -> jax.Array:
    """The standard error of a share of the eigenvalues in `dimension` dimensions.

    It is that of `spectral_sum` for a projector: the mass of a probe in a subspace has a Beta
    distribution.
    """
    count = jnp.asarray(num_probes, share.dtype)
    return jnp.sqrt(2 * share * (1 - share) / ((dimension + 2) * jnp.maximum(count, 1)))


@checked
def effective_dimension(density: DensityResult, *, damping: ArrayLike) -> SpectralSumResult:
    """Counts the directions that matter beside a damping c.

        sum over the eigenvalues l of max(l, 0) / (max(l, 0) + c)

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> print(f"{curvature.effective_dimension(density, damping=1.0).value:.3f}")  # 1/2 ... 8/9
      6.171

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

    return spectral_sum(density, lambda values: _share(values, damping))


@on_host()
def _share(values: jax.Array, damping: ArrayLike) -> jax.Array:
    return jnp.maximum(values, 0) / (jnp.maximum(values, 0) + damping)


@checked
def log_determinant(density: DensityResult, *, damping: ArrayLike = 0.0) -> SpectralSumResult:
    """Computes the logarithm of the determinant of A + damping I.

        sum over the eigenvalues l of log(l + damping)

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> print(f"{curvature.log_determinant(density).value:.3f}")  # the logarithm of 8!
      10.605

    Args:
      density: of A, from `spectral_density`.
      damping: not negative, in the units of the eigenvalues. A singular A needs one: what rounding
        makes of a zero eigenvalue decides the logarithm otherwise.

    Returns:
      A `SpectralSumResult`; NaN where an eigenvalue or a node is below -`damping`, minus infinity
      where one is equal to it.

    Raises:
      ValueError: `damping` is negative.

    References:
      S. Ubaru, J. Chen, Y. Saad (2017), Fast estimation of tr(f(A)) via stochastic Lanczos
      quadrature, SIAM J. Matrix Anal. Appl. 38(4).
    """
    _checks.non_negative("damping", damping)
    return spectral_sum(density, lambda values: jnp.log(values + damping))


@checked
def schatten_norm(density: DensityResult, *, order: ArrayLike) -> SpectralSumResult:
    """Computes a norm of the eigenvalues.

        (sum over the eigenvalues l of |l|^p)^(1/p)

    For p = 1 it is the nuclear norm, for p = 2 that of Frobenius. The spectral norm, p infinite, is
    the largest magnitude of `top_eigenpairs(operator, 1, which="LM", ...)`.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> print(f"{curvature.schatten_norm(density, order=2).value:.3f}")  # the root of 204
      14.283

    Args:
      density: from `spectral_density`.
      order: p, positive and finite.

    Returns:
      A `SpectralSumResult`, of the units of the matrix; its errors are those of the sum to first
      order.

    Raises:
      ValueError: `order` is not positive and finite.
    """
    _checks.number("order", order, above_zero=True)
    taken_out = jnp.max(jnp.abs(density.eigenvalues), initial=0)
    largest = jnp.maximum(jnp.max(jnp.abs(density.nodes)), taken_out)
    size = jnp.where(largest > 0, largest, 1)
    power = jnp.asarray(order, size.dtype)
    total = spectral_sum(density, lambda values: (jnp.abs(values) / size) ** power)
    value = total.value ** (1 / power)
    slope = _numerics.divide(value, power * total.value)
    return SpectralSumResult(
        size * value, size * slope * total.standard_error, size * slope * total.quadrature_error
    )
