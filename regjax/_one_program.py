"""Functions of several operations that are one program where they are called outside of a jit."""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

_Function = TypeVar("_Function", bound=Callable[..., Any])


def one_program(*, static: str | tuple[str, ...] = ()) -> Callable[[_Function], _Function]:
    """Makes a function one program outside of a jit; inside, the same operations as without.

    Outside every operation is compiled by itself the first time, which for small ones takes longer
    than all that they compute.

    Args:
      static: names of the arguments that are no arrays.
    """

    def decorated(function: _Function) -> _Function:
        return cast(_Function, jax.jit(function, static_argnames=static, inline=True))

    return decorated
