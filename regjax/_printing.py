"""How results are printed: few digits, and large arrays by their shape.

And how an error in a function of the caller says what the function was given.
"""

import contextlib
import dataclasses
import textwrap
from collections.abc import Generator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Result = TypeVar("Result", bound=type)

_WIDTH = 88
_MOST_NUMBERS = 12
_MOST_LETTERS = 200


def legible(result: Result) -> Result:
    """Gives a NamedTuple or a dataclass a `repr` for readers. Its fields have all digits."""
    result.__repr__ = _shown  # type: ignore[method-assign, assignment]
    return result


@contextlib.contextmanager
def noted(*arguments: Any) -> Generator[None]:
    """Adds what a loss or a model was called with, arrays or their shapes, to what it raises."""
    try:
        yield
    except Exception as error:
        given = ", ".join(_type(argument) for argument in arguments)
        error.add_note(f"This was raised in a function that regjax called with ({given}).")
        if "static argument" in str(error):
            error.add_note("Static arguments are bound, as in functools.partial(loss_fn, n=3).")
        raise


def _type(argument: Any) -> str:
    leaves = jax.tree.leaves(argument)
    if len(leaves) == 1 and leaves[0] is argument:
        return f"{jnp.result_type(argument)}[{','.join(map(str, jnp.shape(argument)))}]"
    return f"a {type(argument).__name__} of {len(leaves)} arrays"


def _shown(result: Any) -> str:
    names = getattr(result, "_fields", None) or [f.name for f in dataclasses.fields(result)]
    fields = [f"{name}={_value(getattr(result, name))}" for name in names]
    name, line = type(result).__name__, ", ".join(fields)
    if "\n" not in line and len(name) + len(line) + 2 <= _WIDTH:
        return f"{name}({line})"
    column = textwrap.indent(",\n".join(fields), "    ")
    return f"{name}(\n{column},\n)"


def _value(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return _array(value)
    if isinstance(value, float):
        return f"{value:.5g}"
    is_legible = hasattr(value, "_fields") or type(value).__repr__ is _shown
    if is_legible or value is None or isinstance(value, str | int):
        return repr(value)
    if callable(value):
        return f"<{getattr(value, '__qualname__', type(value).__qualname__)}>"
    return _tree(value)


def _array(array: Any) -> str:
    """Its numbers if they are few and this process has them, else its type and shape."""
    is_known = not isinstance(array, jax.core.Tracer) and jnp.issubdtype(array.dtype, np.number) | (
        array.dtype == bool
    )
    if isinstance(array, jax.Array) and is_known:
        is_known = array.is_fully_addressable and not array.is_deleted()
    if not is_known or array.size > _MOST_NUMBERS:
        return f"{array.dtype}[{','.join(map(str, array.shape))}]"
    return _numbers(np.asarray(array))


def _numbers(array: np.ndarray) -> str:
    if array.ndim:
        return f"[{', '.join(map(_numbers, array))}]"
    is_real = jnp.issubdtype(array.dtype, np.floating)
    return f"{float(array):.5g}" if is_real else str(array)


class _Text(str):
    def __repr__(self) -> str:
        return str(self)


def _tree(tree: Any) -> str:
    """Its containers with their arrays, or how many arrays there are."""
    leaves = jax.tree.leaves(tree)
    if isinstance(tree, dict | list | tuple):
        text = repr(jax.tree.map(lambda leaf: _Text(_value(leaf)), tree))
        if len(text) <= _MOST_LETTERS and "\n" not in text:
            return text
    numbers = sum(getattr(leaf, "size", 1) for leaf in leaves)
    return f"<{type(tree).__name__} of {len(leaves)} arrays, {numbers} numbers>"
