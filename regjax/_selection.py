"""Which leaves of a tree are meant: by a mask, by their paths, or by the types of nnx variables."""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
from flax import nnx
from jax.tree_util import Partial

from regjax import _checks

Path: TypeAlias = tuple[Any, ...]
"""Names and numbers that lead to a leaf, as nnx's filters get them: ("layers", 0, "kernel")."""

_Tree: TypeAlias = Any


def mask_leaves(mask: Any, like: _Tree, name: str = "mask") -> list[bool]:
    """Returns one bool for each leaf of a tree: whether it is meant.

    Args:
      mask: a tree of bools like the tree or an upper part of it; a function (path, leaf) -> bool,
        as nnx's filters are, where a leaf is an nnx variable if the tree has those; a filter
        literal of nnx (a type of variables, `...`, a tag, a list of filters, one of which must
        match); a function of one argument, tree -> tree of bools; or None for all.
      like: the tree.
      name: of the argument, for errors.

    Raises:
      ValueError: a filter matches no leaf, or the mask is no upper part of the tree.
      TypeError: the mask holds anything but bools.
    """
    if _is_filter(mask) or (is_function(mask) and _num_arguments(mask) != 1):
        return _filtered(mask, like, name)
    if is_function(mask):
        mask = mask(like)
    return _checks.mask_leaves(mask, like, name)


def floating_leaves(mask: Any, params: _Tree) -> list[bool]:
    """Does the same for parameters, and checks that the chosen ones are real floating point."""
    chosen = mask_leaves(mask, params)
    _checks.floating_leaves("params", params, chosen)
    return chosen


def _filtered(wanted: Any, like: _Tree, name: str) -> list[bool]:
    matches = nnx.filterlib.to_predicate(wanted)
    is_variable = lambda node: isinstance(node, nnx.Variable)
    nodes = jax.tree_util.tree_leaves_with_path(like, is_leaf=is_variable)
    chosen = [
        here
        for path, node in nodes
        for here in [bool(matches(tuple(map(part_of, path)), node))] * len(jax.tree.leaves(node))
    ]
    if chosen and not any(chosen):
        paths = [_written(path) for path, _ in nodes]
        shown = ", ".join(paths[:8]) + (", ..." if len(paths) > 8 else "")
        types = "" if any(is_variable(node) for _, node in nodes) else _NO_VARIABLES
        raise ValueError(
            f"`{name}` must match at least one of the leaves {shown}, got {wanted!r}{types}."
        )
    return chosen


_NO_VARIABLES = (
    ", and the tree has no nnx variables, whose types and tags such a filter could see: choose by "
    "paths, `lambda path, leaf: ...`"
)


def part_of(entry: Any) -> Any:
    """The name or the number in an entry of a path of JAX."""
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry


def _written(path: Path) -> str:
    return "/".join(str(part_of(entry)) for entry in path)


def _is_filter(mask: Any) -> bool:
    """Tells a literal of nnx from a tree of bools: no leaf of it is a bool."""
    if isinstance(mask, (list, tuple)):
        return bool(mask) and all(_is_filter(part) or is_function(part) for part in mask)
    return isinstance(mask, (type, str)) or mask is Ellipsis


def is_function(value: Any, *, is_leaf: Callable[[Any], bool] | None = None) -> bool:
    """Tells a function from a tree that can be called, as a module of Equinox."""
    leaves = jax.tree.leaves(value, is_leaf=is_leaf)
    return callable(value) and (isinstance(value, Partial) or all(map(callable, leaves)))


def _num_arguments(function: Callable[..., Any]) -> int:
    """How many arguments a function must have; 2 if it does not say."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in by_place and p.default is p.empty]
    return len(needed)
