"""Numbers of eigenvalues, with what the Lanczos steps leave open and the error of the probes."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _loops
from regjax._printing import legible
from regjax.curvature._measure import DensityResult
from regjax.curvature._quadrature import Probe, known, mass_up_to

# A pair taken out is near a place if that is within so many of its residual norms.
_NEAR = 4


@legible
class CountResult(NamedTuple):
    """A number of eigenvalues; n times the distribution function where `low` is -infinity.

    Attributes:
      value: (...), the estimate.
      standard_error: (...), from the random draw of the probes.
      lower_bound: (...), the least that the probes allow: rigorous for those that were drawn, so
        that the exact number is beyond the bounds only by as much as the draw is off.
      upper_bound: (...), the most.
    """

    value: jax.Array
    standard_error: jax.Array
    lower_bound: jax.Array
    upper_bound: jax.Array


class Measure(NamedTuple):
    """What is known of a spectrum, in float64 on the host.

    Attributes:
      probes: the finished ones.
      values: (r,), the eigenvalues taken out.
      residual_norms: (r,), of their pairs.
      rounding: what it may move an eigenvalue by.
      size: n.
      dimension: number of eigenvalues that were not taken out.
      eps: unit of rounding of the rules' coefficients.
    """

    probes: list[Probe]
    values: np.ndarray
    residual_norms: np.ndarray
    rounding: float
    size: int
    dimension: int
    eps: float

    @classmethod
    def of(cls, density: DensityResult) -> "Measure":
        """That of a result of concrete arrays; raises ValueError for traced or unfinished ones."""
        if not _loops.is_concrete(density):
            raise ValueError("`density` must be concrete arrays, got traced ones: not in jax.jit.")
        steps = np.asarray(density.num_steps)
        if not np.any(steps):
            raise ValueError("`density` must have a finished probe, got none.")
        double = lambda array: np.asarray(array, np.float64)
        probes = zip(double(density.alphas), double(density.betas), steps, strict=True)
        size, count = int(density.size), int(density.num_eigenvalues)
        return cls(
            probes=[known(alphas[:m], betas[:m]) for alphas, betas, m in probes if m],
            values=double(density.eigenvalues)[:count],
            residual_norms=double(density.residual_norms)[:count],
            rounding=float(density.node_error_bound),
            size=size,
            dimension=size - count,
            eps=float(jnp.finfo(density.alphas.dtype).eps),
        )


def eigenvalue_count(
    density: DensityResult, low: ArrayLike = -np.inf, high: ArrayLike = np.inf
) -> CountResult:
    """Counts the eigenvalues in (low, high], with rigorous bounds of the quadrature's error.

    The mass of a probe beside a node lies between partial sums of weights (Chebyshev, Markov,
    Stieltjes), here those of nine rules for each probe. Eigenvalues that were taken out count as 1.
    What their residual norms r_i leave coupled moves the others' number up to x by no more than a
    shift of x by sum_i r_i^2 / |value_i - x|; the norms of those next to x and rounding add to it.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(jnp.arange(1.0, 9.0) * w**2)  # eigenvalues 1, ..., 8
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(8))
      >>> density = curvature.spectral_density(hessian, key=jax.random.key(0))
      >>> print(curvature.eigenvalue_count(density, low=5.5))  # 6, 7 and 8
      CountResult(value=3, standard_error=0, lower_bound=3, upper_bound=3)

    Args:
      density: from `spectral_density`; concrete arrays, with at least one finished probe.
      low: lower ends, a number or an array.
      high: upper ends, which broadcast with `low`.

    Returns:
      A `CountResult` of their shape. Whether an eigenvalue at an end itself counts is below
      rounding, and within the bounds.

    Raises:
      ValueError: `density` is traced or without a finished probe, or an end is NaN or above the
        other.

    References:
      The inequalities as in G. Szego (1939), Orthogonal polynomials, section 3.41; the rules beside
      Gauss's, and what the deflation adds, are our application.
    """
    measure = Measure.of(density)
    low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    if not np.all(low <= high):
        raise ValueError(f"`low` must be at most `high`, got {low} and {high}.")
    below, up_to = (_up_to(measure, places.ravel()) for places in (low, high))
    size, dimension = measure.size, measure.dimension
    least = np.clip(up_to[1] - below[2], 0, size)
    most = np.clip(up_to[2] - below[1], least, size)
    value = np.clip(up_to[0] - below[0], least, most)
    # The mass of a probe in a subspace has a Beta distribution. Of the shares that are possible
    # the one of the largest error.
    taken = _taken(measure, high.ravel()) - _taken(measure, low.ravel())
    shares = np.clip((np.stack([least, most]) - taken) / max(dimension, 1), 0, 1)
    widest = np.clip(0.5, *shares)
    variance = 2 * widest * (1 - widest) / ((dimension + 2) * len(measure.probes))
    numbers = value, dimension * np.sqrt(variance), least, most
    dtype = density.alphas.dtype
    return CountResult(*(jnp.asarray(array.reshape(low.shape), dtype) for array in numbers))


def _taken(measure: Measure, places: np.ndarray) -> np.ndarray:
    return np.asarray(np.sum(measure.values[:, None] <= places, 0, dtype=np.float64))


def _up_to(measure: Measure, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The number of eigenvalues up to each place (k,): estimate, least and most."""

    def of_complement(places: np.ndarray) -> np.ndarray:
        masses = [mass_up_to(probe, places, measure.eps) for probe in measure.probes]
        return np.asarray(measure.dimension * np.mean(masses, 0))

    by_pairs, by_rest = _shifts(measure, places)
    least = of_complement(places - by_rest)[1] + _taken(measure, places - by_pairs)
    most = of_complement(places + by_rest)[2] + _taken(measure, places + by_pairs)
    # Nothing is beyond infinity.
    least = np.where(places == np.inf, measure.size, least)
    most = np.where(places == -np.inf, 0, most)
    estimate = of_complement(places)[0] + _taken(measure, places)
    return np.clip(estimate, least, most), least, most


def _shifts(measure: Measure, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By how much a place may be off for the pairs taken out, and for the others, both (k,).

    Without the part of E of the near pairs all eigenvalues of A = [values, E'; E, B] move by its
    norm at most (Weyl). For the others, A has up to x as many eigenvalues as the values and
    B - E (values - x)^-1 E' have together (Haynsworth).
    """
    residuals = measure.residual_norms[:, None]
    distance = np.abs(measure.values[:, None] - places)
    near = distance <= _NEAR * residuals
    norm = np.linalg.norm(np.where(near, residuals, 0), axis=0)
    room = np.where(near, np.inf, distance - norm)
    # Where the near pairs are too coupled to leave the others a distance, all count as near.
    is_clear = np.all(room > 0, 0)
    parts = residuals**2 / np.where(room > 0, room, np.inf)
    whole = np.linalg.norm(residuals)
    by_pairs = np.asarray(np.where(is_clear, norm, whole) + measure.rounding)
    return by_pairs, np.asarray(by_pairs + np.where(is_clear, np.sum(parts, 0), 0))
