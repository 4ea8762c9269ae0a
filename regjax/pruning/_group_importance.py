"""Importance of groups of weights where there is no gate: of filters, of stages, of blocks."""

import functools
import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _layouts, _selection
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import Mask, Params, Tree
from regjax._printing import legible
from regjax._space import Space

_REDUCTIONS = ("square_of_sum", "sum_of_squares", "sum_of_absolute")


@legible
class FilterGroupsResult(NamedTuple):
    """The filters of the kernels as groups of weights.

    Attributes:
      groups: tree like the parameters of int32 arrays that broadcast to its leaves: the number of
        each weight's filter, or -1 for none.
      num_groups: number of filters.
    """

    groups: Tree
    num_groups: int


@checked
def filter_groups(
    params: Params, *, mask: Mask = None, layout: Layouts = None
) -> FilterGroupsResult:
    """Numbers the filters of all kernels: the weights of each unit of each layer.

    The numbers start at 0 and follow the order of the leaves. Stacked layers follow one another.

    Example:
      >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
      >>> groups = pruning.filter_groups(params)
      >>> print(groups.num_groups, groups.groups["kernel"].ravel())  # a filter is a column
      3 [0 1 2]

    Args:
      params: tree of parameters.
      mask: which kernels count; None: all.
      layout: which axes of the leaves are inputs, units and layers (`regjax.Layout`); None: a
        guess, which for plain kernels is that the units are last.

    Returns:
      A `FilterGroupsResult`, for `group_importance`.

    Raises:
      ValueError: the mask is another tree, or the axes of a leaf have to be told.
      TypeError: a parameter is not real floating point, or `mask` holds other things than bools.
    """
    leaves, treedef = jax.tree.flatten(_checks.floating_tree("params", params))
    chosen = _selection.mask_leaves(mask, params)
    groups, start = [], 0
    for leaf, choose, axes in zip(
        leaves, chosen, _layouts.of_leaves(layout, params, chosen), strict=True
    ):
        if not (choose and axes.is_kernel):
            groups.append(jnp.full((), -1, jnp.int32))
            continue
        order = (*axes.stack, *axes.outputs)
        lengths = [leaf.shape[axis] for axis in order]
        numbers = start + jnp.arange(math.prod(lengths), dtype=jnp.int32).reshape(lengths)
        in_order = jnp.transpose(numbers, [order.index(axis) for axis in axes.units])
        groups.append(jnp.expand_dims(in_order, axes.inputs))
        start += numbers.size
    return FilterGroupsResult(jax.tree.unflatten(treedef, groups), start)


@checked
def group_importance(
    params: Params,
    grads: Params,
    *,
    groups: Tree,
    num_groups: int,
    reduction: Literal["square_of_sum", "sum_of_squares", "sum_of_absolute"] = "square_of_sum",
) -> jax.Array:
    """Computes the first-order importance of groups of weights, where there is no gate.

        "square_of_sum"     (sum_s g_s w_s)^2
        "sum_of_squares"    sum_s (g_s w_s)^2
        "sum_of_absolute"   sum_s |g_s w_s|

    The sums go over the weights w_s of a group, with the loss's gradients g_s. The first is the
    squared change of the loss to first order when the whole group is removed, the criterion of the
    paper. The second is that of the paper's code on weights, which ranks differently. For filters
    before a batch norm in train mode the first is rounding alone, because their scale does not
    change the loss.

    Example:
      >>> params = {"kernel": jnp.array([[1.0, 2.0], [1.0, 0.0]])}
      >>> grads = {"kernel": jnp.array([[3.0, 1.0], [-2.0, 5.0]])}
      >>> filters = pruning.filter_groups(params)  # the columns
      >>> scores = pruning.group_importance(
      ...     params, grads, groups=filters.groups, num_groups=filters.num_groups
      ... )
      >>> print(scores)  # (3 - 2)^2 and (2 * 1)^2
      [1. 4.]

    Args:
      params: tree of weights w.
      grads: tree like `params`, the gradients g of one batch's loss.
      groups: tree like `params` of int32 arrays that broadcast to its leaves: the number of each
        weight's group, or -1 for none. `filter_groups` makes each filter a group.
      num_groups: number of groups.
      reduction: how the products g w of a group become one number.

    Returns:
      The importance (num_groups,), in float32 at least.

    Raises:
      ValueError: the trees differ, `num_groups` is below 1, a group has no such number or another
        shape, or `reduction` is unknown.
      TypeError: a leaf has the wrong dtype.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771.
    """
    _checks.floating_tree("params", params)
    _checks.same_tree("grads", _checks.floating_tree("grads", grads), params)
    _checks.same_structure("groups", groups, params)
    _checks.integer("num_groups", num_groups)
    _checks.choice("reduction", reduction, _REDUCTIONS)
    labels = []
    for value, group in zip(jax.tree.leaves(params), jax.tree.leaves(groups), strict=True):
        if not jnp.issubdtype(jnp.result_type(group), jnp.integer):
            raise TypeError(f"`groups` must hold integers, got {jnp.result_type(group)}.")
        labels.append(jnp.ravel(_spread(group, jnp.shape(value), num_groups)))
    space = Space.of(params)
    products = space.ravel(params) * space.ravel(grads)
    sums = functools.partial(
        jax.ops.segment_sum, segment_ids=jnp.concatenate(labels), num_segments=num_groups
    )
    if reduction == "square_of_sum":
        return sums(products) ** 2
    return sums(products**2 if reduction == "sum_of_squares" else jnp.abs(products))


def _spread(group: jax.Array, shape: tuple[int, ...], num_groups: int) -> jax.Array:
    known = _checks.host_value(group)
    if known is not None and not ((known >= -1) & (known < num_groups)).all():
        raise ValueError(
            f"`groups` must hold numbers from -1 to {num_groups - 1}, got {known.min()} to "
            f"{known.max()}."
        )
    own = jnp.shape(group)
    pairs = zip(reversed(own), reversed(shape), strict=False)
    if len(own) > len(shape) or any(one not in (1, other) for one, other in pairs):
        raise ValueError(
            f"`groups` must broadcast to the shapes of `params`, got {own} for {shape}."
        )
    return jnp.broadcast_to(group, shape)
