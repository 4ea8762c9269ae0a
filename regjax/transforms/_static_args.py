"""The arguments of a factory that decide the program, for `optax.inject_hyperparams`."""

from collections.abc import Callable
from typing import Any, ParamSpec, Protocol

import jax
import optax

from regjax import _checks

_Arguments = ParamSpec("_Arguments")


class Factory(Protocol[_Arguments]):
    """A function that makes a transformation, and says which of its arguments cannot be traced.

    Attributes:
      static_args: names of the integer and non-numeric arguments, for
        `optax.inject_hyperparams(factory, static_args=factory.static_args)`.
    """

    static_args: tuple[str, ...]

    def __call__(
        self, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> optax.GradientTransformationExtraArgs:
        """The transformation."""
        ...


def static_args(
    *names: str,
) -> Callable[[Callable[_Arguments, optax.GradientTransformationExtraArgs]], Factory[_Arguments]]:
    """Gives a factory the attribute `static_args` with these names of its arguments."""

    def named(
        factory: Callable[_Arguments, optax.GradientTransformationExtraArgs],
    ) -> Factory[_Arguments]:
        # A function, which has attributes, though its type does not know of them.
        function: Any = factory
        function.static_args = names
        result: Factory[_Arguments] = function
        return result

    return named


def check_static(name: str, value: int, minimum: int, maximum: int | None = None) -> int:
    """Checks an integer that decides the program, so that it cannot be traced."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a Python integer, got an array: name it in inject_hyperparams, "
            "static_args=f.static_args."
        )
    value = _checks.integer(name, value, minimum=minimum)
    if maximum is not None and value > maximum:
        raise ValueError(f"`{name}` must be at most {maximum}, got {value}.")
    return value
