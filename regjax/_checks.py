"""Validation at trace time: every error message of the library's arguments, written once."""

from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from regjax import _differences

ORDER = "the order of the matrix, which is the number of parameters"
Number = TypeVar("Number")
Function = TypeVar("Function")

_Tree: TypeAlias = Any  # `_base` stands on this file


def integer(
    name: str,
    value: object,
    *,
    minimum: int | tuple[int, str] | None = 1,
    maximum: tuple[int, str] | None = None,
) -> int:
    """Returns `value` as an `int`, or raises naming `name`.

    Args:
      name: of the argument.
      value: what was given.
      minimum: the least, and in words where it comes from if that is not plain; None: any.
      maximum: the most, and where it comes from; None: any.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` must be a Python integer, got {value!r}.")
    value = int(value)
    (least, why), (most, whence) = _bound(minimum), _bound(maximum)
    if (least is not None and value < least) or (most is not None and value > most):
        rule = f"at least {least}{why}"
        if most is not None:
            rule = f"between {least}{why} and {most}{whence}"
        raise ValueError(f"`{name}` must be {rule}, got {value}.")
    return value


def _bound(bound: int | tuple[int, str] | None) -> tuple[int | None, str]:
    return (bound[0], f" ({bound[1]})") if isinstance(bound, tuple) else (bound, "")


def non_negative(name: str, value: Number, *, finite: bool = False) -> Number:
    """Returns `value`, a number (or an array) that is not negative, as far as it is known."""
    known = _known(name, value)
    if known is not None and not (known >= 0).all():
        raise ValueError(f"`{name}` must be non-negative, got {value}.")
    _check_finite(name, known, finite=finite)
    return value


def positive(name: str, value: Number, *, finite: bool = False) -> Number:
    """Returns `value`, a number (or an array) above zero, as far as it is known."""
    known = _known(name, value)
    if known is not None and not (known > 0).all():
        raise ValueError(f"`{name}` must be positive, got {value}.")
    _check_finite(name, known, finite=finite)
    return value


def real(name: str, value: Number, *, finite: bool = False) -> Number:
    """Returns `value`, a real number or an array of them."""
    _check_finite(name, _known(name, value), finite=finite)
    return value


def number(name: str, value: Number, *, above_zero: bool = False) -> Number:
    """Returns `value`, a single finite number that is not negative, as far as it is known."""
    (positive if above_zero else non_negative)(name, value, finite=True)
    if shape := getattr(value, "shape", ()):
        raise ValueError(f"`{name}` must be a single number, got shape {shape}.")
    return value


def boolean(name: str, value: object) -> bool:
    """Returns `value` as a `bool` if it is one that is known."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")
    return bool(value)


def function(name: str, value: Function) -> Function:
    """Returns `value` if it can be called."""
    if not callable(value):
        raise TypeError(f"`{name}` must be callable, got {type(value).__name__}.")
    return value


def axis_name(name: str, value: str | tuple[str, ...] | None) -> None:
    """Checks that `value` can be the name of a mapped axis, or is None."""
    names = value if isinstance(value, tuple) else (value,)
    if value is not None and not all(isinstance(part, str) for part in names):
        raise TypeError(f"`{name}` must be a string, got {value!r}.")


def inexact_dtype(name: str, value: DTypeLike) -> None:
    """Checks that `value` is a real or complex floating-point type."""
    try:
        is_inexact = jnp.issubdtype(jnp.dtype(value), jnp.inexact)
    except (TypeError, ValueError):
        is_inexact = False
    if not is_inexact or hasattr(value, "shape"):
        raise TypeError(f"`{name}` must be a floating-point type, got {value!r}.")


def between(name: str, value: Number, low: float, high: float) -> Number:
    """Returns `value`, a number from `low` to `high`, as far as it is known."""
    known = _known(name, value)
    if known is not None and not ((known >= low) & (known <= high)).all():
        raise ValueError(f"`{name}` must be between {low:g} and {high:g}, got {value}.")
    return value


def _known(name: str, value: object) -> np.ndarray | None:
    """Returns a real number, or an array of them, as the host sees it; None where it cannot."""
    if not isinstance(value, (jax.Array, np.ndarray)):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"`{name}` must be a real number, got {value!r}.")
        return np.asarray(float(value))
    if not (jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)):
        raise TypeError(f"`{name}` must be a real number, got {value.dtype}.")
    return host_value(value)


def host_value(array: ArrayLike) -> np.ndarray | None:
    """Returns the numbers of `array`; None of a tracer, and of what lies on other machines.

    By NumPy: inside of `jax.jit` JAX's own operations on known arrays give tracers.
    """
    if isinstance(array, jax.core.Tracer):
        return None
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return None
    return np.asarray(array)


def _check_finite(name: str, known: np.ndarray | None, *, finite: bool) -> None:
    if finite and known is not None and not np.isfinite(known).all():
        raise ValueError(f"`{name}` must be finite, got {known}.")


def finite_tree(name: str, tree: _Tree) -> _Tree:
    """Returns `tree`, of floating point, if no number that is known is NaN or infinite."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        known = host_value(leaf)
        if known is not None and not np.isfinite(known).all():
            what = "NaN" if np.isnan(known).any() else "infinity"
            raise ValueError(f"`{name}{jax.tree_util.keystr(path)}` must be finite, got {what}.")
    return tree


def direction(name: str, tree: _Tree) -> _Tree:
    """Returns `tree`, of floating point, if it is finite and not zero as far as it is known."""
    finite_tree(name, tree)
    known = [host_value(leaf) for leaf in jax.tree.leaves(tree)]
    if not any(leaf is None or leaf.any() for leaf in known):
        raise ValueError(f"`{name}` must not be zero: it is a direction.")
    return tree


def choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """Returns `value` if it is one of `allowed`, else raises ValueError."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {value!r}.")
    return value


def key(name: str, value: object) -> jax.Array:
    """Returns `value` if it is one typed PRNG key, else raises TypeError."""
    if not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        raise TypeError(f"`{name}` must be a typed key from jax.random.key, got {value!r}.")
    if value.shape:
        raise ValueError(f"`{name}` must be a single key, got an array of shape {value.shape}.")
    return value


def _dtype(leaf: object) -> Any:
    """The type of a leaf; that of Python for what is no number."""
    try:
        return jnp.result_type(leaf)
    except (TypeError, ValueError):
        return type(leaf)


_WHOLE_MODULE = (
    " Parameters are arrays alone: of a whole module `regjax.from_equinox`, `from_nnx`, "
    "`from_linen`, `from_haiku` or `from_keras` makes a model with parameters, and "
    "`equinox.partition(module, equinox.is_inexact_array)[0]` are those of Equinox."
)


def floating_tree(name: str, tree: _Tree) -> _Tree:
    """Returns `tree` if it has leaves and all of them are real floating-point arrays."""
    if not jax.tree.leaves(tree):
        raise ValueError(f"`{name}` must have at least one array leaf, got {tree!r}.")
    return floating_leaves(name, tree)


def floating_leaves(
    name: str, tree: _Tree, chosen: Sequence[bool] | None = None, *, remedy: str = ""
) -> _Tree:
    """Returns `tree`, perhaps without leaves, if all or the chosen ones are real floating point."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), choose in zip(leaves, chosen or [True] * len(leaves), strict=True):
        dtype = _dtype(leaf) if choose else jnp.float32
        if not jnp.issubdtype(dtype, jnp.floating):
            is_object = dtype is type(leaf) and not isinstance(leaf, str)
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` must be real floating point, got "
                f"{getattr(dtype, '__name__', dtype)}.{_WHOLE_MODULE if is_object else remedy}"
            )
    return tree


def floating_array(name: str, array: ArrayLike) -> jax.Array:
    """Returns `array` as a JAX array if it is one of real floating point, and no tree of them."""
    if not isinstance(array, (jax.Array, np.ndarray, np.generic, float)):
        raise TypeError(f"`{name}` must be one array, got {type(array).__name__}.")
    floating_tree(name, array)
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def real_tree(name: str, tree: _Tree) -> _Tree:
    """Returns `tree` if no leaf is complex, whose imaginary part a conversion would drop."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(jnp.result_type(leaf), jnp.complexfloating):
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` must be real, got {jnp.result_type(leaf)}."
            )
    return tree


def same_structure(name: str, tree: _Tree, like: _Tree) -> _Tree:
    """Returns `tree` if it has the structure of `like`."""
    expected: Any = jax.tree.structure(like)
    if jax.tree.structure(tree) != expected:
        raise ValueError(
            f"`{name}` must have the tree structure {_differences.written(expected)}, got "
            f"{_differences.of(tree, expected)}.{_differences.by_ravel(tree, like)}"
        )
    return tree


def same_tree(name: str, tree: _Tree, like: _Tree, *, leading: tuple[int, ...] = ()) -> _Tree:
    """Returns `tree` if it has the structure of `like` and shapes `leading + like's shapes`."""
    same_structure(name, tree, like)
    for (path, leaf), reference in zip(
        jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like), strict=True
    ):
        if jnp.shape(leaf) != leading + jnp.shape(reference):
            raise ValueError(
                f"`{name}{jax.tree_util.keystr(path)}` must have shape "
                f"{leading + jnp.shape(reference)}, got {jnp.shape(leaf)}."
                f"{_differences.by_ravel(tree, like)}"
            )
    return tree


def floating_like(name: str, tree: _Tree, like: _Tree) -> _Tree:
    """Returns `tree` if it has the structure and the shapes of `like`, and real numbers."""
    return floating_leaves(name, same_tree(name, tree, like))


def bool_tree(name: str, tree: _Tree) -> _Tree:
    """Returns `tree` if all leaves are boolean arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.result_type(leaf) != jnp.bool_:
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` must be boolean, True for what is kept, got "
                f"{jnp.result_type(leaf)}."
            )
    return tree


def mask_leaves(mask: _Tree, like: _Tree, name: str = "mask") -> list[bool]:
    """Returns one bool for each leaf of `like`, of a mask like it or its upper part; None: all."""
    leaves = prefix_leaves(name, True if mask is None else mask, like)
    return [_bool(name, leaf) for leaf in leaves]


def prefix_leaves(
    name: str, tree: _Tree, like: _Tree, *, is_leaf: Callable[[Any], bool] | None = None
) -> list[Any]:
    """Returns a leaf of `tree` for each one of `like`: a leaf of a prefix stands for all below.

    Where `like` has no leaves there is nothing to compare.

    Args:
      name: of the argument, for errors.
      tree: like the upper part of `like`.
      like: a tree.
      is_leaf: what is a leaf of `tree`, as in `jax.tree.flatten`.
    """
    if not jax.tree.leaves(like):
        return []
    leaves = jax.tree.leaves(tree, is_leaf=is_leaf)
    structure: Any = jax.tree.structure(tree, is_leaf=is_leaf)
    try:
        below = structure.flatten_up_to(like)
    except (ValueError, TypeError):
        raise ValueError(
            f"`{name}` must have the tree structure {jax.tree.structure(like)}, or that of its "
            f"upper part, got {structure}."
        ) from None
    return [leaf for leaf, part in zip(leaves, below, strict=True) for _ in jax.tree.leaves(part)]


def _bool(name: str, value: object) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    known = host_value(value) if isinstance(value, (np.ndarray, jax.Array)) else None
    if known is None or known.shape or known.dtype != np.bool_:
        raise TypeError(f"`{name}` must hold Python bools, or single ones of NumPy, got {value!r}.")
    return bool(known)


def not_empty(name: str, batch: _Tree) -> None:
    """Checks that no array has a leading axis of no examples, of which a mean is NaN."""
    if any(jnp.shape(leaf)[:1] == (0,) for leaf in jax.tree.leaves(batch)):
        raise ValueError(f"`{name}` must hold at least one example, got 0.")


def num_examples(batch: _Tree, name: str = "batch") -> int:
    """Returns the length of the leading axis that all leaves of `batch` share."""
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    if not leaves:
        raise ValueError(f"`{name}` must have at least one array, got none.")
    shapes = {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in leaves}
    lengths = {shape[0] for shape in shapes.values() if shape}
    if len(lengths) != 1 or () in shapes.values():
        found = ", ".join(f"{path}: {shape}" for path, shape in shapes.items())
        raise ValueError(
            f"`{name}` must have one leading axis of examples in all of its arrays, got shapes "
            f"{found}. Bind what is not data with jax.tree_util.Partial(loss_fn, state=...)."
        )
    not_empty(name, batch)
    (length,) = lengths
    return length
