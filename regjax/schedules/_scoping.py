"""The schedule of Entropy-SGD's gamma, which narrows the well as training goes on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from regjax import _checks


def scoping_schedule(gamma0: float, growth: float) -> Callable[[jax.Array], jax.Array]:
    """Makes the schedule of a stiffness that grows by a factor with each update.

        gamma0 (1 + growth)^count

    Args:
      gamma0: value at count 0, at least 0.
      growth: relative growth for each outer update, at least 0. 1e-3 in the official code.

    Returns:
      A schedule, float32.

    Raises:
      ValueError: an argument is negative.

    References:
      P. Chaudhari et al. (2017), arXiv:1611.01838 (scoping).
    """
    _checks.non_negative("gamma0", gamma0)
    _checks.non_negative("growth", growth)

    def schedule(count: jax.Array) -> jax.Array:
        base = jnp.float32(1 + growth)
        return jnp.float32(gamma0) * base ** jnp.asarray(count).astype(jnp.float32)

    return schedule
