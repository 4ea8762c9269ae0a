"""Functions of several operations that are one program where they are called outside of a jit.

XLA on CPU takes ten times as long to compile such a function as it could: it makes the code fast.
Of small arrays the code runs for milliseconds at most, however it is made. So there the compiler is
told to be quick.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
import numpy as np

from regjax import _platforms

_Function = TypeVar("_Function", bound=Callable[..., Any])

# With so many numbers an operation takes a few milliseconds in slow code.
_SMALL = 2**21
# What makes the compiler quick; it may not know all of it. From level 1 on it rounds as in fast
# code, which multiplies and adds in one operation.
_LEVEL = "xla_backend_optimization_level"
_QUICK: dict[str, Any] = {"xla_cpu_parallel_codegen_split_count": 1}
if jax.__version_info__ < (0, 12):
    _QUICK["xla_cpu_use_fusion_emitters"] = False
_UNKNOWN = "No such compile option"


def one_program(
    *, static: str | tuple[str, ...] = (), donate: str | tuple[str, ...] = (), effort: int = 0
) -> Callable[[_Function], _Function]:
    """Makes a function one program outside of a jit; inside, the same operations as without.

    Outside every operation is compiled by itself the first time, which for small ones takes longer
    than all that they compute.

    Args:
      static: names of the arguments that are no arrays.
      donate: names of the arguments whose memory it may use for its results.
      effort: of the compiler for small arrays: 0 for what runs once or a few times in a call; 1 if
        it must round as for large ones; 3 for what each step repeats, which stays as fast.
    """

    def decorated(function: _Function) -> _Function:
        jitted = functools.partial(
            jax.jit, function, static_argnames=static, donate_argnames=donate
        )
        fast = jitted(inline=True)
        quick: list[Any] = []  # made when it is needed: what the compiler knows is known by then

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            if not _is_small(jax.tree.leaves((arguments, options))):
                return fast(*arguments, **options)
            if not quick:
                quick.append(jitted(compiler_options=_options(effort)))
            try:
                return quick[0](*arguments, **options)
            except jax.errors.JaxRuntimeError as error:
                if _UNKNOWN not in str(error):
                    raise
            quick.clear()
            _QUICK.clear()
            return fast(*arguments, **options)

        def clear_cache() -> None:
            for program in (fast, *quick):
                program.clear_cache()

        known: Any = call
        known.clear_cache = clear_cache
        known._cache_size = lambda: sum(program._cache_size() for program in (fast, *quick))
        return cast(_Function, call)

    return decorated


def _options(effort: int) -> dict[str, Any]:
    if jax.config.read("jax_disable_most_optimizations"):  # the user's level is the lowest
        return dict(_QUICK)
    return _QUICK and _QUICK | {_LEVEL: effort}


def _is_small(leaves: list[Any]) -> bool:
    """Whether the CPU computes with few numbers, outside of all programs."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray))]
    placed = [array for array in arrays if isinstance(array, jax.Array)]
    if any(isinstance(array, jax.core.Tracer) for array in placed) or _platforms.is_in_program():
        return False
    if sum(array.size for array in arrays) > _SMALL:
        return False
    return _platforms.is_on_cpu(placed) and all(len(array.devices()) == 1 for array in placed)
