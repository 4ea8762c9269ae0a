"""Settings that are a number or a schedule of the update count."""

import math
from numbers import Real

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
    check_number(name, value)
    return value


def is_zero(number: ScalarOrSchedule) -> bool:
    """Says whether a setting is neutral for sure: a Python number that is zero."""
    return isinstance(number, (int, float)) and number == 0


def check_size(name: str, value: ScalarOrSchedule) -> None:
    """Checks a number or schedule that must not be negative."""
    if not callable(value):
        check_number(name, value)


def check_number(name: str, value: ArrayLike, *, positive: bool = False) -> None:
    """Checks a single finite number that must not be negative, as far as it is known."""
    if positive:
        _checks.positive(name, value)
    else:
        _checks.non_negative(name, value)
    if jnp.shape(value):
        raise ValueError(f"`{name}` must be a single number, got shape {jnp.shape(value)}.")
    if isinstance(value, Real) and not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}.")
