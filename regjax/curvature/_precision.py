"""Full float32 in every matrix product: TF32 and bfloat16 visibly perturb Lanczos."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

_Function = TypeVar("_Function", bound=Callable[..., Any])


def precision() -> contextlib.AbstractContextManager[Any]:
    """Full float32 products unless the caller says otherwise; accelerators do less by default."""
    if getattr(jax.config, "jax_default_matmul_precision") is not None:  # noqa: B009
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def precisely(function: _Function) -> _Function:
    """`function`, traced with full float32 products."""

    @functools.wraps(function)
    def traced(*arguments: Any, **options: Any) -> Any:
        with precision():
            return function(*arguments, **options)

    return cast(_Function, traced)
