"""Gaussian noise in the weights before the gradient, and its mirror image in the update."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from regjax import _checks, _selection, _tree
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import GradFn, Mask, Params, PRNGKey, ScalarOrSchedule, Tree
from regjax.transforms import _gaussian, _gradients, _keys, _perturbation, _schedules
from regjax.transforms._static_args import static_args


class PerturbedGradientState(NamedTuple):
    """State of `perturbed_gradient`.

    Attributes:
      num_updates: (), int32, updates so far.
      key_data: words of the key from which each update's noise follows, uint32.
    """

    num_updates: jax.Array
    key_data: jax.Array


@static_args("key", "layerwise", "cyclic", "groups", "mask", "layout")
@checked
def perturbed_gradient(
    std: ScalarOrSchedule,
    *,
    key: PRNGKey,
    layerwise: bool = True,
    cyclic: bool = True,
    groups: Tree = None,
    mask: Mask = None,
    layout: Layouts = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by the one at weights with Gaussian noise.

        updates = grad_fn(w + sigma eps)

    On average this descends L + (sigma^2 / 2) tr Hess L + O(sigma^4). The weights themselves stay
    clean, and the incoming gradient is not used. The effect of noise in all layers at once grows
    with the width; that of noise in one group of leaves at a time does not. `std=0` gives
    grad_fn(w, 0) bit for bit.

    There is no pass at the clean weights: update running batch statistics yourself after the step
    (`regjax.updated_statistics`). `grad_fn` gets w + sigma eps in float32 at least, because small
    noise would be lost in bfloat16 weights. `noisy_gradient` does the same in trainers that pass no
    `grad_fn` on.

    Example:
      >>> tx = transforms.perturbed_gradient(0.1, key=jax.random.key(0))
      >>> params = jnp.zeros(10_000)
      >>> grad_fn = lambda params, i: params  # of the loss |params|^2 / 2
      >>> updates, state = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
      >>> print(f"{updates.std():.2f}")  # the gradient at noise of this size
      0.10

    Args:
      std: standard deviation sigma, in units of the parameters, or a schedule of the update
        count. The paper uses 0.03 (ResNet-18, CIFAR-10).
      key: typed key of the noise.
      layerwise: True: one group of leaves per step, with `std`. False: all groups in every step,
        with std / sqrt(number of groups), which has the same regulariser to first order.
      cyclic: True: the groups take turns. False: the group is drawn uniformly.
      groups: tree of ints, the number of the group of each leaf, or of each upper part of the tree,
        such as one number per layer. Kernel and bias of a layer belong together. None: each leaf is
        a group, as in the official code. If layers are stacked in a leaf, each layer is a group of
        its own, together with its slices of other leaves of the same number.
      mask: leaves that may be perturbed. Groups outside the mask do not count.
      layout: which axes of the leaves stack layers (`regjax.Layout`); None: a guess.

    Returns:
      A transformation whose `update` needs `params` and `grad_fn`.

    Raises:
      ValueError: an argument is out of its range; `params` or `grad_fn` is missing in `update`.
      TypeError: an argument has the wrong type.

    References:
      A. Orvieto, A. Raj, H. Kersting, F. Bach (2023), arXiv:2206.04613. The cyclic order and the
      division by sqrt(number of groups) come from the official code.
    """
    _schedules.check_size("std", std)
    _checks.key("key", key)
    _checks.boolean("layerwise", layerwise)
    _checks.boolean("cyclic", cyclic)

    def init(params: Params) -> PerturbedGradientState:
        _checks.floating_leaves("params", params)
        _perturbation.group_numbers(groups, params, mask, layout)
        return PerturbedGradientState(jnp.int32(0), _keys.words(key))

    def update(
        updates: Params,
        state: PerturbedGradientState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra: object,
    ) -> tuple[Params, PerturbedGradientState]:
        params = _gradients.check_whole_params(updates, params)
        grad_fn = _gradients.checked_grad_fn(grad_fn, extra)
        above = _perturbation.perturbed(
            params,
            std=_schedules.value_at("std", std, state.num_updates),
            key=_keys.typed(state.key_data, key),
            count=state.num_updates,
            layerwise=layerwise,
            cyclic=cyclic,
            groups=groups,
            mask=mask,
            layout=layout,
        )
        grads = _gradients.like(grad_fn(above, 0), updates)
        _gradients.check_is_first(
            updates, grads, grad_fn=grad_fn, params=params, count=state.num_updates
        )
        return grads, state._replace(num_updates=state.num_updates + 1)

    return optax.GradientTransformationExtraArgs(init, update)


class AnticorrelatedNoiseState(NamedTuple):
    """State of `anticorrelated_noise`.

    Attributes:
      num_updates: (), int32, updates so far.
      key_data: words of the key of the next noise, uint32.
      noise: tree like the parameters: the noise xi that they carry, in float32 at least;
        MaskedNode for a leaf without noise.
    """

    num_updates: jax.Array
    key_data: jax.Array
    noise: Tree


@static_args("key", "mask")
@checked
def anticorrelated_noise(
    std: ScalarOrSchedule, *, key: PRNGKey, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Adds the difference between two successive noises to the update.

        updates = u + xi_{t+1} - xi_t

    The weights are w = z + xi, with fresh noise xi in each step, and z follows exactly

        z_{t+1} = z_t - lr grad L(z_t + xi_t)

    This is noise before the gradient, for any optimiser before this transformation whose update
    depends on gradients alone. Place it last in the chain. Evaluate, store and decay z, which
    `denoise_params` returns. `std=0` passes updates through.

    The rounding error of weights + update goes into xi, so that z is followed in float32 even if
    the weights are in bfloat16.

    Example:
      >>> noise = transforms.anticorrelated_noise(0.1, key=jax.random.key(0))
      >>> tx = optax.chain(optax.sgd(0.1), noise)
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> params = optax.apply_updates(params, updates)  # descent plus noise
      >>> print(transforms.denoise_params(params, state[-1]))
      [0.9 1.9]

    Args:
      std: standard deviation of xi, in units of the parameters, or a schedule of the update
        count.
      key: typed key of the noise.
      mask: leaves that carry noise.

    Returns:
      A transformation that keeps one copy of the masked parameters, in float32 at least.

    Raises:
      ValueError: `std` is negative.
      TypeError: an argument has the wrong type.

    References:
      A. Orvieto, H. Kersting, F. Proske, F. Bach, A. Lucchi (2022), arXiv:2202.02831.
    """
    _schedules.check_size("std", std)
    _checks.key("key", key)

    def init(params: Params) -> AnticorrelatedNoiseState:
        leaves, treedef = jax.tree.flatten(params)
        noise = [
            jnp.zeros_like(leaf, dtype=_tree.wide_dtype(leaf)) if choose else optax.MaskedNode()
            for leaf, choose in zip(leaves, _selection.floating_leaves(mask, params), strict=True)
        ]
        noise = jax.tree.unflatten(treedef, noise)
        return AnticorrelatedNoiseState(jnp.int32(0), _keys.words(key), noise)

    def update(
        updates: Params,
        state: AnticorrelatedNoiseState,
        params: Params | None = None,
        **extra: object,
    ) -> tuple[Params, AnticorrelatedNoiseState]:
        del extra
        next_key, noise_key = jax.random.split(_keys.typed(state.key_data, key))
        next_data = _keys.words(next_key)
        sigma, count = (
            _schedules.value_at("std", std, state.num_updates),
            optax.safe_increment(state.num_updates),
        )
        if _schedules.is_zero(sigma):
            return updates, AnticorrelatedNoiseState(count, next_data, state.noise)
        leaves, treedef = jax.tree.flatten(updates)
        weights = [None] * len(leaves)
        if params is not None:
            weights = jax.tree.leaves(_gradients.check_params(updates, params))
        carried, places = _gradients.carried(updates, state.noise, "the noise")
        drawn = _gaussian.normal_like(noise_key, [carried[i] for i in places])
        for i, noise in zip(places, drawn, strict=True):
            fresh = jnp.asarray(sigma, noise.dtype) * noise
            leaves[i], carried[i] = _exchange(leaves[i], weights[i], carried[i], fresh)
        state = AnticorrelatedNoiseState(count, next_data, jax.tree.unflatten(treedef, carried))
        return jax.tree.unflatten(treedef, leaves), state

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def denoise_params(params: Params, state: AnticorrelatedNoiseState) -> Params:
    """Removes from the weights the noise that `anticorrelated_noise` keeps on them.

        z = w - xi

    Example:
      >>> tx = transforms.anticorrelated_noise(0.1, key=jax.random.key(0))
      >>> params = jnp.array([1.0, 2.0])
      >>> updates, state = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> print(transforms.denoise_params(params + updates, state))
      [1. 2.]

    Args:
      params: tree of the weights w.
      state: state of `anticorrelated_noise`; in a chain it is the last one of the tuple.

    Returns:
      A tree like `params`, the weights z that are trained.

    Raises:
      ValueError: `state` belongs to other parameters.
      TypeError: `state` belongs to another transformation.
    """
    if not isinstance(state, AnticorrelatedNoiseState):
        raise TypeError(
            f"`state` must be an AnticorrelatedNoiseState, got {type(state).__name__}: in a chain "
            "take the last one of the tuple."
        )
    _checks.floating_tree("params", params)
    leaves, treedef = jax.tree.flatten(params)
    carried, places = _gradients.carried(params, state.noise, "the noise")
    for i in places:
        clean = _tree.wide(leaves[i]) - carried[i]
        leaves[i] = clean.astype(jnp.result_type(leaves[i]))
    return jax.tree.unflatten(treedef, leaves)


def _exchange(
    update: jax.Array, weights: jax.Array | None, old: jax.Array, fresh: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Puts fresh noise into the update in the place of the old; returns what is carried then."""
    moved = _tree.wide(update).astype(old.dtype) + (fresh - old)
    if weights is None:
        return moved.astype(update.dtype), fresh
    # The sum as `optax.apply_updates` forms it, with the rounding that a compiler may leave out.
    dtype = _gradients.sum_dtype(update, weights)
    moved = _rounded(moved, dtype)
    after = _rounded(_tree.wide(weights) + moved, jnp.result_type(weights))
    trained = (_tree.wide(weights) - old) + _tree.wide(update).astype(old.dtype)
    return moved.astype(dtype), after - trained


def _rounded(array: jax.Array, dtype: jnp.dtype) -> jax.Array:
    kind = jnp.finfo(dtype)
    return lax.reduce_precision(array, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
