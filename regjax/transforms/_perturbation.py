"""Gaussian noise on the weights, of one group of leaves at a time or of all of them."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks, _layouts, _loops, _selection, _tree
from regjax._axes import Axes, Layouts
from regjax._base import Mask, Params, PRNGKey, Tree
from regjax.transforms import _gaussian, _schedules


def perturbed(
    params: Params,
    *,
    std: ArrayLike,
    key: PRNGKey,
    count: jax.Array,
    layerwise: bool,
    cyclic: bool,
    groups: Tree,
    mask: Mask,
    layout: Layouts,
) -> Params:
    """Adds the noise of update `count` to the weights: a copy in float32 at least.

    Noise of less than half a unit of rounding of bfloat16 would be lost in its sum with the
    weights. `std=0` gives `params` themselves.
    """
    numbers = group_numbers(groups, params, mask, layout)
    if _schedules.is_zero(std):
        return params
    num_groups = 1 + max((int(n.max()) for n in numbers if n is not None), default=0)
    noise_key, group_key = jax.random.split(jax.random.fold_in(key, count))
    chosen = None
    if layerwise and cyclic:
        chosen = count % num_groups
    elif layerwise:
        chosen = jax.random.randint(group_key, (), 0, num_groups, jnp.int32)
    else:
        std = std / math.sqrt(num_groups)
    leaves, treedef = jax.tree.flatten(params)
    leaves = list(map(_tree.wide, leaves))
    places = [i for i, number in enumerate(numbers) if number is not None]
    keys = dict(zip(places, jax.random.split(noise_key, len(places)), strict=True))

    def noisy(leaves: list[jax.Array], places: Sequence[int]) -> list[jax.Array]:
        leaves = list(leaves)
        for i in places:
            drawn = _gaussian.normal(keys[i], leaves[i])
            moved = leaves[i] + jnp.asarray(std, drawn.dtype) * drawn
            ours = True if chosen is None else chosen == numbers[i]
            leaves[i] = jnp.where(ours, moved, leaves[i])
        return leaves

    if chosen is None:
        leaves = noisy(leaves, places)
    else:
        # Draws take most of the time: only those of the group are made.
        found, which = _leaves_of_groups(numbers, num_groups)
        branches = [functools.partial(noisy, places=own) for own in found]
        leaves = _loops.switch(jnp.asarray(which)[chosen], branches, leaves)
    return jax.tree.unflatten(treedef, leaves)


def _leaves_of_groups(
    numbers: list[np.ndarray | None], num_groups: int
) -> tuple[list[tuple[int, ...]], np.ndarray]:
    """Returns sets of leaves that share a group, and which of them each group has."""
    own = [
        tuple(i for i, n in enumerate(numbers) if n is not None and group in n)
        for group in range(num_groups)
    ]
    found = sorted(set(own))
    return found, np.array([found.index(places) for places in own], np.int32)


def group_numbers(
    groups: Tree, params: Params, mask: Mask, layout: Layouts
) -> list[np.ndarray | None]:
    """Numbers the groups from 0 among the masked leaves; None outside of the mask.

    Arrays that broadcast to the leaves: of stacked layers each one has a number, which it shares
    with the same layer of the other leaves of its group.
    """
    chosen = _selection.mask_leaves(mask, params)
    if groups is None:
        given: list[int] = list(range(len(chosen)))
    else:
        given = _checks.prefix_leaves("groups", groups, params)
        for group in given:
            _checks.integer("groups", group, minimum=0)
    axes = _layouts.of_leaves(layout, params, chosen)
    leaves = jax.tree.leaves(params)
    stacks = [own.stack_shape(jnp.shape(leaf)) for own, leaf in zip(axes, leaves, strict=True)]
    names = [
        [(group, *index) for index in np.ndindex(*stack)] if choose else []
        for group, stack, choose in zip(given, stacks, chosen, strict=True)
    ]
    order = {name: i for i, name in enumerate(sorted({n for own in names for n in own}))}

    def numbered(own: Axes, stack: tuple[int, ...], names: list[tuple[int, ...]]) -> np.ndarray:
        numbers = np.array([order[name] for name in names], np.int32)
        numbers = numbers.reshape((*stack, *[1] * len(own.layer)))
        return np.moveaxis(numbers, range(len(stack)), own.stack)

    rows = zip(axes, stacks, names, chosen, strict=True)
    return [numbered(own, stack, names) if choose else None for own, stack, names, choose in rows]
