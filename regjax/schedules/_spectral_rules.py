"""Learning rate and momentum from the ends of the spectrum, and the ends from Ritz values."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks

# Magnitudes below this share of the largest are one node at zero (ours): a bulk of eigenvalues
# there shows up as several Ritz values, none of which need be heavy by itself.
_NEAR_ZERO = 1e-3
# Weight above which a node is the bulk and not an end of the spectrum, as in the paper.
_HEAVY = 0.5


class SpectralRates(NamedTuple):
    """What an optimiser with momentum is set to.

    Attributes:
      learning_rate: (), in units of the squared parameters over the loss.
      momentum: (), at least 0 and below 1.
    """

    learning_rate: jax.Array
    momentum: jax.Array


class SpectralEnds(NamedTuple):
    """The range of curvature that a rule is given, as magnitudes.

    Attributes:
      largest: (), the largest magnitude; NaN if a value is.
      smallest: (), the smallest one outside of the bulk, bounded below.
    """

    largest: jax.Array
    smallest: jax.Array


def nesterov_rule(largest: Any, smallest: Any) -> SpectralRates:
    """Rate 1 / L and momentum (sqrt L - sqrt m) / (sqrt L + sqrt m), for Nesterov's method.

    Args:
      largest: L, largest curvature.
      smallest: m, smallest curvature, above 0.

    Returns:
      `SpectralRates`. A loss multiplied by a number has the same momentum and trajectory.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, eq. 26, with Nesterov's rate
      1 / L in place of the printed one (`paper_nesterov_rule`).
    """
    return SpectralRates(1 / largest, _contraction(largest, smallest))


def polyak_rule(largest: Any, smallest: Any) -> SpectralRates:
    """Rate (2 / (sqrt L + sqrt m))^2, momentum ((sqrt L - sqrt m) / (sqrt L + sqrt m))^2.

    For heavy-ball momentum (`nesterov=False`): optimal on a quadratic, where the distance to the
    minimum shrinks by the square root of the momentum a step.

    Args:
      largest: L, largest curvature.
      smallest: m, smallest curvature, above 0.

    Returns:
      `SpectralRates`.

    References:
      B. Polyak (1964), USSR Computational Mathematics 4(5). D. Granziol, S. Zohren, S. Roberts
      (2022), arXiv:2006.09092, eq. 26, whose rate lacks the square (the code has it).
    """
    rate = (2 / (jnp.sqrt(largest) + jnp.sqrt(smallest))) ** 2
    return SpectralRates(rate, _contraction(largest, smallest) ** 2)


def paper_nesterov_rule(largest: Any, smallest: Any) -> SpectralRates:
    """Rate sqrt(m / L), momentum (sqrt L - sqrt m) / (sqrt L + sqrt m), as printed.

    The rate has no unit of a learning rate: a loss multiplied by a number changes the trajectory,
    and on a quadratic with the curvatures 1 and 100 it diverges. For comparison only.

    Args:
      largest: L, largest curvature.
      smallest: m, smallest curvature, above 0.

    Returns:
      `SpectralRates`.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, eq. 26.
    """
    return SpectralRates(jnp.sqrt(smallest / largest), _contraction(largest, smallest))


def spectral_ends(
    values: jax.Array, weights: jax.Array, *, smallest_ratio: Any = 1e-3
) -> SpectralEnds:
    """The largest and the smallest curvature from Ritz values, without the bulk at zero.

    The magnitudes below 1e-3 of the largest are one node; then, as long as a node has more than
    half of the weight that is left and is not the last one, it is dropped.

    Args:
      values: (m,), Ritz values of one Lanczos run from a random start.
      weights: (m,), the squared first components of their eigenvectors; 0 where there is no value.
      smallest_ratio: m is at least this share of L.

    Returns:
      `SpectralEnds`; L is the largest of all magnitudes, dropped ones included.

    Raises:
      ValueError: `smallest_ratio` is negative.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092: the weights are renormalised
      after a drop as in the paper (the code does not). One node near zero, and the bound, are ours.
    """
    _checks.non_negative("smallest_ratio", smallest_ratio)
    is_node = weights > 0
    magnitudes = jnp.abs(values)
    largest = jnp.max(jnp.where(is_node, magnitudes, 0))
    near_zero = is_node & (magnitudes < _NEAR_ZERO * largest)
    apart = is_node & ~near_zero
    nothing = jnp.inf
    nodes = jnp.append(
        jnp.where(apart, magnitudes, nothing), jnp.min(jnp.where(near_zero, magnitudes, nothing))
    )
    masses = jnp.append(jnp.where(apart, weights, 0), jnp.sum(jnp.where(near_zero, weights, 0)))
    # Only the heaviest can have more than half of what is left: they go in that order, or stay.
    order = jnp.argsort(-masses)
    nodes, masses = nodes[order], masses[order]
    left = jnp.cumsum(masses[::-1])[::-1]
    is_last = jnp.arange(masses.size) >= jnp.sum(masses > 0) - 1
    dropped = jnp.cumprod((masses > _HEAVY * left) & ~is_last).astype(bool)
    smallest = jnp.min(jnp.where(dropped, nothing, nodes))
    bound = jnp.asarray(smallest_ratio, largest.dtype) * largest
    return SpectralEnds(largest, jnp.maximum(smallest, bound))


def _contraction(largest: Any, smallest: Any) -> jax.Array:
    roots = jnp.sqrt(largest), jnp.sqrt(smallest)
    return (roots[0] - roots[1]) / (roots[0] + roots[1])
