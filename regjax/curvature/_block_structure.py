"""How nearly a curvature matrix is block-diagonal, and how unlike its blocks are."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _checks, _numerics
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import PRNGKey
from regjax._finite import check_product
from regjax._printing import legible
from regjax.curvature._counts import Measure
from regjax.curvature._curves import LEAST_WIDTH, Axis, axis_threshold, density_curve
from regjax.curvature._measure import DensityResult
from regjax.curvature._operators._blocks import by_block, places_of, taken
from regjax.curvature._operators._operator import Operator

# Standard deviations of the kernel by which the common grid goes beyond all densities.
_MARGIN = 4


@legible
class OffDiagonalResult(NamedTuple):
    """How much of a matrix is outside of its diagonal blocks.

    Attributes:
      value: (), the mean of ||(H - blocks) v|| / ||H v|| over normal vectors v; 0 where ||H v|| is.
      standard_error: (), from the random draw of the vectors; NaN with a single one.
      num_matvecs: (), int32, products with the whole matrix; as many are made with each block.
    """

    value: jax.Array
    standard_error: jax.Array
    num_matvecs: jax.Array


@legible
class DensityDistancesResult(NamedTuple):
    """Jensen-Shannon distances of B densities, seen through one kernel on one grid.

    Attributes:
      value: (B, B), between 0 and 1, 0 on the diagonal.
      standard_error: (B, B), from the random draw of the probes, by leaving out one probe at a
        time; NaN beside a density of a single probe.
      mean: (), over the pairs of different densities; 0 of a single one.
      grid: (num_points,), eigenvalues, ascending.
      density: (B, num_points), mass per unit of the eigenvalue.
    """

    value: jax.Array
    standard_error: jax.Array
    mean: jax.Array
    grid: jax.Array
    density: jax.Array


@checked
def off_diagonal_share(
    operator: Operator,
    *,
    key: PRNGKey,
    num_probes: int = 8,
    depth: int = 1,
    layout: Layouts = None,
) -> OffDiagonalResult:
    """Estimates the share of a curvature matrix that is outside of its diagonal blocks.

        mean over normal vectors v of ||(H - blocks) v|| / ||H v||

    Example:
      >>> hessian = curvature.hessian(lambda p: p["a"] * p["b"], {"a": 0.0, "b": 0.0})
      >>> result = curvature.off_diagonal_share(hessian, key=jax.random.key(0))
      >>> print(result)  # a product of two parameters has curvature between them alone
      OffDiagonalResult(value=1, standard_error=0, num_matvecs=8)

    Args:
      operator: H, symmetric.
      key: typed key for the vectors.
      num_probes: number of vectors.
      depth: how the parameters are taken apart: leaves that share the first `depth` keys of their
        path form a block (see `by_block`).
      layout: which axes of the leaves stack layers (see `by_block`).

    Returns:
      An `OffDiagonalResult`, 0 for a matrix of blocks alone. It may be above 1, where couplings and
      blocks cancel.

    Raises:
      ValueError: `num_probes` or `depth` is below one, or `layout` names axes that a leaf does not
        have.
      NotFiniteError: a product is NaN or infinite, outside of `jax.jit`.
    """
    _checks.integer("num_probes", num_probes)
    space = operator.space
    rows = space.normal(_checks.key("key", key), num_probes)
    images = operator.block_product(rows)
    check_product(operator, images)
    # Near one, so that no square under- or overflows.
    power = _numerics.power_of_two(jnp.max(jnp.abs(images)))
    power = jnp.where(power > 0, power, 1)
    vectors, products = space.unravel_rows(rows), space.unravel_rows(images)
    places, outside = places_of(space, depth, layout), jnp.zeros(num_probes, space.dtype)
    for name, block in by_block(operator, depth=depth, layout=layout).items():
        own = block.space.ravel_rows(taken(products, places[name]))
        own = own - block.block_product(block.space.ravel_rows(taken(vectors, places[name])))
        outside = outside + jnp.sum((power * own) ** 2, 1)
    squares = jnp.sum((power * images) ** 2, 1)
    shares = jnp.sqrt(_numerics.divide(outside, squares))
    # The error of a single vector is unknown, also where NaN are forbidden.
    with jax.debug_nans(False):
        return OffDiagonalResult(*_numerics.mean_and_error(shares), jnp.int32(num_probes))


@checked
def density_distances(
    densities: Mapping[str, DensityResult],
    *,
    num_points: int = 512,
    axis_scale: str = "linear",
    linear_threshold: float | None = None,
    kernel_width: float | None = None,
) -> DensityDistancesResult:
    """Computes how unlike spectral densities are, such as those of a matrix's blocks.

        JS(p, q)^2 = 1/2 KL(p | (p + q) / 2) + 1/2 KL(q | (p + q) / 2),   logarithms to base 2

    The densities are seen through one Gaussian on one grid (see `density_curve`), each of mass 1
    there. JS is a metric: 0 for equal densities, 1 for those that share no place. It depends on the
    kernel, as every distance of point measures does. On a linear axis densities on different scales
    near zero look alike, on a symmetric-log one they do not. Two draws of one density are at a
    distance of about their error, which only more probes bring down.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> far = density._replace(eigenvalues=100 * density.eigenvalues)  # 100, ..., 800
      >>> densities = {"a": density, "b": density, "c": far}
      >>> print(curvature.density_distances(densities).value[0])
      [0. 0. 1.]

    Args:
      densities: name -> result of `spectral_density`, concrete arrays.
      num_points: number of grid points.
      axis_scale: "linear", or "symlog", logarithmic on both sides of zero: t(x) = x or asinh(x /
        linear_threshold), on which the grid is even.
      linear_threshold: positive, in units of the eigenvalue; None takes 1e-3 of the largest
        magnitude of all. Unused on a linear scale.
      kernel_width: positive standard deviation in units of t; None takes 1 % of the range of all.

    Returns:
      A `DensityDistancesResult`, in the order of the mapping.

    Raises:
      ValueError: there is no density, or an option is out of its range.

    References:
      Y. Zhang, C. Chen, T. Ding, Z. Li, R. Sun, Z.-Q. Luo (2024), Why transformers need Adam: a
      Hessian perspective, arXiv:2402.16788, which compares blocks by this distance; grid and kernel
      are ours. D. Endres, J. Schindelin (2003), IEEE Transactions on Information Theory 49(7).
    """
    if not densities:
        raise ValueError("`densities` must have at least one density, got none.")
    _checks.integer("num_points", num_points, minimum=2)
    measures = [Measure.of(density) for density in densities.values()]
    found = [axis_threshold(one, axis_scale, linear_threshold) for one in measures]
    threshold = None if found[0] is None else max(one for one in found if one is not None)
    axes = [Axis(measure, threshold) for measure in measures]
    low, high = min(axis.ends[0] for axis in axes), max(axis.ends[1] for axis in axes)
    if kernel_width is None:
        kernel_width = LEAST_WIDTH * (high - low) or LEAST_WIDTH
    _checks.positive("kernel_width", kernel_width)
    margin = _MARGIN * kernel_width
    places = np.linspace(low - margin, high + margin, num_points)
    if places[1] - places[0] > kernel_width:
        least = int((high - low + 2 * margin) / kernel_width) + 2
        raise ValueError(
            f"`num_points` must be at least {least} for this `kernel_width`, got {num_points}: the "
            "grid would step over the kernel."
        )
    grid = axes[0].inverse(places)
    slope = np.ones_like(grid) if threshold is None else np.hypot(grid, threshold)

    def heights(density: DensityResult) -> np.ndarray:
        """Shares (num_points,), of the mass of the grid, at each place."""
        curve = density_curve(
            density, grid=grid, axis_scale=axis_scale, linear_threshold=threshold,
            kernel_width=kernel_width,
        )  # fmt: skip
        mass = slope * np.asarray(curve.density, np.float64)
        return mass / np.sum(mass)

    whole = [heights(density) for density in densities.values()]
    value = np.array([[_distance(one, other) for other in whole] for one in whole])
    variance = np.zeros_like(value)
    for i, density in enumerate(densities.values()):
        variance[i] += _variance(density, whole, heights)
    variance = variance + variance.T
    np.fill_diagonal(variance, 0)
    count = len(whole) * (len(whole) - 1)
    dtype = next(iter(densities.values())).alphas.dtype
    step = places[1] - places[0]
    with jax.debug_nans(False):
        return DensityDistancesResult(
            value=jnp.asarray(value, dtype),
            standard_error=jnp.asarray(np.sqrt(variance), dtype),
            mean=jnp.asarray(np.sum(value) / max(count, 1), dtype),
            grid=jnp.asarray(grid, dtype),
            density=jnp.asarray(np.stack(whole) / (step * slope), dtype),
        )


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    """The root of the Jensen-Shannon divergence of two lists of shares, in bits."""
    middle = (one + other) / 2

    def excess(shares: np.ndarray) -> float:
        known = shares > 0
        return float(np.sum(shares[known] * np.log2(shares[known] / middle[known])))

    return float(np.sqrt(max(0.0, (excess(one) + excess(other)) / 2)))


def _variance(
    density: DensityResult,
    whole: list[np.ndarray],
    heights: Callable[[DensityResult], np.ndarray],
) -> np.ndarray:
    """(B,), what the draw of a density's probes adds to the squared errors of its distances."""
    steps = np.asarray(density.num_steps)
    finished = np.flatnonzero(steps)
    if int(density.size) == int(density.num_eigenvalues):
        return np.zeros(len(whole))  # all eigenvalues are known
    count = len(finished)
    if count == 1:
        return np.full(len(whole), np.nan)
    found = []
    for left_out in finished:
        rest = finished[finished != left_out]
        part = density._replace(
            alphas=density.alphas[rest],
            betas=density.betas[rest],
            num_steps=density.num_steps[rest],
        )
        found.append([_distance(heights(part), other) for other in whole])
    return (count - 1) * np.var(found, 0)
