"""What m Lanczos steps know of the measure of a probe, and what they leave open.

The recurrence coefficients are the first moments of the measure. Infinitely many measures share
them; among these are the Gauss rule and, for each last diagonal entry that the next step could have
brought, the rule of m + 1 nodes with this entry. By the inequalities of Chebyshev, Markov and
Stieltjes, for a node of any of these rules,

    weights of the nodes below  <=  mass below the node
    mass up to the node         <=  weights of the nodes below and of the node,

for every measure with these moments. The more rules, the more places where that is known.
"""

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _lapack, _numerics
from regjax.curvature._ritz import small_pairs

# Last entries alpha_m + beta_m cot(phi), phi evenly spaced: where the coefficients are those of an
# interval, the nodes of these rules divide each distance of Gauss nodes evenly.
_COTANGENTS = 1 / np.tan(np.pi * (np.arange(8) + 0.5) / 8)
# Masses are sums of squares of an eigenvector: good to some units of rounding.
_MASS_UNITS = 8

Rule: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Nodes, ascending, and their weights, of sum 1."""


class Probe(NamedTuple):
    """What is known of the measure of a probe, in float64 on the host.

    Attributes:
      rules: the Gauss rule first.
      first: (m,), the first components of T's eigenvectors. last: (m,), their last ones.
      beta: what leads out of T.
    """

    rules: list[Rule]
    first: np.ndarray
    last: np.ndarray
    beta: float


def gauss_rule(
    alphas: jax.Array, betas: jax.Array, num_steps: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The nodes, ascending, and weights, both (m,), of T, of which `num_steps` rows are filled.

    Behind the last node there are copies of it, of weight 0.

    Args:
      alphas: (m,), diagonal of T.
      betas: (m,), off-diagonal; the last one that is filled leads out of T.
      num_steps: (), int32.
    """
    rows = jnp.arange(alphas.size, dtype=jnp.int32)
    largest = jnp.maximum(jnp.max(jnp.abs(alphas)), jnp.max(jnp.abs(betas)))
    power = _numerics.power_of_two(largest)  # no square under- or overflows
    power = jnp.where(power > 0, power, 1)
    diagonal = power * jnp.where(rows < num_steps, alphas, 0)
    beside = power * jnp.where(rows < num_steps - 1, betas, 0)[:-1]
    pairs = small_pairs(jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1), num_steps)
    # Pairs of rows that are not filled come first.
    values = jnp.roll(pairs.values, num_steps, 0) / power
    weights = jnp.roll(jnp.square(pairs.vectors[0]), num_steps, 0)
    inside = rows < num_steps
    return jnp.where(inside, values, values[num_steps - 1]), jnp.where(inside, weights, 0)


def known(alphas: np.ndarray, betas: np.ndarray) -> Probe:
    """What `alphas` and `betas`, both (m,), of T say of the measure of a probe."""
    ends = alphas[-1] + betas[-1] * _COTANGENTS
    scale = max(np.max(np.abs(alphas)), np.max(np.abs(betas))) or 1.0
    alphas, beside, ends = alphas / scale, betas / scale, ends / scale
    gauss = _lapack.eigh_tridiagonal(alphas, beside[:-1])
    diagonals = np.concatenate([np.tile(alphas, (ends.size, 1)), ends[:, None]], 1)
    others = _lapack.eigh_tridiagonal(diagonals, np.tile(beside, (ends.size, 1)))
    pairs = gauss, *zip(*others, strict=True)
    rules = [(scale * values, np.square(vectors[0])) for values, vectors in pairs]
    return Probe(rules, gauss[1][0], gauss[1][-1], float(betas[-1]))


def _mass_beyond(probe: Probe, places: np.ndarray) -> np.ndarray:
    """The most mass (k,) from each place outwards, where that is not between the Gauss nodes.

    It is the weight of the outermost node of the rule that has a node there: the squared first
    component of the eigenvector (beta (x - T)^-1 e_m, 1).
    """
    nodes, _ = probe.rules[0]
    outside = (places > nodes[-1]) | (places < nodes[0])
    inverse = probe.beta / np.where(outside[:, None], places[:, None] - nodes, np.inf)
    component = inverse @ (probe.first * probe.last)
    weight = component**2 / (1 + np.square(inverse) @ np.square(probe.last))
    return np.where(outside, weight, 1)


def mass_up_to(
    probe: Probe, places: np.ndarray, eps: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mass of a probe up to `places` (k,): estimate, least and most, each (k,).

    The estimate is the mean over the rules, whose nodes lie between each other.

    Args:
      probe: of `known`.
      places: (k,), ascending or not.
      eps: unit of rounding of what the rules were made of.
    """
    found = probe.rules
    nodes = np.concatenate([nodes for nodes, _ in found])
    up_to = np.concatenate([np.cumsum(weights) for _, weights in found])
    below = up_to - np.concatenate([weights for _, weights in found])
    order = np.argsort(nodes, kind="stable")
    nodes, below, up_to = nodes[order], below[order], up_to[order]
    # What is known at a place is known at all places on its one side.
    least = np.append(0, np.maximum.accumulate(below))
    most = np.append(np.minimum.accumulate(up_to[::-1])[::-1], 1)
    beyond, inside = _mass_beyond(probe, places), found[0][0]
    least = least[np.searchsorted(nodes, places, "right")]
    most = most[np.searchsorted(nodes, places, "left")]
    least = np.where(places > inside[-1], np.maximum(least, 1 - beyond), least)
    most = np.where(places < inside[0], np.minimum(most, beyond), most)
    least, most = least - _MASS_UNITS * eps, most + _MASS_UNITS * eps
    least, most = np.maximum(least, 0), np.minimum(most, 1)
    shares = [
        np.append(0, np.cumsum(weights))[np.searchsorted(nodes, places, "right")]
        for nodes, weights in found
    ]
    return np.clip(np.mean(shares, 0), least, most), least, most


def open_share(
    alphas: jax.Array, betas: jax.Array, num_steps: jax.Array, places: jax.Array
) -> jax.Array:
    """The distance (k,) of most and least mass up to `places`, were there a rule for each place.

    It is the largest mass that a place itself can have, 1 / sum_i p_i(place)^2 over the
    orthonormal polynomials up to degree m (Christoffel), from their recurrence.
    """
    size = jnp.maximum(jnp.max(jnp.abs(alphas)), jnp.max(betas))
    least = float(jnp.finfo(alphas.dtype).eps) * jnp.where(size > 0, size, 1)

    def step(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # The newest two polynomials over the root of the sum so far: nothing overflows.
        here, before, logarithm = carry
        beta = jnp.where(index > 0, betas[index - 1], 0)
        following = ((places - alphas[index]) * here - beta * before) / jnp.maximum(
            betas[index], least
        )
        root = jnp.hypot(following, jnp.ones_like(following))
        return following / root, here / root, logarithm + 2 * jnp.log(root)

    ones = jnp.ones_like(places)
    start = ones, jnp.zeros_like(places), jnp.zeros_like(places)
    return jnp.exp(-jax.lax.fori_loop(0, num_steps, step, start)[2])
