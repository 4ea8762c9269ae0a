"""AdamP: no step along weights whose scale does not change the loss."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax import _checks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Params
from regjax.transforms import _gradients, _masks
from regjax.transforms._masks import MaskOrFunction
from regjax.transforms._static_args import static_args
from regjax.transforms._wrappers import with_extra_args


@static_args("tx", "mask")
@checked
def remove_radial(
    tx: optax.GradientTransformation,
    *,
    mask: MaskOrFunction = None,
    threshold: ArrayLike = 0.1,
    weight_decay: ArrayLike = 0.0,
    weight_decay_ratio: ArrayLike = 0.1,
) -> optax.GradientTransformationExtraArgs:
    """Takes the part along the weights out of what `tx` makes of a gradient orthogonal to them.

        cosine(g_r, w_r) < threshold / sqrt(d) in all groups r of a leaf:
            u_r <- u_r - w_r <w_r, u_r> / |w_r|^2,     weight decay times `weight_decay_ratio`

    A loss that does not depend on the norm of w_r has a gradient g_r that is orthogonal to it, and
    this is how such weights are found: by the gradient that comes in, not by the update u that `tx`
    makes of it, because momentum and Adam's scaling have a part along the weights, which makes
    them grow. Groups of d weights are first the output channels (all axes but the last), then the
    whole leaf; the first of the two that passes is taken. Leaves with less than two axes are
    left as they are.

    AdamP is `optax.chain(remove_radial(optax.scale_by_adam(), weight_decay=1e-2),
    optax.scale_by_learning_rate(1e-3))`; SGDP has `optax.trace(m)` in the place of Adam, and its
    weight decay over 1 - m.

    Deviation: the official code adds 1e-8 to the norms; here a zero group is left alone.

    Args:
      tx: makes the update of the gradient, before the learning rate where there is weight decay.
      mask: leaves that may be projected and are decayed; None for all.
      threshold: of the cosine times the root of the size of a group; delta in the official code.
      weight_decay: multiple of the weights that is added to the update; the learning rate that
        follows turns the sign. In units of the update over the weights.
      weight_decay_ratio: factor of the weight decay where the update was projected.

    Returns:
      A transformation with the state of `tx`, whose `update` needs `params`.

    Raises:
      ValueError: a number is negative, or `params` is missing in `update`.

    References:
      B. Heo et al. (2021), arXiv:2006.08217; the form and the defaults are those of the authors'
      code, the paper's body was not read.
    """
    _checks.number("threshold", threshold)
    _checks.number("weight_decay", weight_decay)
    _checks.number("weight_decay_ratio", weight_decay_ratio)
    tx = with_extra_args(tx)

    def init(params: Params) -> optax.OptState:
        _masks.floating_leaves(mask, params)
        return tx.init(params)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None, **extra: object
    ) -> tuple[Params, optax.OptState]:
        params = _gradients.check_params(updates, params)
        chosen = _masks.mask_leaves(mask, params)
        grads = updates
        updates, state = tx.update(grads, state, params, **extra)

        def correct(update: jax.Array, grad: jax.Array, w: jax.Array, choose: bool) -> jax.Array:
            if not choose:
                return update
            u, w = _tree.wide(update), _tree.wide(w)
            decay = jnp.asarray(weight_decay, w.dtype)
            if w.ndim >= 2:
                u, projected = _project(u, _tree.wide(grad), w, threshold)
                ratio = jnp.asarray(weight_decay_ratio, w.dtype)
                decay = decay * jnp.where(projected, ratio, jnp.ones_like(ratio))
            return (u + decay * w).astype(update.dtype)

        leaves, treedef = jax.tree.flatten(updates)
        corrected = map(correct, leaves, jax.tree.leaves(grads), jax.tree.leaves(params), chosen)
        return jax.tree.unflatten(treedef, corrected), state

    return optax.GradientTransformationExtraArgs(init, update)


def _project(
    u: jax.Array, grad: jax.Array, w: jax.Array, threshold: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Takes from `u` its part along `w`, where `grad` has none, and says whether it did."""
    (by_channel, in_channels), (by_leaf, in_leaf) = (
        _project_groups(u, grad, w, threshold, per_filter=per_filter)
        for per_filter in (True, False)
    )
    return jnp.where(in_channels, by_channel, jnp.where(in_leaf, by_leaf, u)), in_channels | in_leaf


def _project_groups(
    u: jax.Array, grad: jax.Array, w: jax.Array, threshold: ArrayLike, *, per_filter: bool
) -> tuple[jax.Array, jax.Array]:
    axes = _tree.group_axes(w, per_filter)
    unit_w, unit_grad = _numerics.units_along(w, axes), _numerics.units_along(grad, axes)
    cosine = jnp.abs(jnp.sum(unit_w * unit_grad, axes, keepdims=True))
    small = jnp.max(cosine) < threshold / (w.size // cosine.size) ** 0.5
    return u - jnp.sum(unit_w * u, axes, keepdims=True) * unit_w, small
