"""Strong L1 or L2 regularisation that waits: the penalty is on while a gate says so."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from regjax import _checks, _selection, _tree
from regjax._arguments import checked
from regjax._base import Mask, Params, ScalarOrSchedule, Tree
from regjax.transforms import _gradients, _schedules
from regjax.transforms._penalty_gates import Gate
from regjax.transforms._static_args import static_args


class CoherentRegularizationState(NamedTuple):
    """State of `coherent_regularization`.

    Attributes:
      num_updates: (), int32, updates so far.
      gate: state of the gate.
      on: (), bool, whether the penalty was on in the last update.
      num_on: (), int32, updates with the penalty on.
    """

    num_updates: jax.Array
    gate: Tree
    on: jax.Array
    num_on: jax.Array


@static_args("gate", "penalty_gradient", "mask")
@checked
def coherent_regularization(
    strength: ScalarOrSchedule,
    *,
    gate: Gate,
    penalty_gradient: Callable[[jax.Array], jax.Array] | None = None,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of a penalty to that of the loss while a gate is open.

        r = strength penalty_gradient(w);   on = gate(g, r);   updates = g + r where on, else g

    Here g is the gradient of the loss at the weights w, and r is that of the penalty. A gate is a
    rule that decides at each step, for the whole network at once, whether the penalty counts.

    A strong penalty can shrink the weights of a deep network before the loss has any influence;
    then the gradient of the loss vanishes for good. A gate keeps the penalty out until the two
    gradients agree (`cosine_gate`), for a number of steps (`delayed_gate`), or while the gradient
    of the loss is the smaller one (`ratio_gate`).

    Place it before momentum and preconditioning, because the penalty is part of the objective.
    With `strength=0` or a closed gate the gradient passes through bit for bit.

    Example:
      >>> tx = transforms.coherent_regularization(0.1, gate=transforms.cosine_gate(0.5))
      >>> params = jnp.array([0.0, 10.0])  # the gradient of the penalty is [0, 1]
      >>> for grads in (jnp.array([1.0, 0.0]), jnp.array([0.0, -0.9])):
      ...     updates, state = tx.update(grads, tx.init(params), params)
      ...     print(updates, state.on)  # the second gradient points against the penalty's
      [1. 1.] True
      [ 0.  -0.9] False

    Args:
      strength: lambda in (lambda / 2) |w|^2 or lambda |w|_1, or a schedule of the update count. In
        units of the loss per squared parameter, or per parameter.
      gate: `always_gate()`, `delayed_gate(...)`, `cosine_gate(...)`, `ratio_gate(...)`, or a `Gate`
        of your own.
      penalty_gradient: function leaf -> leaf; None: `l2_gradient`.
      mask: leaves that are penalised. Leave out biases and the parameters of normalizations.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      ValueError: `strength` is negative, or `params` is missing in `update`.

    References:
      D. H. Park et al. (2018), arXiv:1811.08056; D. H. Park, C. M. Ho, Y. Chang (2018), Achieving
      strong regularization for deep neural networks. `cosine_gate` is our reading of coherence.
    """
    _schedules.check_size("strength", strength)
    if not isinstance(gate, Gate):
        raise TypeError(f"`gate` must be a Gate such as cosine_gate(), got {gate!r}.")
    penalty = l2_gradient if penalty_gradient is None else penalty_gradient

    def init(params: Params) -> CoherentRegularizationState:
        _selection.floating_leaves(mask, params)
        return CoherentRegularizationState(
            jnp.int32(0), gate.init(), jnp.bool_(False), jnp.int32(0)
        )

    def update(
        updates: Params,
        state: CoherentRegularizationState,
        params: Params | None = None,
        **extra: object,
    ) -> tuple[Params, CoherentRegularizationState]:
        del extra
        params = _gradients.check_params(updates, params)
        leaves, treedef = jax.tree.flatten(updates)
        chosen = _selection.mask_leaves(mask, params)
        weight = _schedules.value_at("strength", strength, state.num_updates)
        if _schedules.is_zero(weight):
            return updates, state._replace(num_updates=optax.safe_increment(state.num_updates))
        places = [i for i, choose in enumerate(chosen) if choose]
        weights = jax.tree.leaves(params)
        # In the wider dtype of both, or a small penalty would be lost beside the gradient.
        dtypes = [_gradients.sum_dtype(leaves[i], weights[i]) for i in places]
        grads = [jnp.asarray(leaves[i], dtype) for i, dtype in zip(places, dtypes, strict=True)]
        slopes = [_checked(penalty(weights[i]), weights[i]) for i in places]
        added = [
            jnp.asarray(weight, dtype) * jnp.asarray(slope, dtype)
            for slope, dtype in zip(slopes, dtypes, strict=True)
        ]
        on, gate_state = gate.decide(grads, added, state.gate, state.num_updates)
        for i, grad, extra_grad in zip(places, grads, added, strict=True):
            leaves[i] = jnp.where(on, grad + extra_grad, grad)
        num_on = state.num_on + on.astype(jnp.int32)
        state = CoherentRegularizationState(
            optax.safe_increment(state.num_updates), gate_state, on, num_on
        )
        return jax.tree.unflatten(treedef, leaves), state

    return optax.GradientTransformationExtraArgs(init, update)


def _checked(penalty: Params, weights: jax.Array) -> Params:
    """Returns what `penalty_gradient` made of a leaf, if it is an array like it."""
    name = "penalty_gradient(weights)"
    return _checks.floating_leaves(name, _checks.same_tree(name, penalty, weights))


def l2_gradient(weights: jax.Array) -> jax.Array:
    """Computes the gradient of |w|^2 / 2.

    Example:
      >>> print(transforms.l2_gradient(jnp.array([-2.0, 0.0, 3.0])))
      [-2.  0.  3.]

    Args:
      weights: a leaf.

    Returns:
      The weights.
    """
    return weights


def l1_gradient(weights: jax.Array) -> jax.Array:
    """Computes a subgradient of |w|_1.

    Descent along it never reaches zero exactly; `soft_threshold` does.

    Example:
      >>> print(transforms.l1_gradient(jnp.array([-2.0, 0.0, 3.0])))
      [-1.  0.  1.]

    Args:
      weights: a leaf.

    Returns:
      The signs, 0 at 0.
    """
    return jnp.sign(weights)


class SoftThresholdState(NamedTuple):
    """State of `soft_threshold`.

    Attributes:
      num_updates: (), int32, updates so far.
    """

    num_updates: jax.Array


@static_args("mask")
@checked
def soft_threshold(
    threshold: ScalarOrSchedule, *, mask: Mask = None
) -> optax.GradientTransformationExtraArgs:
    """Takes the proximal step of an L1 penalty, which gives exact zeros.

        updates = sign(q) max(|q| - threshold, 0) - w,   q = w + updates

    Place it last in the chain. It does not see the gradient of the loss, so that no gate can decide
    on it; a schedule can delay it.

    Example:
      >>> learning_rate, strength = 0.1, 0.5
      >>> threshold = transforms.soft_threshold(learning_rate * strength)
      >>> tx = optax.chain(optax.sgd(learning_rate), threshold)
      >>> params = jnp.array([0.02, -1.0])
      >>> updates, state = tx.update(jnp.zeros(2), tx.init(params), params)
      >>> print(optax.apply_updates(params, updates))
      [ 0.   -0.95]

    Args:
      threshold: learning rate times strength, in units of the parameters, or a schedule of the
        update count.
      mask: leaves that are thresholded.

    Returns:
      A transformation whose `update` needs `params`. With `threshold=0` updates pass through.

    Raises:
      ValueError: `threshold` is negative, or `params` is missing in `update`.
    """
    _schedules.check_size("threshold", threshold)

    def init(params: Params) -> SoftThresholdState:
        _selection.floating_leaves(mask, params)
        return SoftThresholdState(jnp.int32(0))

    def update(
        updates: Params, state: SoftThresholdState, params: Params | None = None, **extra: object
    ) -> tuple[Params, SoftThresholdState]:
        del extra
        params = _gradients.check_params(updates, params)
        cut = _schedules.value_at("threshold", threshold, state.num_updates)
        state = SoftThresholdState(optax.safe_increment(state.num_updates))
        if _schedules.is_zero(cut):
            return updates, state
        leaves, treedef = jax.tree.flatten(updates)

        def shrink(leaf: jax.Array, param: jax.Array, choose: bool) -> jax.Array:
            if not choose:
                return leaf
            dtype = _gradients.sum_dtype(leaf, param)
            w = _tree.wide(param)
            q = w + _tree.wide(leaf).astype(w.dtype)
            small = jnp.maximum(jnp.abs(q) - jnp.asarray(cut, q.dtype), 0)
            # -w where the weight becomes zero, so that w + update is zero exactly.
            return (jnp.sign(q) * small - w).astype(dtype)

        chosen = _selection.mask_leaves(mask, params)
        return jax.tree.unflatten(
            treedef, map(shrink, leaves, jax.tree.leaves(params), chosen)
        ), state

    return optax.GradientTransformationExtraArgs(init, update)
