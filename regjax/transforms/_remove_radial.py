"""AdamP: no step along weights whose scale does not change the loss."""

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax import _checks, _layouts, _numerics, _selection, _tree
from regjax._arguments import checked
from regjax._axes import Axes, Layouts
from regjax._base import Mask, Params
from regjax.transforms import _gradients
from regjax.transforms._static_args import static_args
from regjax.transforms._wrappers import with_extra_args


@static_args("tx", "mask", "layout")
@checked
def remove_radial(
    tx: optax.GradientTransformation,
    *,
    mask: Mask = None,
    threshold: ArrayLike = 0.1,
    weight_decay: ArrayLike = 0.0,
    weight_decay_ratio: ArrayLike = 0.1,
    layout: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    """Removes from an update the part along weights whose norm does not change the loss.

        cosine(g_r, w_r) < threshold / sqrt(d) in all groups r of a leaf:
            u_r <- u_r - w_r <w_r, u_r> / |w_r|^2,     weight decay times `weight_decay_ratio`

    If the loss does not depend on the norm of w_r, its gradient g_r is orthogonal to w_r. Such
    groups r of d weights are found by the incoming gradient. The update u_r that `tx` makes of it
    is not orthogonal: momentum and Adam's scaling add a part along the weights, which makes them
    grow, and this part is removed. The groups are the output channels, or else the whole leaf,
    whichever passes the test first. Each of several stacked layers counts as a leaf. Biases and
    scales of normalizations are left as they are.

    AdamP is

        optax.chain(
            remove_radial(optax.scale_by_adam(), weight_decay=1e-2),
            optax.scale_by_learning_rate(1e-3),
        )

    and SGDP has `optax.trace(m)` instead of Adam, and its weight decay divided by 1 - m.

    Example:
      >>> tx = transforms.remove_radial(optax.scale_by_adam())
      >>> params = jnp.array([[3.0], [4.0]])  # one filter of two weights
      >>> grads = jnp.array([[-0.8], [0.6]])  # orthogonal to it, of which Adam alone makes [-1, 1]
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> print(updates.ravel(), f"{abs(jnp.vdot(params, updates)):.1f}")
      [-1.12  0.84] 0.0

    Args:
      tx: the transformation that makes the update of the gradient. With weight decay it must not
        contain the learning rate.
      mask: leaves that may be projected and are decayed; None: all.
      threshold: of the cosine times the square root of the size of a group.
      weight_decay: multiple of the weights that is added to the update; the learning rate that
        follows changes the sign. In units of the update over the weights.
      weight_decay_ratio: factor of the weight decay where the update was projected.
      layout: which axes of the leaves are channels, and which stack layers (`regjax.Layout`); None:
        a guess, which for plain kernels is that the channels are last.

    Returns:
      A transformation with the state of `tx`. Its `update` needs `params`.

    Raises:
      ValueError: a number is negative, the axes of a masked leaf have to be told, or `params` is
        missing in `update`.

    References:
      B. Heo et al. (2021), arXiv:2006.08217. Form and defaults are those of the authors' code,
      which adds 1e-8 to the norms; here a zero group is left alone.
    """
    _checks.number("threshold", threshold)
    _checks.number("weight_decay", weight_decay)
    _checks.number("weight_decay_ratio", weight_decay_ratio)
    tx = with_extra_args(tx)

    def init(params: Params) -> optax.OptState:
        _layouts.of_leaves(layout, params, _selection.floating_leaves(mask, params))
        return tx.init(params)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None, **extra: object
    ) -> tuple[Params, optax.OptState]:
        params = _gradients.check_params(updates, params)
        chosen = _selection.mask_leaves(mask, params)
        grads = updates
        updates, state = tx.update(grads, state, params, **extra)

        def correct(
            update: jax.Array, grad: jax.Array, w: jax.Array, choose: bool, axes: Axes
        ) -> jax.Array:
            if not choose:
                return update
            u, w = _tree.wide(update), _tree.wide(w)
            decay = jnp.asarray(weight_decay, w.dtype)
            if axes.is_kernel:
                u, projected = _project(u, _tree.wide(grad), w, threshold, axes)
                ratio = jnp.asarray(weight_decay_ratio, w.dtype)
                decay = decay * jnp.where(projected, ratio, jnp.ones_like(ratio))
            return (u + decay * w).astype(update.dtype)

        leaves, treedef = jax.tree.flatten(updates)
        axes = _layouts.of_leaves(layout, params, chosen)
        trees = (leaves, jax.tree.leaves(grads), jax.tree.leaves(params))
        corrected = map(correct, *trees, chosen, axes)
        return jax.tree.unflatten(treedef, corrected), state

    return optax.GradientTransformationExtraArgs(init, update)


def _project(
    u: jax.Array, grad: jax.Array, w: jax.Array, threshold: ArrayLike, axes: Axes
) -> tuple[jax.Array, jax.Array]:
    """Takes from `u` its part along `w`, where `grad` has none, and says in which layers it did."""
    (by_channel, in_channels), (by_leaf, in_leaf) = (
        _project_groups(u, grad, w, threshold, axes.group(per_filter), axes.layer)
        for per_filter in (True, False)
    )
    return jnp.where(in_channels, by_channel, jnp.where(in_leaf, by_leaf, u)), in_channels | in_leaf


def _project_groups(
    u: jax.Array,
    grad: jax.Array,
    w: jax.Array,
    threshold: ArrayLike,
    group: tuple[int, ...],
    layer: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    unit_w, unit_grad = _numerics.units_along(w, group), _numerics.units_along(grad, group)
    cosine = jnp.abs(jnp.sum(unit_w * unit_grad, group, keepdims=True))
    small = jnp.max(cosine, layer, keepdims=True) < threshold / (w.size // cosine.size) ** 0.5
    return u - jnp.sum(unit_w * u, group, keepdims=True) * unit_w, small
