"""Carries of loops inside of somebody's `jax.shard_map`, where types say what devices share."""

import operator
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from regjax._base import Tree


def varying(turn: Callable[[Tree], Tree], carry: Tree) -> Tree:
    """Marks what a turn of a loop makes each device's own as such from the start.

    A compiled loop has one type for its carry: zeros, which all devices share, become sums of what
    each has.

    Args:
      turn: carry -> carry, traced only, and only where a mesh has manual axes.
      carry: a tree of arrays.

    Returns:
      The same carry, of the type that it has after any number of turns.
    """
    if not getattr(jax.sharding.get_abstract_mesh(), "manual_axes", ()):
        return carry
    for _ in jax.tree.leaves(carry):  # one leaf may make others so, turn by turn
        marked = jax.tree.map(_marked, carry, jax.eval_shape(turn, carry))
        if all(map(operator.is_, jax.tree.leaves(marked), jax.tree.leaves(carry))):
            break
        carry = marked
    return carry


def _marked(leaf: Any, after: Any) -> Any:
    missing = _axes_of(after) - _axes_of(jax.typeof(leaf))
    return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf


def _axes_of(array_type: Any) -> frozenset[str]:
    """The axes along which it differs, under the name of either JAX."""
    kind = getattr(array_type, "manual_axis_type", None)
    found = getattr(array_type, "vma", None) if kind is None else kind.varying
    return frozenset(found or ())
