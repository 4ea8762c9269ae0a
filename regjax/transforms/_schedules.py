"""Settings that are a number or a schedule of the update count."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks
from regjax._base import ScalarOrSchedule


def value_at(name: str, number: ScalarOrSchedule, count: jax.Array) -> ArrayLike:
    """Returns a number, or a schedule's value at `count`, checked like a number."""
    if not callable(number):
        return number
    value = number(count)
    _checks.number(name, value)
    return value


def is_zero(number: ScalarOrSchedule) -> bool:
    """Says whether a setting is neutral for sure: a Python number that is zero."""
    return isinstance(number, (int, float)) and number == 0


def check_size(name: str, value: ScalarOrSchedule) -> None:
    """Checks a number or schedule that must not be negative."""
    if not callable(value):
        _checks.number(name, value)


def value_at_given(name: str, number: ScalarOrSchedule, num_updates: ArrayLike | None) -> ArrayLike:
    """Returns a number, or a schedule's value at a count that the caller has to give."""
    if not callable(number):
        return number
    return value_at(name, number, check_count(f"the schedule `{name}`", num_updates))


def check_count(reader: str, num_updates: ArrayLike | None) -> jax.Array:
    """Returns the number of updates so far as an int32, or says who needs it."""
    if num_updates is None:
        raise ValueError(
            f"`num_updates` must be given, got None: {reader} depends on the number of updates so "
            "far, loss_and_grad(params, *batch, num_updates=step)."
        )
    count = jnp.asarray(num_updates)
    if count.shape or not jnp.issubdtype(count.dtype, jnp.integer):
        raise TypeError(f"`num_updates` must be a single integer, got {num_updates!r}.")
    return count.astype(jnp.int32)
