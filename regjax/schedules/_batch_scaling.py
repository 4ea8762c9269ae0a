"""How the learning rate follows the batch size."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked


@checked
def batch_size_scaling(
    reference_learning_rate: float, reference_batch_size: float, *, power: float
) -> Callable[[ArrayLike], jax.Array]:
    """Makes a rule that sets the learning rate to a power of the batch size b.

        reference_learning_rate (b / reference_batch_size)^power

    Take `power=1` for SGD, where the noise of the batch's Hessian sets the largest stable rate, and
    `power=0.5` for Adam and other methods with little damping. The square root does not hold if the
    damping is near 1.

    Example:
      >>> learning_rate = schedules.batch_size_scaling(0.1, 64, power=1.0)
      >>> print(learning_rate(jnp.array([32.0, 64.0, 256.0])))
      [0.05 0.1  0.4 ]

    Args:
      reference_learning_rate: the learning rate at `reference_batch_size`.
      reference_batch_size: number of examples in its batch.
      power: at least 0.

    Returns:
      A function of b, a number or an array of batch sizes. For batches of B out of N examples,
      drawn without replacement, pass b = B / (1 - B / N).

    Raises:
      ValueError: an argument, or b, is out of its range.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092.
    """
    _checks.number("reference_learning_rate", reference_learning_rate, above_zero=True)
    _checks.number("reference_batch_size", reference_batch_size, above_zero=True)
    _checks.number("power", power)

    def rate(batch_size: ArrayLike) -> jax.Array:
        size = _floating(batch_size)
        return reference_learning_rate * (size / reference_batch_size) ** power

    return rate


@checked
def saturating_batch_size_scaling(
    reference_learning_rate: float, reference_batch_size: float, *, crossover: float
) -> Callable[[ArrayLike], jax.Array]:
    """Makes a rule for a learning rate that is linear in the batch size b up to a crossover.

        reference_learning_rate (1 + crossover / reference_batch_size) / (1 + crossover / b)

    The rule follows from the largest stable rate of SGD, 2 / l', on batches whose Hessian has the
    largest eigenvalue l' = l + p / (b l) (`curvature.additive_outlier`). The rate is linear in b
    far below the crossover p / l^2, and constant far above it.

    Example:
      >>> learning_rate = schedules.saturating_batch_size_scaling(0.1, 64, crossover=64)
      >>> print(learning_rate(jnp.array([16.0, 64.0, jnp.inf])))
      [0.04 0.1  0.2 ]

    Args:
      reference_learning_rate: the learning rate at `reference_batch_size`.
      reference_batch_size: number of examples in its batch.
      crossover: p / l^2, where p is the power of the Hessian's noise along the top eigenvector
        (`curvature.hessian_noise_power`), and l the largest eigenvalue on all examples.

    Returns:
      A function of b, a number or an array of batch sizes, infinity included. For batches of B out
      of N examples, drawn without replacement, pass b = B / (1 - B / N).

    Raises:
      ValueError: an argument, or b, is out of its range.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092. The formula between the two
      regimes is ours.
    """
    _checks.number("reference_learning_rate", reference_learning_rate, above_zero=True)
    _checks.number("reference_batch_size", reference_batch_size, above_zero=True)
    _checks.number("crossover", crossover)

    def rate(batch_size: ArrayLike) -> jax.Array:
        size = _floating(batch_size)
        # In one precision, so that the reference gives the reference exactly.
        reference = jnp.asarray(reference_batch_size, size.dtype)
        return reference_learning_rate * ((1 + crossover / reference) / (1 + crossover / size))

    return rate


def _floating(batch_size: ArrayLike) -> jax.Array:
    array = jnp.asarray(_checks.positive("batch_size", batch_size))
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)
