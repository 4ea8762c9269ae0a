"""Learning rate and momentum from the ends of the spectrum."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked
from regjax._printing import legible


@legible
class SpectralRatesResult(NamedTuple):
    """What an optimiser with momentum is set to.

    Attributes:
      learning_rate: (), in units of the squared parameters over the loss.
      momentum: (), at least 0 and below 1.
    """

    learning_rate: jax.Array
    momentum: jax.Array


@checked
def nesterov_rule(largest: ArrayLike, smallest: ArrayLike) -> SpectralRatesResult:
    """Computes the learning rate and the momentum of Nesterov's method.

        learning rate = 1 / L,   momentum = (sqrt L - sqrt m) / (sqrt L + sqrt m)

    Here L is the largest and m the smallest curvature of the loss.

    Example:
      >>> print(schedules.nesterov_rule(9.0, 1.0))  # 1 / 9 and (3 - 1) / (3 + 1)
      SpectralRatesResult(learning_rate=0.11111, momentum=0.5)

    Args:
      largest: L, largest curvature.
      smallest: m, smallest curvature, above 0.

    Returns:
      A `SpectralRatesResult`. Multiplying the loss by a number does not change the momentum and the
      trajectory.

    Raises:
      ValueError: a curvature is known and not positive, infinite, or out of order.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, eq. 26, with Nesterov's rate
      1 / L instead of the printed sqrt(m / L), which does not have the unit of a learning rate and
      diverges on a quadratic with the curvatures 1 and 100.
    """
    momentum = _contraction(largest, smallest)
    return SpectralRatesResult(1 / jnp.asarray(largest), momentum)


@checked
def polyak_rule(largest: ArrayLike, smallest: ArrayLike) -> SpectralRatesResult:
    """Computes the learning rate and the momentum of Polyak's heavy ball.

        learning rate = (2 / (sqrt L + sqrt m))^2
        momentum = ((sqrt L - sqrt m) / (sqrt L + sqrt m))^2

    Here L is the largest and m the smallest curvature of the loss. For
    `transforms.spectral_controller(nesterov=False)`. The rule is optimal on a quadratic, where the
    distance to the minimum shrinks by the square root of the momentum per step.

    Example:
      >>> print(schedules.polyak_rule(9.0, 1.0))  # (2 / (3 + 1))^2 and ((3 - 1) / (3 + 1))^2
      SpectralRatesResult(learning_rate=0.25, momentum=0.25)

    Args:
      largest: L, largest curvature.
      smallest: m, smallest curvature, above 0.

    Returns:
      A `SpectralRatesResult`.

    References:
      B. Polyak (1964), USSR Computational Mathematics 4(5). D. Granziol, S. Zohren, S. Roberts
      (2022), arXiv:2006.09092, eq. 26, whose rate lacks the square (the code has it).
    """
    momentum = _contraction(largest, smallest) ** 2
    return SpectralRatesResult((2 / (jnp.sqrt(largest) + jnp.sqrt(smallest))) ** 2, momentum)


def _contraction(largest: ArrayLike, smallest: ArrayLike) -> jax.Array:
    _checks.positive("largest", largest, finite=True)
    _checks.positive("smallest", smallest, finite=True)
    ends = _checks.host_value(largest), _checks.host_value(smallest)
    if ends[0] is not None and ends[1] is not None and np.any(ends[0] < ends[1]):
        raise ValueError(f"`smallest` must be at most `largest`, {largest}, got {smallest}.")
    roots = jnp.sqrt(largest), jnp.sqrt(smallest)
    return (roots[0] - roots[1]) / (roots[0] + roots[1])
