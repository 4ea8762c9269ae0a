"""The schedule of Entropy-SGD's gamma, which narrows the well as training goes on."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked

# A count in this base has four digits.
_BASE = 256


@checked
def scoping_schedule(gamma0: float, growth: float) -> Callable[[ArrayLike], jax.Array]:
    """Makes the schedule of a stiffness that grows by a constant factor with each update.

        gamma0 (1 + growth)^count

    The result is exact up to a few roundings of float32 at any count; plain powers of 1.001 in
    float32 would be off by 2e-4 after 5000 updates. It is infinite where the power overflows.

    Example:
      >>> gamma = schedules.scoping_schedule(0.1, 1e-3)
      >>> print(gamma(jnp.array([0, 1000, 2000])))
      [0.1   0.272 0.738]

    Args:
      gamma0: value at count 0, at least 0.
      growth: relative growth per outer update of `transforms.entropy_sgd`, at least 0. The official
        code has 1e-3.

    Returns:
      A function of an integer count, or of an array of counts, in float32.

    Raises:
      ValueError: an argument, or a count, is negative or not finite.
      TypeError: an argument is traced, or a count is no integer.

    References:
      P. Chaudhari et al. (2017), arXiv:1611.01838 (scoping).
    """
    for name, value in (("gamma0", gamma0), ("growth", growth)):
        if isinstance(value, jax.core.Tracer):
            raise TypeError(f"`{name}` must be known when the program is built, got {value}.")
        _checks.number(name, value)
    # The count's digits each have a table of powers, rounded once.
    exponents = np.arange(_BASE) * np.float64(_BASE) ** np.arange(4)[:, None]
    with np.errstate(over="ignore"):
        powers = np.power(1 + np.float64(growth if gamma0 else 0), exponents).astype(np.float32)

    def schedule(count: ArrayLike) -> jax.Array:
        _checks.non_negative("count", count)
        count = jnp.asarray(count)
        if not jnp.issubdtype(count.dtype, jnp.integer):
            raise TypeError(f"`count` must be an integer, got {count.dtype}.")
        value = jnp.full(count.shape, gamma0, jnp.float32)
        for table in powers:
            value = value * jnp.asarray(table)[count % _BASE]
            count = count // _BASE
        return value

    return schedule
