"""Trees in two parts, of which one is differentiated and the other is carried along."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from regjax import _checks, _selection, _tree
from regjax._base import Mask, Params, Tree

Parts: TypeAlias = tuple[Params, Tree]
"""The parameters, and what is carried along; None where the other one has a leaf."""


def chosen_leaves(wrt: Mask, tree: Tree) -> list[bool]:
    """Returns for each leaf of a tree whether it is a parameter.

    Integers, bools and keys have no derivative: they are carried along, chosen or not.

    Args:
      wrt: the choice; None for all.
      tree: arrays.

    Raises:
      ValueError: no leaf of floating point is chosen, of one or more.
      TypeError: a chosen leaf is complex.
    """
    leaves = jax.tree.leaves(tree)
    chosen = _selection.mask_leaves(wrt, tree, "wrt")
    inside = [
        here and jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
        for leaf, here in zip(leaves, chosen, strict=True)
    ]
    if wrt is not None and not any(inside):
        raise ValueError(
            f"`wrt` must choose at least one leaf of real floating point, got {sum(chosen)} "
            f"others of {len(leaves)} leaves."
        )
    _checks.floating_leaves("params", tree, inside)
    return inside


def divided(tree: dict[str, Any], wrt: Mask) -> Parts:
    """Divides nested dicts by a choice; of each part only what it has is left."""
    inside = chosen_leaves(wrt, tree)
    if all(inside):
        return tree, {}
    first, second = _tree.partition(tree, inside)
    return _without_none(first), _without_none(second)


def joined(one: Tree, other: Tree) -> Tree:
    """Puts two parts together again."""
    if isinstance(one, dict) and isinstance(other, dict):
        both = {**other, **one}
        return {
            name: joined(one[name], other[name]) if name in one and name in other else value
            for name, value in both.items()
        }
    return _tree.merge(one, other)


def restricted(new: Tree, old: Tree) -> Tree:
    """Returns the new values of what there was before: a call may have created more."""
    if not isinstance(old, dict):
        return new
    return {name: restricted(new.get(name, value), value) for name, value in old.items()}


def _without_none(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    kept = {name: _without_none(value) for name, value in tree.items()}
    return {name: value for name, value in kept.items() if jax.tree.leaves(value)}
