"""Gaussian noise on the weights, of one group of leaves at a time or of all of them."""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _tree
from regjax._base import Params, PRNGKey, Tree
from regjax.transforms import _gaussian, _masks, _schedules
from regjax.transforms._masks import MaskOrFunction


def perturbed(
    params: Params,
    *,
    std: ArrayLike,
    key: PRNGKey,
    count: jax.Array,
    layerwise: bool,
    cyclic: bool,
    groups: Tree,
    mask: MaskOrFunction,
) -> Params:
    """Adds the noise of update `count` to the weights: a copy in float32 at least.

    Noise of less than half a unit of rounding of bfloat16 would be lost in its sum with the
    weights. `std=0` gives `params` themselves.
    """
    numbers = group_numbers(groups, params, mask)
    if _schedules.is_zero(std):
        return params
    num_groups = 1 + max((n for n in numbers if n is not None), default=0)
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
    noise = _gaussian.normal_like(noise_key, [leaves[i] for i in places])
    for i, drawn in zip(places, noise, strict=True):
        noisy = leaves[i] + jnp.asarray(std, drawn.dtype) * drawn
        leaves[i] = noisy if chosen is None else jnp.where(chosen == numbers[i], noisy, leaves[i])
    return jax.tree.unflatten(treedef, leaves)


def group_numbers(groups: Tree, params: Params, mask: MaskOrFunction) -> list[int | None]:
    """Numbers the group of each leaf from 0 among the masked ones; None outside of the mask."""
    chosen = _masks.mask_leaves(mask, params)
    if groups is None:
        given: list[int] = list(range(len(chosen)))
    else:
        given = _checks.prefix_leaves("groups", groups, params)
        for group in given:
            _checks.integer("groups", group, minimum=0)
    order = sorted({group for group, choose in zip(given, chosen, strict=True) if choose})
    return [
        order.index(group) if choose else None for group, choose in zip(given, chosen, strict=True)
    ]
