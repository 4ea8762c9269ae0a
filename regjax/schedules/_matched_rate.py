"""The learning rate at which rescaled weights turn as fast as decayed ones."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked


@checked
def matched_learning_rate(
    *, learning_rate: ArrayLike, weight_decay: ArrayLike, gradient_norm: ArrayLike
) -> jax.Array:
    """Computes the learning rate for unit weights that turn as fast as weights under weight decay.

        sqrt(2 eta lambda) / |g|

    With the learning rate eta and the decay lambda, scale-invariant weights settle at the norm
    |w|^4 = eta |g|^2 / (2 lambda) and turn by sqrt(2 eta lambda) per step. Weights that are
    rescaled to unit norm turn by arctan(rate |g|). The formula holds to leading order in the angle.

    Example:
      >>> rate = schedules.matched_learning_rate(
      ...     learning_rate=0.1, weight_decay=5e-4, gradient_norm=0.1
      ... )
      >>> print(f"{rate:.3f}")  # sqrt(2 * 0.1 * 5e-4) / 0.1
      0.100

    Args:
      learning_rate: eta of the run with decay.
      weight_decay: lambda of the run with decay.
      gradient_norm: |g|, the norm of the gradient at unit norm of the weights, in units of the
        loss.

    Returns:
      The rate for `transforms.rescale_weights`, with the shape of the arguments.

    Raises:
      ValueError: a number is not positive or infinite.
    """
    for name, value in (
        ("learning_rate", learning_rate),
        ("weight_decay", weight_decay),
        ("gradient_norm", gradient_norm),
    ):
        _checks.positive(name, value, finite=True)
    # A product of the two would underflow.
    return jnp.sqrt(learning_rate) * jnp.sqrt(2 * jnp.asarray(weight_decay)) / gradient_norm
