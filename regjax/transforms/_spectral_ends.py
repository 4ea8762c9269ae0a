"""The ends of the spectrum from Ritz values, for the rules of the learning rate."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks

# Magnitudes below this share of the largest are one node at zero (ours): a bulk of eigenvalues
# there shows up as several Ritz values, none of which need be heavy by itself.
_NEAR_ZERO = 1e-3
# Weight above which a node is the bulk and not an end of the spectrum, as in the paper.
_HEAVY = 0.5


class SpectralEnds(NamedTuple):
    """The range of curvature that a rule is given, as magnitudes.

    Attributes:
      largest: (), the largest magnitude; NaN if a value with weight is, or a weight.
      smallest: (), the smallest one outside of the bulk, bounded below; NaN likewise.
    """

    largest: jax.Array
    smallest: jax.Array


def spectral_ends(
    values: jax.Array, weights: jax.Array, *, smallest_ratio: ArrayLike = 1e-3
) -> SpectralEnds:
    """Finds the largest and the smallest curvature among Ritz values, without the bulk at zero.

    The magnitudes below 1e-3 of the largest are one node; then, as long as a node has more than
    half of the weight that is left and is not the last one, it is dropped.

    Args:
      values: (m,), Ritz values of one Lanczos run from a random start.
      weights: (m,), the squared first components of their eigenvectors; 0 where there is no value.
      smallest_ratio: m is at least this share of L.

    Returns:
      A `SpectralEnds`; L is the largest of all magnitudes, dropped ones included.

    Raises:
      ValueError: `smallest_ratio` is negative or not finite, or a shape does not fit.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092: the weights are renormalised
      after a drop as in the paper (the code does not). One node near zero, and the bound, are ours.
    """
    _checks.number("smallest_ratio", smallest_ratio)
    for name, array in (("values", values), ("weights", weights)):
        _checks.floating_tree(name, array)
        if jnp.ndim(array) != 1 or jnp.shape(array) != jnp.shape(values) or not jnp.size(array):
            raise ValueError(
                f"`{name}` must have shape (m,), m at least 1 and the same for values and weights, "
                f"got {jnp.shape(array)}."
            )
    is_node = ~(weights <= 0)  # a weight that is NaN is no empty place
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
    known = ~jnp.any(jnp.isnan(weights) | jnp.isnan(jnp.where(is_node, values, 0)))
    ends = largest, jnp.maximum(smallest, bound)
    return SpectralEnds(*(jnp.where(known, end, jnp.nan) for end in ends))
