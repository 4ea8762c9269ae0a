"""Strong L1 or L2 regularisation that waits: the penalty is on while a gate says so."""

from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from regjax import _checks, _numerics, _selection, _tree
from regjax._arguments import checked
from regjax._base import Mask, Params, ScalarOrSchedule, Tree
from regjax.transforms import _gradients, _schedules
from regjax.transforms._static_args import check_static, static_args

Leaves = list[jax.Array]


class Gate(NamedTuple):
    """A rule that decides at each step whether the penalty is on, for the whole network at once.

    Example:
      >>> def decide(grads, added, state, count):
      ...     return count % 2 == 1, state
      >>> gate = transforms.Gate(init=lambda: (), decide=decide)  # open in every other step
      >>> tx = transforms.coherent_regularization(0.1, gate=gate)
      >>> params = jnp.array(2.0)
      >>> state = tx.init(params)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jnp.array(1.0), state, params)
      ...     print(updates)
      1.0
      1.2
      1.0

    Attributes:
      init: () -> state of the gate, a tree of arrays.
      decide: (loss gradients, penalty gradients, state, count) -> (on, state). The gradients are
        lists of the masked leaves; on is a bool array ().
    """

    init: Callable[[], Tree]
    decide: Callable[[Leaves, Leaves, Tree, jax.Array], tuple[jax.Array, Tree]]


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

    Beyond some strength the penalty of a deep network wins before the loss has anything to say, and
    the loss gradient vanishes for good. A gate keeps the penalty out until the gradients agree.
    Stands before momentum and preconditioning: the penalty is part of the objective. `strength=0`
    and a closed gate pass the gradient through bit for bit.

    The coherence statistic of the paper is not known to us: `cosine_gate` is our reading.

    Example:
      >>> tx = transforms.coherent_regularization(0.1, gate=transforms.cosine_gate(0.5))
      >>> params = jnp.array([0.0, 10.0])  # the gradient of the penalty is [0, 1]
      >>> for grads in (jnp.array([1.0, 0.0]), jnp.array([0.0, -0.9])):
      ...     updates, state = tx.update(grads, tx.init(params), params)
      ...     print(updates, state.on)  # the second gradient points against the penalty's
      [1. 1.] True
      [ 0.  -0.9] False

    Args:
      strength: lambda of lambda |w|_1 or (lambda / 2) |w|^2, in units of the loss per parameter (or
        per parameter squared), or a schedule of the update count.
      gate: `always_gate`, `delayed_gate`, `cosine_gate`, `ratio_gate`, or one of your own.
      penalty_gradient: leaf -> leaf; None is `l2_gradient`.
      mask: leaves that are penalised; better not biases and norm parameters.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      ValueError: `strength` is negative, or `params` is missing in `update`.

    References:
      D. H. Park et al. (2018), arXiv:1811.08056, and D. H. Park, C. M. Ho, Y. Chang (2018),
      Achieving strong regularization for deep neural networks, of which only the abstracts were
      read.
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
    """Returns the gradient of |w|^2 / 2.

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
    """Returns the subgradient of |w|_1.

    Descent along it never reaches zero; `soft_threshold` does.

    Example:
      >>> print(transforms.l1_gradient(jnp.array([-2.0, 0.0, 3.0])))
      [-1.  0.  1.]

    Args:
      weights: a leaf.

    Returns:
      The signs, 0 at 0.
    """
    return jnp.sign(weights)


def always_gate() -> Gate:
    """Makes a gate that is open from the first step: an ordinary penalty.

    Example:
      >>> tx = transforms.coherent_regularization(0.1, gate=transforms.always_gate())
      >>> params = jnp.array([2.0, -4.0])
      >>> updates, state = tx.update(jnp.ones(2), tx.init(params), params)
      >>> print(updates)
      [1.2 0.6]

    Returns:
      A `Gate` without state.
    """
    return Gate(lambda: (), lambda grads, added, state, count: (jnp.bool_(True), state))


@checked
def delayed_gate(delay: int) -> Gate:
    """Makes a gate that opens for good at step `delay`, counted from 0.

    Example:
      >>> tx = transforms.coherent_regularization(0.1, gate=transforms.delayed_gate(1))
      >>> params = jnp.array([2.0, -4.0])
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.ones(2), state, params)
      ...     print(updates)
      [1. 1.]
      [1.2 0.6]

    Args:
      delay: number of steps; five epochs is a start.

    Returns:
      A `Gate` without state.

    Raises:
      ValueError: `delay` is negative.
    """
    check_static("delay", delay, 0)
    return Gate(lambda: (), lambda grads, added, state, count: (count >= delay, state))


@checked
def cosine_gate(threshold: float = 0.5, *, hold: int | None = None) -> Gate:
    """Makes a gate that is open while the cosine between g and g + r exceeds `threshold`.

    Norms go over all masked leaves together. At a stationary point of the penalised loss g = -r, so
    the cosine falls off where training ends, and the gate would close: give `hold`.

    Example:
      >>> gate = transforms.cosine_gate(0.5)
      >>> grads, added = [jnp.array([1.0, 0.0])], [jnp.array([0.0, 1.0])]  # a cosine of 0.71
      >>> on, state = gate.decide(grads, added, gate.init(), 0)
      >>> print(on)
      True

    Args:
      threshold: between 0 and 1. 0.5 is our choice; 0.8 protects more and regularises less.
      hold: after so many consecutive open steps the gate stays open for good; None is never. One
        epoch of steps does well.

    Returns:
      A `Gate`.

    Raises:
      ValueError: an argument is out of its range.
    """
    _checks.non_negative("threshold", threshold)
    if isinstance(threshold, Real) and threshold > 1:
        raise ValueError(f"`threshold` must be at most 1, got {threshold}.")

    def is_coherent(grads: Leaves, added: Leaves) -> jax.Array:
        # The sum is formed: from the inner products of its parts it would be rounding where they
        # cancel, and that is where the gate decides.
        total = [grad + extra for grad, extra in zip(grads, added, strict=True)]
        return _numerics.cosine(grads, total) > threshold

    return _held(is_coherent, hold)


@checked
def ratio_gate(threshold: float = 1.0, *, hold: int | None = None) -> Gate:
    """Makes a gate that is open while the gradient of the loss is the larger one.

        |g| > threshold |r|,   norms over all masked leaves together

    Example:
      >>> gate = transforms.ratio_gate(2.0)
      >>> grads, added = [jnp.array([3.0, 0.0])], [jnp.array([0.0, 1.0])]
      >>> on, state = gate.decide(grads, added, gate.init(), 0)
      >>> print(on)
      True

    Args:
      threshold: at least 0.
      hold: as in `cosine_gate`.

    Returns:
      A `Gate`.

    Raises:
      ValueError: an argument is out of its range.
    """
    _checks.number("threshold", threshold)

    def is_stronger(grads: Leaves, added: Leaves) -> jax.Array:
        return _numerics.scaled_norm(grads) > threshold * _numerics.scaled_norm(added)

    return _held(is_stronger, hold)


def _held(is_open: Callable[[Leaves, Leaves], jax.Array], hold: int | None) -> Gate:
    """Makes a gate that is open where `is_open`, and for good after `hold` open steps in a row."""
    if hold is not None:
        check_static("hold", hold, 1)

    def decide(
        grads: Leaves, added: Leaves, state: jax.Array, count: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        del count
        on = is_open(grads, added)
        if hold is None:
            return on, state
        latched = state >= hold
        streak = jnp.where(latched, state, jnp.where(on, state + 1, 0))
        return on | latched, streak

    return Gate(lambda: jnp.int32(0), decide)


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
    """Takes the proximal step of an L1 penalty, which gives exact zeros; last in the chain.

        updates = sign(q) max(|q| - threshold, 0) - w,   q = w + updates

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
        update count. It cannot see the loss gradient: always on, or delayed by the schedule.
      mask: leaves that are thresholded.

    Returns:
      A transformation whose `update` needs `params`. `threshold=0` passes updates through.

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
