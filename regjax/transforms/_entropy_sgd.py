"""Entropy-SGD: the gradient of the local entropy, from a few Langevin steps around the weights."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax import _checks, _loops, _numerics, _tree
from regjax._arguments import checked
from regjax._base import GradFn, Params, PRNGKey, ScalarOrSchedule
from regjax.transforms import _gradients, _keys, _schedules
from regjax.transforms._langevin import langevin_step
from regjax.transforms._static_args import check_static, static_args


class EntropySgdState(NamedTuple):
    """State of `entropy_sgd`.

    Attributes:
      num_updates: (), int32, outer updates so far, for a schedule of gamma.
      key_data: words of the key of the noise to come, uint32.
    """

    num_updates: jax.Array
    key_data: jax.Array


@static_args("key", "num_inner_steps", "scale_by_gamma")
@checked
def entropy_sgd(
    gamma: ScalarOrSchedule,
    *,
    key: PRNGKey,
    num_inner_steps: int = 20,
    learning_rate: ArrayLike = 0.1,
    noise_scale: ArrayLike = 1e-4,
    averaging: ArrayLike = 0.25,
    momentum: ArrayLike = 0.9,
    scale_by_gamma: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the gradient by x - mu, where mu is the running mean of a Langevin walk around x.

                x' = mu = x, v = 0; then num_inner_steps times
        d = grad_fn(x', l);  v = momentum v + d;  d = d + momentum v               (Nesterov)
        x' = x' - learning_rate (d - gamma (x - x')) + sqrt(learning_rate) noise_scale N(0, I)
        mu = (1 - averaging) mu + averaging x'

    The local entropy of the loss f at the weights x is

        F(x) = log of the integral over x' of exp(-f(x') - gamma / 2 |x - x'|^2)

    and is large in wide valleys. Its gradient is -gamma (x - <x'>), where <x'> is the mean that the
    walk estimates. In `optax.chain(entropy_sgd(...), optax.sgd(1.0))` a step of rate 1 moves to mu.

    The incoming gradient is not used, unless `num_inner_steps=0`, which passes it through bit for
    bit. One update costs `num_inner_steps` gradients: count epochs with that factor. The function
    `grad_fn(x', l)` should use the mini-batch of inner step l; x' is in float32 at least. Update
    batch statistics yourself after the step (`regjax.updated_statistics`).

    The defaults follow the official code, which gives the new point the weight 0.25 and leaves
    gamma out of the outer gradient. In one point we differ: the noise of the code is sqrt(2) times
    as large as `noise_scale` says here.

    Example:
      >>> grad_fn = lambda params, i: params  # of the loss w^2 / 2
      >>> tx = transforms.entropy_sgd(
      ...     1.0, key=jax.random.key(0), learning_rate=0.5, noise_scale=0.0, momentum=0.0,
      ...     averaging=1.0,
      ... )
      >>> params = jnp.array(2.0)
      >>> updates, state = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
      >>> print(params - updates)  # the minimum of w^2 / 2 + (w - 2)^2 / 2
      1.0

    Args:
      gamma: stiffness of the well, in units of the loss over the parameter squared, or a schedule
        of the outer count (`schedules.scoping_schedule`).
      key: typed key.
      num_inner_steps: number of inner steps, at most 100 000. Compile time does not grow with it,
        except for convolutions on CPU.
      learning_rate: of the inner steps.
      noise_scale: standard deviation of the noise per square root of the inner learning rate, in
        units of the parameters.
      averaging: weight of the new point in the running mean, between 0 and 1.
      momentum: of the inner steps.
      scale_by_gamma: whether to multiply the result by gamma.

    Returns:
      A transformation whose `update` needs `params` and `grad_fn`, and whose state holds no copy of
      the parameters.

    Raises:
      ValueError: an argument is out of its range; `params` or `grad_fn` is missing in `update`.
      TypeError: an argument has the wrong type.

    References:
      P. Chaudhari et al. (2017), arXiv:1611.01838, and its official code.
    """
    for name, value in (
        ("gamma", gamma),
        ("learning_rate", learning_rate),
        ("noise_scale", noise_scale),
        ("averaging", averaging),
        ("momentum", momentum),
    ):
        _schedules.check_size(name, value)
        if name != "gamma" and callable(value):
            raise TypeError(
                f"`{name}` must be a number, got a function: only gamma has a schedule."
            )
    known = None if callable(averaging) else _checks.host_value(averaging)
    if known is not None and known > 1:
        raise ValueError(f"`averaging` must be at most 1, got {averaging}.")
    _checks.boolean("scale_by_gamma", scale_by_gamma)
    check_static("num_inner_steps", num_inner_steps, 0, _MAX_INNER_STEPS)
    _checks.key("key", key)

    def init(params: Params) -> EntropySgdState:
        _checks.floating_leaves("params", params)
        return EntropySgdState(jnp.int32(0), _keys.words(key))

    def update(
        updates: Params,
        state: EntropySgdState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        **extra: object,
    ) -> tuple[Params, EntropySgdState]:
        next_key, noise_key = jax.random.split(_keys.typed(state.key_data, key))
        count = optax.safe_increment(state.num_updates)
        next_state = EntropySgdState(count, _keys.words(next_key))
        if num_inner_steps == 0:
            return updates, next_state
        params = _gradients.check_whole_params(updates, params)
        grad_fn = _gradients.checked_grad_fn(grad_fn, extra)
        stiffness = _schedules.value_at("gamma", gamma, state.num_updates)
        has_momentum = not _schedules.is_zero(momentum)

        def inner_step(_: None, carry: _Walk, i: jax.Array) -> _Walk:
            grads, velocity = grad_fn(carry.position, i), carry.velocity
            if has_momentum:
                velocity = _accelerated(momentum, velocity, grads)
                grads = _accelerated(momentum, velocity, grads)
            position = langevin_step(
                carry.position,
                grads,
                key=jax.random.fold_in(noise_key, i),
                anchor=params,
                gamma=stiffness,
                learning_rate=learning_rate,
                noise_scale=noise_scale,
            )
            return _Walk(position, _numerics.between(carry.mean, position, averaging), velocity)

        # In bfloat16 the steps of the walk would be lost: below half a unit of rounding.
        start = jax.tree.map(_tree.wide, params)
        velocity = jax.tree.map(jnp.zeros_like, start) if has_momentum else ()
        walk = _loops.scan(inner_step, _Walk(start, start, velocity), num_inner_steps)
        new = jax.tree.map(lambda x, mean: _tree.wide(x) - mean, params, walk.mean)
        if scale_by_gamma:
            new = jax.tree.map(lambda leaf: jnp.asarray(stiffness, leaf.dtype) * leaf, new)
        _gradients.check_is_first(
            updates, new, grad_fn=grad_fn, params=params, count=state.num_updates
        )
        return _gradients.like(new, updates, params), next_state

    return optax.GradientTransformationExtraArgs(init, update)


# More gradients than anybody waits for.
_MAX_INNER_STEPS = 100_000


class _Walk(NamedTuple):
    """Where a Langevin walk is.

    Attributes:
      position: tree like the parameters in float32 at least, the point x'.
      mean: tree like them in float32 at least, the running mean mu.
      velocity: tree like `mean`, or () without momentum.
    """

    position: Params
    mean: Params
    velocity: Params


def _accelerated(momentum: ArrayLike, velocity: Params, grads: Params) -> Params:
    """Computes momentum times velocity plus gradient, leaf by leaf, in float32 at least."""

    def combine(v: jax.Array, g: jax.Array) -> jax.Array:
        return jnp.asarray(momentum, v.dtype) * v + _tree.wide(g).astype(v.dtype)

    return jax.tree.map(combine, velocity, grads)
