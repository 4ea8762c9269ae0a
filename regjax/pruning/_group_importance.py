"""Importance of groups of weights where there is no gate: of filters, of stages, of blocks."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from regjax import _checks, _tree

GroupSums = Callable[[jax.Array], jax.Array]
"""The sums (num_groups,) of an array of all weights over each group."""


def square_of_sum(products: jax.Array, sums: GroupSums) -> jax.Array:
    """(sum_s g_s w_s)^2, the first-order change of the loss when the whole group is removed.

    For the filters in front of a batch norm in train mode the sum is 0, as their scale does not
    change the loss; what is left is rounding.

    Args:
      products: (n,), gradient times value of each weight.
      sums: adds an array (n,) up over each group.

    Returns:
      The importance of the groups (num_groups,).
    """
    return sums(products) ** 2


def sum_of_squares(products: jax.Array, sums: GroupSums) -> jax.Array:
    """sum_s (g_s w_s)^2, the weights' own importance added up.

    Args:
      products: (n,), gradient times value of each weight.
      sums: adds an array (n,) up over each group.

    Returns:
      The importance of the groups (num_groups,).
    """
    return sums(products**2)


def sum_of_absolute(products: jax.Array, sums: GroupSums) -> jax.Array:
    """sum_s |g_s w_s|.

    Args:
      products: (n,), gradient times value of each weight.
      sums: adds an array (n,) up over each group.

    Returns:
      The importance of the groups (num_groups,).
    """
    return sums(jnp.abs(products))


def group_importance(
    values: Any,
    grads: Any,
    groups: Any,
    *,
    num_groups: int,
    reduce: Callable[[jax.Array, GroupSums], jax.Array] = square_of_sum,
) -> jax.Array:
    """First-order importance of groups of weights, where there is no gate.

    Args:
      values: tree of weights w.
      grads: tree like `values`, the gradients g of one batch's loss.
      groups: tree like `values` of int32 arrays that broadcast to its leaves: the number of each
        weight's group, -1 for none. `jnp.arange(c)` makes each of the c filters of a kernel one.
      num_groups: number of groups.
      reduce: how the products g w of a group become one number: `square_of_sum` is the criterion
        of the paper, `sum_of_squares` that of its code on weights; they rank differently.

    Returns:
      The importance (num_groups,), in float32 at least.

    Raises:
      ValueError: the trees differ, or `num_groups` is below 1.
      TypeError: a leaf has the wrong dtype.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771.
    """
    _checks.floating_tree("values", values)
    _checks.same_tree("grads", grads, values)
    _checks.same_structure("groups", groups, values)
    _checks.integer("num_groups", num_groups)
    labels = []
    for value, group in zip(jax.tree.leaves(values), jax.tree.leaves(groups), strict=True):
        if not jnp.issubdtype(jnp.result_type(group), jnp.integer):
            raise TypeError(f"`groups` must hold integers, got {jnp.result_type(group)}.")
        labels.append(jnp.ravel(jnp.broadcast_to(group, jnp.shape(value))))
    dtype = _tree.vector_dtype(values)
    products = _tree.ravel(values, dtype) * _tree.ravel(grads, dtype)
    sums = functools.partial(
        jax.ops.segment_sum, segment_ids=jnp.concatenate(labels), num_segments=num_groups
    )
    return reduce(products, sums)
