"""How learning rate and damping follow the batch size."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from regjax import _checks


def batch_size_scaling(
    reference_rate: float, reference_batch: float, *, power: float
) -> Callable[[Any], jax.Array]:
    """Batch size -> reference_rate (b / reference_batch)^power.

    Linear (`power=1`) where the noise of the batch's Hessian sets the largest stable rate of SGD; a
    square root (`power=0.5`) for Adam and other methods with little damping, which the edge of the
    noise limits. A damping near 1 invalidates the latter.

    Args:
      reference_rate: the learning rate at `reference_batch`.
      reference_batch: number of examples in its batch.
      power: at least 0.

    Returns:
      A function of b, a number or an array of batch sizes; of N examples drawn without
      replacement take b = B / (1 - B / N).

    Raises:
      ValueError: an argument is out of its range.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092.
    """
    _checks.positive("reference_rate", reference_rate)
    _checks.positive("reference_batch", reference_batch)
    _checks.non_negative("power", power)

    def rate(batch_size: Any) -> jax.Array:
        size = _floating(batch_size)
        return reference_rate * (size / reference_batch) ** power

    return rate


def saturating_batch_size_scaling(
    reference_rate: float, reference_batch: float, *, crossover: float
) -> Callable[[Any], jax.Array]:
    """Batch size -> reference_rate (1 + crossover / reference_batch) / (1 + crossover / b).

    The rate 2 / l' of SGD on a batch whose largest eigenvalue is l' = l + p / (b l)
    (`curvature.additive_outlier`): linear in b far below the crossover p / l^2, constant above.

    Args:
      reference_rate: the learning rate at `reference_batch`.
      reference_batch: number of examples in its batch.
      crossover: p / l^2, p the noise power along the top eigenvector
        (`curvature.hessian_noise_power`), l the largest eigenvalue of all examples.

    Returns:
      A function of b, as in `batch_size_scaling`; infinity is allowed.

    Raises:
      ValueError: an argument is out of its range.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092; the formula between the two
      regimes is ours.
    """
    _checks.positive("reference_rate", reference_rate)
    _checks.positive("reference_batch", reference_batch)
    _checks.non_negative("crossover", crossover)

    def rate(batch_size: Any) -> jax.Array:
        size = _floating(batch_size)
        # In one precision, so that the reference gives the reference exactly.
        reference = jnp.asarray(reference_batch, size.dtype)
        return reference_rate * ((1 + crossover / reference) / (1 + crossover / size))

    return rate


def minimal_damping(
    reference_damping: float, reference_rate: float, reference_batch: float
) -> Callable[[Any, Any], jax.Array]:
    """(Learning rate, batch size) -> the damping in proportion to rate over batch size.

        reference_damping (rate / reference_rate) (reference_batch / b)

    A claim of the paper's first version only; its journal version leaves it out. Untested here.

    Args:
      reference_damping: a damping, in units of the (square root of the) preconditioner, that is
        just enough at the reference.
      reference_rate: the learning rate there.
      reference_batch: number of examples in the batch there.

    Returns:
      A function of the learning rate and of b, numbers or arrays.

    Raises:
      ValueError: an argument is not positive.

    References:
      D. Granziol, S. Zohren, S. Roberts, arXiv:2006.09092v1 (2020), under the title "Curvature is
      key"; removed in JMLR 23(173), 2022.
    """
    _checks.positive("reference_damping", reference_damping)
    _checks.positive("reference_rate", reference_rate)
    _checks.positive("reference_batch", reference_batch)

    def damping(learning_rate: Any, batch_size: Any) -> jax.Array:
        size = _floating(batch_size)
        rate = jnp.asarray(learning_rate, size.dtype)
        return reference_damping * (rate / reference_rate) * (reference_batch / size)

    return damping


def _floating(number: Any) -> jax.Array:
    array = jnp.asarray(number)
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(float)
