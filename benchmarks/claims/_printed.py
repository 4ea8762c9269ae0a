"""What Granziol, Zohren, Roberts printed and the library does not offer, for comparison only."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, schedules


def paper_nesterov_rule(largest: ArrayLike, smallest: ArrayLike) -> schedules.SpectralRatesResult:
    """Computes the learning rate and the momentum as printed for Nesterov's method.

        learning rate = sqrt(m / L),   momentum = (sqrt L - sqrt m) / (sqrt L + sqrt m)

    The rate has no unit of a learning rate: a loss multiplied by a number changes the trajectory,
    and on a quadratic with the curvatures 1 and 100 it diverges.

    Args:
      largest: L, largest curvature.
      smallest: m, smallest curvature, above 0.

    Returns:
      A `schedules.SpectralRatesResult`.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, eq. 26.
    """
    rates = schedules.nesterov_rule(largest, smallest)
    return rates._replace(learning_rate=jnp.sqrt(jnp.asarray(smallest) / largest))


def minimal_damping(
    reference_damping: float, reference_learning_rate: float, reference_batch_size: float
) -> Callable[[ArrayLike, ArrayLike], jax.Array]:
    """Makes the rule by which damping goes with the learning rate over the batch size.

        reference_damping (learning_rate / reference_learning_rate) (reference_batch_size / b)

    A claim of the paper's first version only; its journal version leaves it out. Untested here.

    Args:
      reference_damping: a damping, in units of the (square root of the) preconditioner, that is
        just enough at the reference.
      reference_learning_rate: the learning rate there.
      reference_batch_size: number of examples in the batch there.

    Returns:
      A function of the learning rate and of b, numbers or arrays.

    Raises:
      ValueError: an argument is not positive.

    References:
      D. Granziol, S. Zohren, S. Roberts, arXiv:2006.09092v1 (2020), under the title "Curvature is
      key"; removed in JMLR 23(173), 2022.
    """
    _checks.positive("reference_damping", reference_damping)
    _checks.positive("reference_learning_rate", reference_learning_rate)
    _checks.positive("reference_batch_size", reference_batch_size)

    def damping(learning_rate: ArrayLike, batch_size: ArrayLike) -> jax.Array:
        rate = jnp.asarray(learning_rate) / reference_learning_rate
        return reference_damping * rate * (reference_batch_size / jnp.asarray(batch_size))

    return damping
