"""Learning rate and momentum of descent from the curvature of the loss, by a short Lanczos run."""

import functools
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _loops, _tree, curvature, schedules
from regjax._arguments import checked
from regjax._base import GradFn, Params, PRNGKey, as_partial
from regjax._finite import without_error
from regjax.transforms import _given, _gradients, _keys
from regjax.transforms._spectral_ends import spectral_ends
from regjax.transforms._static_args import check_static, static_args

Rule: TypeAlias = Callable[[jax.Array, jax.Array], tuple[ArrayLike, ArrayLike]]
"""(largest, smallest curvature) -> (learning rate, momentum)."""


class SpectralControllerState(NamedTuple):
    """State of `spectral_controller`. Measured numbers are 0 before the first good refresh.

    Attributes:
      num_updates: (), int32, updates so far.
      key_data: words of the key of the next random starts, uint32.
      velocity: tree like the parameters, in units of an update.
      learning_rate: (), the present learning rate.
      momentum: (), the present momentum.
      largest: (), L, the largest magnitude of a Ritz value, in units of the Hessian.
      smallest: (), m, the smallest magnitude outside the bulk near zero, at least
        `smallest_ratio` L.
      residual_norm: (), some eigenvalue lies within it of the Ritz value of magnitude L.
      lowest: (), smallest Ritz value with its sign. If it is negative, the loss is not convex here,
        as the rules assume.
      refresh_ok: (), bool, whether L was positive and finite in the last refresh. If not, the other
        numbers are those of the last good refresh.
    """

    num_updates: jax.Array
    key_data: jax.Array
    velocity: Params
    learning_rate: jax.Array
    momentum: jax.Array
    largest: jax.Array
    smallest: jax.Array
    residual_norm: jax.Array
    lowest: jax.Array
    refresh_ok: jax.Array


@static_args("key", "every", "num_steps", "rule", "nesterov")
@checked
def spectral_controller(
    *,
    key: PRNGKey,
    initial_learning_rate: ArrayLike,
    every: int | None,
    num_steps: int = 20,
    rule: Rule = schedules.nesterov_rule,
    nesterov: bool = True,
    smallest_ratio: ArrayLike = 1e-3,
    max_momentum: ArrayLike = 0.99,
) -> optax.GradientTransformationExtraArgs:
    """Descends with a learning rate and a momentum that follow the curvature of the loss.

        v' = momentum v - rate g;   update = momentum v' - rate g (Nesterov), or v' (heavy ball)

    Here g is the incoming gradient and v the velocity. Rate and momentum are rule(L, m), where L is
    the largest curvature of the loss in magnitude, and m the smallest one that is not part of the
    bulk of eigenvalues near zero. Both are estimated from the Ritz values of `num_steps` Lanczos
    steps, before the first step and again after every `every` steps.

    Place it last in the chain instead of `optax.sgd`, after clipping or
    `optax.add_decayed_weights`. The velocity is in units of an update, so that a new rate does not
    rescale the past, as it would in `optax.sgd`.

    The curvature matrix is the Jacobian of `curvature_grad_fn(params)`, an extra argument of
    `update`: the gradient on a fixed subset of the data (1024 examples in the official code),
    without dropout. If it is not given, grad_fn(params, 0) takes its place. The refresh is a
    branch: under `vmap` it runs in every step, and with convolutions on CPU it is slow inside
    `jit`. In these cases pass `every=None` and call `refresh_spectral_controller` between the
    steps.

    Example:
      >>> tx = transforms.spectral_controller(
      ...     key=jax.random.key(0), initial_learning_rate=0.01, every=10, num_steps=8
      ... )
      >>> grad_fn = lambda params, i: params * jnp.linspace(1.0, 9.0, 8)  # curvatures 1 to 9
      >>> params = jnp.ones(8)
      >>> updates, state = tx.update(params, tx.init(params), params, grad_fn=grad_fn)
      >>> print(f"{state.learning_rate:.3f} {state.momentum:.3f}")  # 1 / 9 and (3 - 1) / (3 + 1)
      0.111 0.500

    Args:
      key: typed key of the random starts of Lanczos.
      initial_learning_rate: learning rate until a refresh finds a positive and finite L. The
        momentum is 0 until then.
      every: number of steps between two refreshes, the first at step 0; None: never. The paper uses
        20 epochs.
      num_steps: number of Lanczos steps, at most the number of parameters. Each costs a Hessian
        product.
      rule: function (L, m) -> (rate, momentum), such as `schedules.nesterov_rule`, or
        `schedules.polyak_rule` with `nesterov=False`.
      nesterov: whether the update is Nesterov's; else heavy ball.
      smallest_ratio: m is at least this share of L.
      max_momentum: upper bound of the momentum, below 1.

    Returns:
      A transformation whose `update` needs `params` and `grad_fn`. Its state holds one copy of the
      parameters.

    Raises:
      ValueError: an argument is out of its range; `params`, or both gradient functions, are missing
        in `update`.
      TypeError: an argument has the wrong type.

    References:
      D. Granziol, S. Zohren, S. Roberts (2022), arXiv:2006.09092, and its official code, whose
      "Nesterov" is heavy ball with eq. 26. The bounds of m and of the momentum, and what happens
      where L is unusable, are ours.
    """
    _checks.key("key", key)
    _checks.number("initial_learning_rate", initial_learning_rate, above_zero=True)
    if every is not None:
        check_static("every", every, 1)
    _check_options(num_steps, smallest_ratio, max_momentum, rule)
    _checks.boolean("nesterov", nesterov)

    def init(params: Params) -> SpectralControllerState:
        _checks.floating_leaves("params", params)
        # Arrays of their own: the state is donated.
        number = lambda value: jnp.array(value, _tree.vector_dtype(params))
        return SpectralControllerState(
            num_updates=jnp.int32(0),
            key_data=_keys.words(key),
            velocity=jax.tree.map(jnp.zeros_like, params),
            learning_rate=number(initial_learning_rate),
            momentum=number(0),
            largest=number(0),
            smallest=number(0),
            residual_norm=number(0),
            lowest=number(0),
            refresh_ok=jnp.bool_(False),
        )

    def update(
        updates: Params,
        state: SpectralControllerState,
        params: Params | None = None,
        *,
        grad_fn: GradFn | None = None,
        curvature_grad_fn: Callable[[Params], Params] | None = None,
        **extra: object,
    ) -> tuple[Params, SpectralControllerState]:
        _checks.same_tree("updates", updates, state.velocity)
        if every is not None and jax.tree.leaves(updates):
            params = _gradients.check_whole_params(updates, params)
            given = grad_fn
            if curvature_grad_fn is None:
                given = _given.given(grad_fn, extra)
                curvature_grad_fn = Partial(_first, as_partial(given))
            if given is not None:
                own = Partial(_first, as_partial(given))
                _gradients.check_is_first(
                    updates,
                    None,
                    grad_fn=lambda params, i: own(params),
                    params=params,
                    count=state.num_updates,
                )
            state = _loops.cond(
                state.num_updates % every == 0,
                lambda state: _refreshed(
                    state, curvature_grad_fn, params, _keys.typed(state.key_data, key),
                    num_steps, rule, smallest_ratio, max_momentum,
                ),
                state,
                holds_products=True,
            )  # fmt: skip
        velocity = _accelerated(state, state.velocity, updates)
        state = state._replace(num_updates=state.num_updates + 1, velocity=velocity)
        return (_accelerated(state, velocity, updates) if nesterov else velocity), state

    return optax.GradientTransformationExtraArgs(init, update)


@checked
def refresh_spectral_controller(
    state: SpectralControllerState,
    curvature_grad_fn: Callable[[Params], Params],
    params: Params,
    *,
    num_steps: int = 20,
    rule: Rule = schedules.nesterov_rule,
    smallest_ratio: ArrayLike = 1e-3,
    max_momentum: ArrayLike = 0.99,
) -> SpectralControllerState:
    """Computes a new learning rate and momentum from the curvature at `params`.

    `spectral_controller(every=...)` does this by itself; call this function where you decide when.
    It costs `num_steps` Hessian products.

    Example:
      >>> tx = transforms.spectral_controller(
      ...     key=jax.random.key(0), initial_learning_rate=0.01, every=None
      ... )
      >>> grad_fn = lambda params: params * jnp.linspace(1.0, 9.0, 8)  # curvatures 1 to 9
      >>> params = jnp.ones(8)
      >>> state = tx.init(params)
      >>> state = transforms.refresh_spectral_controller(state, grad_fn, params, num_steps=8)
      >>> print(f"{state.largest:.2f} {state.smallest:.2f} {state.learning_rate:.3f}")
      9.00 1.00 0.111

    Args:
      state: state of `spectral_controller`; in a chain it is the last one of the tuple.
      curvature_grad_fn: function params -> gradient, without dropout. Pass the same function again,
        or `jax.tree_util.Partial` of it with the data as arguments: then nothing is compiled again.
      params: the parameters.
      num_steps: number of Lanczos steps, at most the number of parameters.
      rule: function (L, m) -> (rate, momentum) of the largest and the smallest curvature.
      smallest_ratio: m is at least this share of L.
      max_momentum: upper bound of the momentum, below 1.

    Returns:
      The new state, in which only the measured numbers, the key and `refresh_ok` differ.

    Raises:
      ValueError: an argument is out of its range.
      TypeError: an argument has the wrong type.
    """
    _check_options(num_steps, smallest_ratio, max_momentum, rule)
    if not isinstance(state, SpectralControllerState):
        raise TypeError(f"`state` must be a SpectralControllerState, got {type(state).__name__}.")
    if not callable(curvature_grad_fn):
        raise TypeError(f"`curvature_grad_fn` must be a function, got {curvature_grad_fn!r}.")
    _checks.floating_tree("params", params)
    _checks.same_tree("params", params, state.velocity)
    key = _keys.typed(state.key_data)
    return _refreshed(
        state, curvature_grad_fn, params, key, num_steps, rule, smallest_ratio, max_momentum
    )


def _refreshed(
    state: SpectralControllerState,
    curvature_grad_fn: Callable[[Params], Params],
    params: Params,
    key: PRNGKey,
    num_steps: int,
    rule: Rule,
    smallest_ratio: ArrayLike,
    max_momentum: ArrayLike,
) -> SpectralControllerState:
    """Measures the curvature with `key`, the key of the state."""
    next_key, start_key = jax.random.split(key)
    operator = curvature.from_gradient(curvature_grad_fn, params)
    space = operator.space
    start = space.unravel(space.normal(start_key))
    run = without_error(curvature.lanczos)(operator, start, min(num_steps, space.size))
    found = _read(curvature.ritz_pairs(run), smallest_ratio, max_momentum, rule)
    good = jnp.isfinite(found["largest"]) & (found["largest"] > 0)
    kept = {name: jnp.where(good, value, getattr(state, name)) for name, value in found.items()}
    return state._replace(key_data=_keys.words(next_key), refresh_ok=good, **kept)


def _check_options(
    num_steps: int, smallest_ratio: ArrayLike, max_momentum: ArrayLike, rule: Rule
) -> None:
    if not callable(rule):
        raise TypeError(f"`rule` must be a function such as nesterov_rule, got {rule!r}.")
    check_static("num_steps", num_steps, 1)
    _checks.number("smallest_ratio", smallest_ratio)
    _checks.number("max_momentum", max_momentum)
    if isinstance(max_momentum, (int, float)) and max_momentum >= 1:
        raise ValueError(f"`max_momentum` must be below 1, got {max_momentum}.")


def _accelerated(state: SpectralControllerState, velocity: Params, grads: Params) -> Params:
    """Computes momentum times velocity less rate times gradient, leaf by leaf."""

    def combine(v: jax.Array, g: jax.Array) -> jax.Array:
        wide = _tree.wide(v)
        momentum = state.momentum.astype(wide.dtype)
        rate = state.learning_rate.astype(wide.dtype)
        return (momentum * wide - rate * jnp.asarray(g, wide.dtype)).astype(jnp.result_type(v))

    return jax.tree.map(combine, velocity, grads)


def _first(grad_fn: GradFn, params: Params) -> Params:
    return _given.understood("grad_fn(params, i)", grad_fn(params, 0), params)


@functools.partial(jax.jit, static_argnums=3)
def _read(
    pairs: curvature.RitzResult, smallest_ratio: ArrayLike, max_momentum: ArrayLike, rule: Rule
) -> dict[str, jax.Array]:
    """Picks what the state keeps of a Lanczos run."""
    values, weights = pairs.values, pairs.weights
    dtype, is_value = values.dtype, weights > 0
    ends = spectral_ends(values, weights, smallest_ratio=smallest_ratio)
    place = jnp.argmax(jnp.where(is_value, jnp.abs(values), -1))
    learning_rate, momentum = (
        jnp.asarray(number, dtype) for number in rule(ends.largest, ends.smallest)
    )
    return {
        "learning_rate": learning_rate,
        "momentum": jnp.minimum(momentum, jnp.asarray(max_momentum, dtype)),
        "largest": ends.largest,
        "smallest": ends.smallest,
        "residual_norm": pairs.residual_norms[place],
        "lowest": jnp.min(jnp.where(is_value, values, jnp.inf)),
    }
