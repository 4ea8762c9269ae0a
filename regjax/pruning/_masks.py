"""Masks: which units, or single weights, are still there. True is kept, False removed.

Trees of scores are compared as a whole, by their order: a threshold would take all that tie.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from regjax import _checks, _layouts, _loops, _tree
from regjax._arguments import checked
from regjax._axes import Axes, Layouts
from regjax._base import Tree
from regjax._one_program import one_program


def full_masks(scores: Tree) -> Tree:
    """Makes masks that keep everything.

    Example:
      >>> print(pruning.full_masks({"a": jnp.array([0.3, 0.1])})["a"])
      [ True  True]

    Args:
      scores: tree of arrays: scores, gates or parameters.

    Returns:
      A tree like `scores` of bool arrays, all True.

    Raises:
      TypeError: a leaf is not real floating point.
    """
    _checks.floating_tree("scores", scores)
    return jax.tree.map(lambda leaf: jnp.ones(jnp.shape(leaf), bool), scores)


def gates_from_masks(masks: Tree, *, dtype: DTypeLike = jnp.float32) -> Tree:
    """Makes gates of 1 for units that are kept and 0 for units that are removed.

    Example:
      >>> print(pruning.gates_from_masks({"a": jnp.array([True, False])})["a"])
      [1. 0.]

    Args:
      masks: tree of bool arrays.
      dtype: type of the gates; take that of the parameters.

    Returns:
      A tree like `masks`.

    Raises:
      TypeError: a leaf is not bool.
    """
    _checks.bool_tree("masks", masks)
    return jax.tree.map(lambda mask: jnp.asarray(mask).astype(dtype), masks)


@checked
def mask_lowest(
    scores: Tree,
    masks: Tree,
    num_to_remove: int | jax.Array,
    *,
    min_units: int = 1,
    layout: Layouts = None,
) -> Tree:
    """Removes the `num_to_remove` units or weights with the lowest scores of all leaves together.

    Exactly this many are removed. Of equal scores the first one in the order of `jax.tree.leaves`
    is removed first. At least `min_units` stay in each leaf, those with its highest scores, and in
    each of several stacked layers. Units that were removed before do not count.

    Example:
      >>> scores = {"a": jnp.array([0.3, 0.1, 0.2]), "b": jnp.array([0.05, 0.04])}
      >>> masks = pruning.mask_lowest(scores, pruning.full_masks(scores), 2)
      >>> print(masks["a"], masks["b"])  # "b" keeps one unit
      [ True False  True] [ True False]

    Args:
      scores: tree of scores, a leaf for each group of units, or for each array of weights.
      masks: tree like `scores` of bool arrays, True for what is still there.
      num_to_remove: Python integer, or an integer array () such as a schedule returns.
      min_units: least number to keep in each leaf. Leaves that have no more are left alone.
      layout: which axes of the leaves stack layers (`regjax.Layout`); None: a guess.

    Returns:
      The new masks, a tree like `scores` of bool arrays. Inside `jit`, where the numbers are not
      known beforehand: if the count is too large, all that can be removed is removed; a count below
      0 removes nothing; and nothing is removed if a score is NaN.

    Raises:
      ValueError: the trees differ, a number is negative, this many cannot be removed, the score of
        a unit that is still there is NaN, or `layout` must tell the axes of a leaf.
      TypeError: a leaf or a number has the wrong type.
    """
    _checks.floating_tree("scores", scores)
    _checks.same_tree("masks", _checks.bool_tree("masks", masks), scores)
    _checks.integer("min_units", min_units, minimum=0)
    leaves, kept = jax.tree.leaves(scores), jax.tree.leaves(masks)
    rows = list(zip(leaves, kept, _layouts.of_leaves(layout, scores), strict=True))
    removable = _flat([_above_floor(*row, min_units) for row in rows], jnp.dtype(bool))
    count = _check_count(num_to_remove, removable, min_units, rows)
    rank = _ranks(_flat(leaves, _tree.vector_dtype(scores)), removable)
    goes = removable & (rank < count) & ~_some_unknown(scores, masks)
    return _like(_flat(kept, jnp.dtype(bool)) & ~goes, masks)


_Row: TypeAlias = tuple[jax.Array, jax.Array, Axes]
"""Scores, masks and axes of one leaf."""


def _flat(leaves: list[jax.Array], dtype: jnp.dtype) -> jax.Array:
    return jnp.concatenate([jnp.ravel(leaf).astype(dtype) for leaf in leaves])


def _some_unknown(scores: Tree, masks: Tree) -> jax.Array:
    """Tells whether a score that counts is NaN; where that is known now, it is refused."""
    unknown = jnp.zeros((), bool)
    for (path, leaf), mask in zip(
        jax.tree_util.tree_leaves_with_path(scores), jax.tree.leaves(masks), strict=True
    ):
        found = jnp.any(jnp.isnan(leaf) & mask)
        if _checks.host_value(found):
            raise ValueError(
                f"`scores{jax.tree_util.keystr(path)}` must be numbers where `masks` are True, "
                "got NaN."
            )
        unknown |= found
    return unknown


def _check_count(
    num_to_remove: int | jax.Array, removable: jax.Array, min_units: int, rows: list[_Row]
) -> int | jax.Array:
    """Compares the count with what can go as far as that is known at trace time."""
    if isinstance(num_to_remove, jax.Array):
        if num_to_remove.shape or not jnp.issubdtype(num_to_remove.dtype, jnp.integer):
            raise TypeError(
                f"`num_to_remove` must be one integer, got {num_to_remove.dtype} of shape "
                f"{num_to_remove.shape}."
            )
        known = _checks.host_value(num_to_remove)
        if known is not None and known < 0:
            raise ValueError(f"`num_to_remove` must be non-negative, got {known}.")
        return num_to_remove
    count = _checks.integer("num_to_remove", num_to_remove, minimum=0)
    if _loops.is_concrete(removable):
        most = int(removable.sum())
    else:
        most = 0
        for leaf, _, axes in rows:
            num_layers = math.prod(axes.stack_shape(leaf.shape))
            most += num_layers * max(leaf.size // num_layers - min_units, 0)
    if count > most:
        raise ValueError(
            f"`num_to_remove` must be at most {most}, what is there less `min_units` = {min_units} "
            f"in each leaf, got {count}."
        )
    return count


@one_program()
def _ranks(scores: jax.Array, among: jax.Array) -> jax.Array:
    """Ranks each score among those chosen, from 0; the others come behind all of them."""
    order = jnp.lexsort((scores, ~among))
    numbers = jnp.arange(scores.size, dtype=jnp.int32)
    return jnp.zeros(scores.size, jnp.int32).at[order].set(numbers)


@one_program(static=("axes", "min_units"))
def _above_floor(scores: jax.Array, kept: jax.Array, axes: Axes, min_units: int) -> jax.Array:
    """Marks those kept that may go so that the `min_units` highest of each layer stay."""

    def of_layer(scores: jax.Array, kept: jax.Array) -> jax.Array:
        rank = _ranks(jnp.ravel(scores), jnp.ravel(kept)).reshape(kept.shape)
        return kept & (rank < jnp.sum(kept) - min_units)

    return axes.restack(axes.over_stack(of_layer)(jnp.asarray(scores), jnp.asarray(kept)))


@one_program()
def _like(flat: jax.Array, masks: Tree) -> Tree:
    pieces, start = [], 0
    for leaf in jax.tree.leaves(masks):
        pieces.append(flat[start : start + jnp.size(leaf)].reshape(jnp.shape(leaf)))
        start += jnp.size(leaf)
    return jax.tree.unflatten(jax.tree.structure(masks), pieces)
