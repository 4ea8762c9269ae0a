"""How many Lanczos steps a probe of a density makes, where that is not said."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax._space import Space
from regjax.curvature._lanczos import Krylov
from regjax.curvature._measure import share_error
from regjax.curvature._quadrature import gauss_rule, open_share

# Where `num_steps` is chosen: the fewest, the most, and the bytes of vectors beyond which there are
# no more than the fewest.
FEWEST, _MOST, _BUDGET = 40, 320, 2**30
LOOKS = (40, 56, 80, 113, 160, 226)
# Where numbers of eigenvalues are to be known, in units of the largest magnitude.
_PLACES = np.outer([-1, 1], 10.0 ** np.arange(-3, 0.1, 0.5)).ravel()


def budget(space: Space) -> int:
    """The most steps of a probe where their number is chosen."""
    fit = _BUDGET // max(space.size * space.dtype.itemsize, 1)
    return min(max(FEWEST, min(_MOST, fit)), space.size)


def is_resolved(
    krylov: Krylov, *, largest: jax.Array, dimension: ArrayLike, num_probes: int
) -> jax.Array:
    """Whether a probe knows the numbers of eigenvalues as well as the draw of the probes does.

    Args:
      krylov: of the probe.
      largest: (), magnitude of what was taken out.
      dimension: (), number of eigenvalues that were not taken out.
      num_probes: number of probes.
    """
    coefficients = *recurrence(krylov), krylov.filled
    nodes, weights = gauss_rule(*coefficients)
    dimension = jnp.asarray(dimension, nodes.dtype)
    largest = jnp.maximum(largest * krylov.scale, jnp.max(jnp.abs(nodes)))
    places = largest * jnp.asarray(_PLACES, nodes.dtype)
    below = jnp.where(nodes[None] <= places[:, None], weights[None], 0)
    share = jnp.minimum(jnp.sum(below, 1), 1)
    error = dimension * share_error(share, dimension, num_probes)
    return jnp.all(dimension * open_share(*coefficients, places) / 2 <= jnp.maximum(error, 1))


def recurrence(krylov: Krylov) -> tuple[jax.Array, jax.Array]:
    """The coefficients of scale times A, both (m,): the last beta leads out of T."""
    alphas = jnp.diagonal(krylov.projected)
    betas = jnp.append(jnp.diagonal(krylov.projected, 1), 0).astype(alphas.dtype)
    return alphas, betas.at[krylov.filled - 1].set(krylov.beta)
