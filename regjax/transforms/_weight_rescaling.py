"""Unit-norm filters: weights that feed a normalisation have no scale, only a direction."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax import _checks, _layouts, _numerics, _selection, _tree
from regjax._arguments import checked
from regjax._axes import Axes, Layouts
from regjax._base import Mask, Params, Tree
from regjax.transforms import _gradients
from regjax.transforms._static_args import check_static, static_args


class RescaleWeightsState(NamedTuple):
    """State of `rescale_weights`.

    Attributes:
      num_updates: (), int32, updates so far.
    """

    num_updates: jax.Array


@static_args("mask", "per_filter", "every", "layout")
@checked
def rescale_weights(
    *,
    mask: Mask,
    target_norm: ArrayLike = 1.0,
    per_filter: bool = True,
    every: int = 1,
    layout: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    """Corrects the update so that the masked weights end with a given norm, group by group.

        q = params + updates,   q_r <- target_norm q_r / |q_r| in each group r of masked weights

    Place it last in the chain. If the scale of weights does not change the loss, because a batch
    norm follows them, their norm only sets the effective learning rate, eta / |w|^2. Apply weight
    decay to the other leaves. Unmasked leaves, and the steps between two rescalings, pass through
    bit for bit. A group of zeros is left alone.

    Momentum is not changed. With `every=1` it stays right to first order in the step. After a
    single large rescaling use `rescale_velocity`, and `normalization.rescale_statistics` for
    running batch statistics.

    Example:
      >>> tx = transforms.rescale_weights(mask={"kernel": True, "bias": False})
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.array([2.0])}
      >>> updates = jax.tree.map(jnp.zeros_like, params)
      >>> updates, state = tx.update(updates, tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["kernel"].ravel(), params["bias"])
      [0.6 0.8] [2.]

    Args:
      mask: leaves to rescale. They must be scale-invariant; `diagnostics.scale_invariant_mask`
        finds such leaves.
      target_norm: norm after the step, in units of the parameters.
      per_filter: True: one norm for each output channel. False: one for each leaf, or for each of
        the layers that are stacked in it.
      every: number of steps between two rescalings.
      layout: which axes of the leaves are channels, and which stack layers (`regjax.Layout`); None:
        a guess, which for plain kernels is that the channels are last.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      ValueError: an argument is out of its range, a masked leaf has no input axes or axes that
        have to be told, or `params` is missing in `update`.
      TypeError: an argument has the wrong type.

    References:
      Z. Liu, Y. Cui, J. Wan, Y. Mao, A. Chan (2021), arXiv:2102.03497. Granularity, period, and the
      treatment of momentum are our choices.
    """
    _checks.number("target_norm", target_norm, above_zero=True)
    check_static("every", every, 1)
    _checks.boolean("per_filter", per_filter)

    def init(params: Params) -> RescaleWeightsState:
        chosen = _selection.floating_leaves(mask, params)
        paths = jax.tree_util.tree_leaves_with_path(params)
        axes = _layouts.of_leaves(layout, params, chosen)
        for (path, leaf), choose, own in zip(paths, chosen, axes, strict=True):
            if choose and per_filter and not own.is_kernel:
                raise ValueError(
                    f"`mask` must leave out leaves without input axes, got "
                    f"{jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}."
                )
        return RescaleWeightsState(jnp.int32(0))

    def update(
        updates: Params, state: RescaleWeightsState, params: Params | None = None, **extra: object
    ) -> tuple[Params, RescaleWeightsState]:
        del extra
        params = _gradients.check_params(updates, params)
        count = state.num_updates + 1
        leaves, treedef = jax.tree.flatten(updates)

        def correct(leaf: jax.Array, param: jax.Array, choose: bool, axes: Axes) -> jax.Array:
            if not choose:
                return leaf
            dtype, w = _gradients.sum_dtype(leaf, param), _tree.wide(param)
            moved = w + _tree.wide(leaf).astype(w.dtype)
            units = _numerics.units_along(moved, axes.group(per_filter))
            corrected = (jnp.asarray(target_norm, w.dtype) * units - w).astype(dtype)
            return (
                corrected
                if every == 1
                else jnp.where(count % every == 0, corrected, leaf.astype(dtype))
            )

        chosen = _selection.mask_leaves(mask, params)
        axes = _layouts.of_leaves(layout, params, chosen)
        corrected = map(correct, leaves, jax.tree.leaves(params), chosen, axes)
        return jax.tree.unflatten(treedef, corrected), RescaleWeightsState(count)

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def rescale_velocity(
    velocity: Params, *, factor: ArrayLike | Tree, layout: Layouts = None
) -> Params:
    """Computes the momentum that goes with weights w -> factor w of a scale-invariant loss.

        velocity / factor

    The gradient is divided by the factor as well. The same trajectory needs this momentum and the
    learning rate times the square of the factor.

    Example:
      >>> print(transforms.rescale_velocity(jnp.array([[1.0], [2.0]]), factor=0.5).ravel())
      [2. 4.]

    Args:
      velocity: tree of momentum buffers.
      factor: a number, or a tree like `velocity` of numbers and of arrays (channels,) with a number
        for each filter; of stacked layers with both axes, in the order of the leaf.
      layout: which axes of the leaves are channels, and which stack layers (`regjax.Layout`); None:
        a guess.

    Returns:
      The new buffers.

    Raises:
      ValueError: a factor is not positive and finite, or does not fit its leaf.
      TypeError: a leaf or a factor is not a real number.
    """
    _checks.floating_leaves("velocity", velocity)
    if jax.tree_util.all_leaves([factor]):
        factor = jax.tree.map(lambda leaf: factor, velocity)
    _checks.same_structure("factor", factor, velocity)

    def rescaled(leaf: jax.Array, factor: ArrayLike, axes: Axes) -> jax.Array:
        _checks.positive("factor", factor, finite=True)
        units = tuple(jnp.shape(leaf)[axis] for axis in axes.units)
        if jnp.shape(factor) not in ((), units):
            raise ValueError(
                f"`factor` must be a number, or have shape {units} beside a leaf of shape "
                f"{jnp.shape(leaf)}, got {jnp.shape(factor)}."
            )
        factor = jnp.asarray(factor, jnp.result_type(leaf))
        return leaf / (axes.spread(factor, leaf.shape) if factor.shape else factor)

    leaves, treedef = jax.tree.flatten(velocity)
    arrays = [jnp.ndim(one) > 0 for one in jax.tree.leaves(factor)]
    axes = _layouts.of_leaves(layout, velocity, arrays)
    return jax.tree.unflatten(treedef, map(rescaled, leaves, jax.tree.leaves(factor), axes))
