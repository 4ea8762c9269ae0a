"""How two trees differ, in the words of an error, and how one becomes the other."""

import math
from typing import Any, TypeAlias

import jax

_Tree: TypeAlias = Any  # `_base` stands on this file

# Of a structure that is longer only the number of leaves is said.
_LONG = 200
_SOME = 4


def written(structure: Any) -> str:
    """A tree structure, as far as it is short."""
    text = str(structure)
    return text if len(text) <= _LONG else f"of {structure.num_leaves} leaves"


def of(tree: _Tree, expected: Any) -> str:
    """What a tree is that has not the structure `expected`."""
    if jax.tree_util.all_leaves([tree]):
        shape = _shape(tree)
        return f"a single array of shape {shape}" if shape else repr(tree)
    wanted, found = _paths(jax.tree.unflatten(expected, range(expected.num_leaves))), _paths(tree)
    lacking = [path for path in wanted if path not in found]
    more = [path for path in found if path not in wanted]
    parts = [
        f"{word} {', '.join(names[:_SOME])}{', ...' if len(names) > _SOME else ''}"
        for word, names in (("without", lacking), ("with", more))
        if names
    ]
    return f"one {' and '.join(parts)}" if parts else str(jax.tree.structure(tree))


def by_ravel(tree: _Tree, like: _Tree) -> str:
    """How a flat vector becomes a tree, or a tree a flat vector, where that is what is missing."""
    here, there = ([_shape(leaf) for leaf in jax.tree.leaves(each)] for each in (tree, like))
    if sum(map(math.prod, here)) != sum(map(math.prod, there)):
        return ""
    if _is_flat(here):
        return (
            " `operator.space.unravel(vector)` makes a tree of a flat vector, as does "
            "`jax.flatten_util.ravel_pytree(params)[1]`."
        )
    if _is_flat(there):
        return (
            " `operator.space.ravel(tree)` makes a flat vector of a tree, as does "
            "`jax.flatten_util.ravel_pytree(tree)[0]`."
        )
    return ""


def _paths(tree: _Tree) -> dict[str, None]:
    found = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): None for path, _ in found}


def _is_flat(shapes: list[tuple[int, ...]]) -> bool:
    return len(shapes) == 1 and len(shapes[0]) == 1


def _shape(leaf: object) -> tuple[int, ...]:
    shape: tuple[int, ...] = getattr(leaf, "shape", ())
    return shape
