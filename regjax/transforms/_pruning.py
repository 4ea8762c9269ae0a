"""Pruned weights that stay pruned, whatever the optimiser does."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from regjax import _checks, _sharding
from regjax._base import Params, Tree
from regjax.transforms import _gradients
from regjax.transforms._static_args import static_args


class HoldMasksState(NamedTuple):
    """State of `hold_masks`.

    Attributes:
      masks: tree of bool arrays like the parameters, False for weights that are held at 0.
    """

    masks: Tree


@static_args("masks")
def hold_masks(
    masks: Tree | Callable[[Params], Tree] = None,
) -> optax.GradientTransformationExtraArgs:
    """Corrects the update so that the weights masked out are 0 after it.

        updates = where(mask, updates, -params)

    Place it last in the chain. Then weights that are masked out are exactly 0 from the first step
    on, and momentum, decay or noise before it cannot bring them back. A mask on the gradient alone
    does not suffice: momentum keeps moving a weight for many steps after it was set to 0, and decay
    and noise do not depend on the gradient.

    The masks are part of the state, so that they can change without a new compilation:
    `update(..., masks=new)` holds the new ones from this step on. A weight that is unmasked again
    starts from 0 with the momentum that it has gathered.

    Example:
      >>> masks = jnp.array([True, False])
      >>> tx = optax.chain(optax.sgd(0.1, momentum=0.9), transforms.hold_masks(masks))
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [0.9 0. ]

    Args:
      masks: tree like the parameters of bool arrays, True for weights that are trained, such as
        `pruning.parameter_masks` returns; or a function params -> such a tree, called at `init`.
        None: nothing is held until `update` gets masks.

    Returns:
      A transformation whose `update` needs `params` and takes `masks`. It must see all parameters
      that the masks cover: place it outside `optax.masked` and `optax.partition`.

    Raises:
      ValueError: the masks are a tree of another structure or other shapes than the parameters, or
        `params` is missing in `update`.
      TypeError: a mask is not bool.
    """

    def init(params: Params) -> HoldMasksState:
        _checks.floating_leaves("params", params)
        found = masks(params) if callable(masks) else masks
        if found is None:
            return HoldMasksState(
                jax.tree.map(lambda leaf: jnp.ones_like(leaf, dtype=bool), params)
            )
        return HoldMasksState(_arrays(found, params))

    def update(
        updates: Params,
        state: HoldMasksState,
        params: Params | None = None,
        *,
        masks: Tree = None,
        **extra: object,
    ) -> tuple[Params, HoldMasksState]:
        del extra
        params = _gradients.check_params(updates, params)
        held = _arrays(state.masks if masks is None else masks, params)

        def correct(mask: jax.Array, leaf: jax.Array, param: jax.Array) -> jax.Array:
            # The wider of both types, or the sum of parameter and update would not be exactly 0.
            dtype = _gradients.sum_dtype(leaf, param)
            return jnp.where(mask, jnp.asarray(leaf, dtype), -jnp.asarray(param, dtype))

        leaves, treedef = jax.tree.flatten(updates)
        corrected = map(correct, jax.tree.leaves(held), leaves, jax.tree.leaves(params))
        return jax.tree.unflatten(treedef, corrected), HoldMasksState(held)

    return optax.GradientTransformationExtraArgs(init, update)


def _arrays(masks: Tree, params: Params) -> Tree:
    if not jax.tree.leaves(params):
        # As `optax.tree_map_params` asks for the state, with a tree of its own without leaves.
        return params
    _checks.same_tree("masks", _checks.bool_tree("masks", masks), params)
    # Each as its weights lie, which the types of the state say on a mesh with explicit axes.
    return jax.tree.map(lambda mask, leaf: _sharding.like(jnp.asarray(mask), leaf), masks, params)
