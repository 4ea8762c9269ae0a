"""How results are printed: a field after the other, few digits, and large arrays by their shape."""

import textwrap
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Result = TypeVar("Result", bound=type[tuple])

_WIDTH = 88
_MOST_NUMBERS = 12
_MOST_LETTERS = 200


def legible(result: Result) -> Result:
    """Gives a NamedTuple a `repr` for readers. The fields themselves have all digits."""
    result.__repr__ = _shown  # type: ignore[method-assign]
    return result


def _shown(result: Any) -> str:
    fields = [f"{name}={_value(value)}" for name, value in result._asdict().items()]
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
    if hasattr(value, "_fields") or value is None or isinstance(value, str | int):
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
