"""Sharpness-aware minimisation: the gradient at the top of a small ascent step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax import _checks, _loops, _numerics, _selection, _tree
from regjax._arguments import checked
from regjax._base import GradFn, Mask, Params, ScalarOrSchedule
from regjax.transforms import _gradients, _schedules
from regjax.transforms._static_args import check_static, static_args


class SamState(NamedTuple):
    """State of `sam` and `gsam`.

    Attributes:
      num_updates: (), int32, updates so far, for a schedule of the radius.
    """

    num_updates: jax.Array


@static_args("adaptive", "num_shards", "mask")
@checked
def sam(
    rho: ScalarOrSchedule,
    *,
    adaptive: bool | Mask = False,
    eta: float = 0.01,
    num_shards: int = 1,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by the one at w + e, the top of an ascent step of length rho.

        updates = grad_fn(w + e),   e = rho T T g / ||T g||,   T = 1, or |w| + eta where adaptive

    Here g is the incoming gradient at the weights w. The norm goes over all masked leaves together,
    and g = 0 gives e = 0. One step costs one gradient besides the incoming one. Place it first in
    the chain, as in `optax.chain(sam(0.05), optax.sgd(0.1))`. After `optax.sgd` it would climb;
    this is an error where it can be detected, in a first update outside `jit`, or of a jitted step
    under `jax.disable_jit()`.

    With k = `num_shards` > 1 each shard of the batch climbs by itself (m-sharpness):

        updates = mean over i of grad_fn(w + e_i, i),   e_i from grad_fn(w, i)

    Then the incoming gradient is not used, and a step costs 2 k gradients of a shard.

    Report the loss of the pass at w and keep its batch statistics. Give both passes the same
    dropout key, in `grad_fn`. `rho=0` gives grad_fn(w, 0) bit for bit. Weights in bfloat16 climb as
    a float32 copy, which `grad_fn` gets; a model that casts it back loses the step.
    `sharpness_aware_gradient` does the same in trainers that pass no `grad_fn` on.

    Example:
      >>> tx = optax.chain(transforms.sam(1.0), optax.sgd(0.1))
      >>> grad_fn = lambda params, i: jax.grad(lambda w: 0.5 * jnp.sum(w**2))(params)
      >>> params = jnp.array([3.0, 4.0])
      >>> grads, state = grad_fn(params, 0), tx.init(params)
      >>> updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
      >>> print(updates)  # -0.1 times the gradient at the top, [3.6, 4.8]
      [-0.36 -0.48]

    Args:
      rho: length of the step, in units of the parameters (relative to them on adaptive leaves), or
        a schedule of the update count. The papers use 0.05 (CIFAR-10) and 0.1 (CIFAR-100), and for
        the adaptive form 0.5 and 1.
      adaptive: whether the step is relative to each weight: False, True (all leaves), or a tree of
        bools.
      eta: added to |w| on adaptive leaves, in units of the parameters. The default is that of the
        official code.
      num_shards: number of equal shards of the batch that climb by themselves, at most 4096.
      mask: leaves that climb. The others stay where they are and do not count in the norm.

    Returns:
      A transformation whose `update` needs `params`, and `grad_fn`, `value_fn` or `obj_fn`.

    Raises:
      ValueError: an argument is out of its range; `params` or `grad_fn` is missing in `update`.
      TypeError: an argument has the wrong type.

    References:
      P. Foret, A. Kleiner, H. Mobahi, B. Neyshabur (2021), arXiv:2010.01412; for the adaptive form
      J. Kwon, J. Kim, H. Park, I. Choi (2021), arXiv:2102.11600. Its official code adapts only
      tensors named "weight"; here `adaptive` says which.
    """
    _check(rho, eta)
    check_static("num_shards", num_shards, 1, _MAX_SHARDS)

    def update(
        updates: Params,
        state: SamState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra: object,
    ) -> tuple[Params, SamState]:
        params = _gradients.check_whole_params(updates, params)
        grad_fn = _gradients.checked_grad_fn(grad_fn, extra, num_shards=num_shards)
        radius = _schedules.value_at("rho", rho, state.num_updates)
        climb = functools.partial(
            ascend,
            rho=radius,
            adaptive=adaptive,
            eta=eta,
            mask=mask,
        )
        if num_shards == 1:
            new = grad_fn(climb(params, updates), 0)
        else:

            def add_shard(_: None, total: Params, i: jax.Array) -> Params:
                # No gradient is needed to stay where one is.
                top = params if _schedules.is_zero(radius) else climb(params, grad_fn(params, i))
                return jax.tree.map(lambda a, b: a + _tree.wide(b), total, grad_fn(top, i))

            zeros = jax.tree.map(lambda leaf: jnp.zeros_like(_tree.wide(leaf)), params)
            total = _loops.scan(add_shard, zeros, num_shards)
            new = jax.tree.map(lambda leaf: leaf / num_shards, total)
        _gradients.check_is_first(
            updates, new, grad_fn=grad_fn, params=params, count=state.num_updates
        )
        return _gradients.like(new, updates), SamState(optax.safe_increment(state.num_updates))

    return optax.GradientTransformationExtraArgs(functools.partial(_init, mask), update)


@static_args("adaptive", "mask")
@checked
def gsam(
    rho: ScalarOrSchedule,
    *,
    alpha: ScalarOrSchedule,
    adaptive: bool | Mask = False,
    eta: float = 0.01,
    mask: Mask = None,
) -> optax.GradientTransformationExtraArgs:
    """Subtracts from SAM's gradient `alpha` times the part of the clean gradient orthogonal to it.

        gp = grad_fn(w + e),   u = gp / ||gp||,   r = g - <g, u> u,   updates = gp - alpha r

    Here g is the incoming gradient at the weights w, and e is SAM's step of ascent (`sam`). The
    extra part raises the clean loss towards the perturbed one. This closes the gap between them
    without changing the perturbed loss to first order. `alpha=0` is `sam`.

    Example:
      >>> tx = optax.chain(transforms.gsam(1.0, alpha=0.5), optax.sgd(0.1))
      >>> params = jnp.array([2.0, 1.0])
      >>> grad_fn = lambda params, i: params * jnp.array([1.0, 4.0])  # curvatures 1 and 4
      >>> grads = grad_fn(params, 0)
      >>> updates, state = tx.update(grads, tx.init(params), params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.213 -0.768]

    Args:
      rho: length of the step, in units of the parameters (relative to them on adaptive leaves), or
        a schedule of the update count. In the paper it follows the learning rate.
      alpha: weight of the gap, or a schedule. The paper uses 0.4 (CIFAR) and 0.6 (ViT-B/32).
      adaptive: whether the step is relative to each weight: False, True (all leaves), or a tree of
        bools.
      eta: added to |w| on adaptive leaves, in units of the parameters.
      mask: leaves that climb. The others stay where they are and do not count in the norm.

    Returns:
      A transformation whose `update` needs `params`, and `grad_fn`, `value_fn` or `obj_fn`.

    Raises:
      ValueError: an argument is out of its range; `params` or `grad_fn` is missing in `update`.

    References:
      J. Zhuang et al. (2022), arXiv:2203.08065. The authors' code has another variant too, which
      adds to the clean gradient.
    """
    _check(rho, eta)
    _schedules.check_size("alpha", alpha)

    def update(
        updates: Params,
        state: SamState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra: object,
    ) -> tuple[Params, SamState]:
        params = _gradients.check_whole_params(updates, params)
        grad_fn = _gradients.checked_grad_fn(grad_fn, extra)
        top = ascend(
            params,
            updates,
            rho=_schedules.value_at("rho", rho, state.num_updates),
            adaptive=adaptive,
            eta=eta,
            mask=mask,
        )
        new, weight = grad_fn(top, 0), _schedules.value_at("alpha", alpha, state.num_updates)
        _gradients.check_is_first(
            updates, new, grad_fn=grad_fn, params=params, count=state.num_updates
        )
        if not _schedules.is_zero(weight):
            new = _less_orthogonal(new, updates, weight)
        return _gradients.like(new, updates), SamState(optax.safe_increment(state.num_updates))

    return optax.GradientTransformationExtraArgs(functools.partial(_init, mask), update)


def ascend(
    params: Params,
    grads: Params,
    *,
    rho: ArrayLike,
    adaptive: bool | Mask,
    eta: ArrayLike,
    mask: Mask,
) -> Params:
    """Moves the weights by a step of length rho along the gradient.

        w + rho T T g / ||T g||

    A copy in float32 at least: in bfloat16 a step of 0.05 over many weights is below half a unit of
    rounding of each. `rho=0` gives w as it is, a zero gradient the numbers of w.
    """
    if _schedules.is_zero(rho):
        return params
    leaves, treedef = jax.tree.flatten(params)
    climbs = _selection.mask_leaves(mask, params)
    adapts = _selection.mask_leaves(adaptive, params, "adaptive")
    scales = [
        jnp.abs(_tree.wide(leaf)) + jnp.asarray(eta, _tree.wide_dtype(leaf)) if adapt else None
        for leaf, adapt in zip(leaves, adapts, strict=True)
    ]
    # T g / ||T g||, of the length one: no product of it leaves the range of numbers.
    own = [leaf for leaf, climb in zip(jax.tree.leaves(grads), climbs, strict=True) if climb]
    climbing = [scale for scale, climb in zip(scales, climbs, strict=True) if climb]
    units = iter(_numerics.unit(list(map(_times, climbing, _numerics.unit(own)))))

    def move(leaf: jax.Array, scale: jax.Array | None, climb: bool) -> jax.Array:
        if not climb:
            return _tree.wide(leaf)
        direction = _times(scale, next(units).astype(_tree.wide_dtype(leaf)))
        step = jnp.asarray(rho, direction.dtype) * direction
        return _tree.wide(leaf) + step

    return jax.tree.unflatten(treedef, map(move, leaves, scales, climbs))


def _times(scale: jax.Array | None, leaf: jax.Array) -> jax.Array:
    return leaf if scale is None else scale.astype(leaf.dtype) * leaf


def _less_orthogonal(top: Params, grads: Params, weight: ArrayLike) -> Params:
    """Takes from SAM's gradient the part of the clean one that is orthogonal to it.

        gp - alpha (g - <g, u> u),   u = gp / ||gp||

    Without the projection where gp = 0.
    """
    units = _numerics.unit(top)
    along = _tree.inner(grads, units)

    def combine(gp: jax.Array, u: jax.Array, g: jax.Array) -> jax.Array:
        gp = _tree.wide(gp)
        rest = _tree.wide(g).astype(gp.dtype) - along.astype(gp.dtype) * u.astype(gp.dtype)
        return gp - jnp.asarray(weight, gp.dtype) * rest

    return jax.tree.map(combine, top, units, grads)


def _check(rho: ScalarOrSchedule, eta: ArrayLike) -> None:
    _schedules.check_size("rho", rho)
    _checks.number("eta", eta)


def _init(mask: Mask, params: Params) -> SamState:
    _checks.floating_leaves("params", params)
    _selection.mask_leaves(mask, params)
    return SamState(jnp.int32(0))


# More gradients than anybody waits for: an index that is no shard would run on and on.
_MAX_SHARDS = 4096
