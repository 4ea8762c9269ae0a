"""Settings that are a number or a schedule of the update count."""

import jax
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
