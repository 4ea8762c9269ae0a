"""What is known of optax's optimisers: their numbers, their preconditioners, where they diverge.

With its second moments held, an optimiser is a linear recurrence on a quadratic loss. In the
coordinates P^(1/2) w, with the rate r, the momentum b and decoupled decay d, its slowest direction
follows for heavy ball and for Nesterov's momentum

    (E - 1 + r d)(E - b) + r s h E = 0,   (E - 1 + r d)(E - b) + r s h ((1 + b) E - b) = 0

E the shift by a step, h an eigenvalue of P^(-1/2) H P^(-1/2), and s = 1, or 1 - b where the mean of
gradients is averaged and not summed. It leaves the unit circle at E = -1.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _numerics, _tree

Hyperparams: TypeAlias = Mapping[str, Any]
"""Optax's name of a number -> the number."""


class Root(NamedTuple):
    """What an update of a leaf is divided by.

    Attributes:
      divisor: like the leaf, P: its gradient, or the mean of gradients, is divided by it.
      deviation: like the leaf, the root of its second moment alone.
      floor: (), the deviation at which epsilon weighs as much.
    """

    divisor: jax.Array
    deviation: jax.Array
    floor: jax.Array


class Optimizer(NamedTuple):
    """What decides the preconditioner and the threshold of one of optax's optimisers.

    Attributes:
      states: names of the types of the state that holds its second moments (not all are public);
        empty: it has none.
      defaults: its numbers with optax's own defaults.
      root: (state, leaves by their name in the state, numbers) -> `Root`; None: no preconditioner.
      averages: whether the mean of gradients is averaged, with weight 1 - b, not summed.
      nesterov: whether its momentum is always Nesterov's.
    """

    states: tuple[str, ...]
    defaults: Hyperparams
    root: Callable[[Any, Mapping[str, jax.Array], Hyperparams], Root] | None
    averages: bool
    nesterov: bool


def _number(value: ArrayLike, like: jax.Array) -> jax.Array:
    return jnp.asarray(value, like.dtype)


def _corrected(count: jax.Array, decay: ArrayLike, like: jax.Array) -> jax.Array:
    """1 - decay^count, the weight that a mean which began at zero has after so many updates."""
    return 1 - _number(decay, like) ** _number(count, like)


def _of_adam(state: Any, leaf: Mapping[str, jax.Array], numbers: Hyperparams) -> Root:
    square = leaf["nu"] / _corrected(state.count, numbers["b2"], leaf["nu"])
    return _averaged(state, square, numbers)


def _of_amsgrad(state: Any, leaf: Mapping[str, jax.Array], numbers: Hyperparams) -> Root:
    return _averaged(state, leaf["nu_max"], numbers)


def _averaged(state: Any, square: jax.Array, numbers: Hyperparams) -> Root:
    eps, inner = _number(numbers["eps"], square), _number(numbers["eps_root"], square)
    divisor = jnp.sqrt(square + inner) + eps
    # The mean is corrected by the same factor, which stands in the numerator of an update.
    if numbers.get("bias_correction_mu", True):
        divisor = _corrected(state.count, numbers["b1"], square) * divisor
    return Root(divisor, jnp.sqrt(square), jnp.maximum(eps, jnp.sqrt(inner)))


def _of_adabelief(state: Any, leaf: Mapping[str, jax.Array], numbers: Hyperparams) -> Root:
    square = leaf["nu"]
    square = square / _corrected(state.count, numbers["b2"], square)
    # Added to each new square, the inner epsilon is summed like them.
    inner = _number(numbers["eps_root"], square) / (1 - _number(numbers["b2"], square))
    eps = _number(numbers["eps"], square)
    deviation = jnp.sqrt(square)
    divisor = _corrected(state.count, numbers["b1"], square) * (deviation + eps)
    return Root(divisor, deviation, jnp.maximum(eps, jnp.sqrt(inner)))


def _of_adamax(state: Any, leaf: Mapping[str, jax.Array], numbers: Hyperparams) -> Root:
    largest = leaf["nu"]
    divisor = _corrected(state.count, numbers["b1"], largest) * largest
    return Root(divisor, largest, _number(numbers["eps"], largest))


def _of_rmsprop(state: Any, leaf: Mapping[str, jax.Array], numbers: Hyperparams) -> Root:
    square = leaf["nu"]
    weight = jnp.ones((), square.dtype)
    if "count" in state._fields:
        weight = _corrected(state.count, numbers["decay"], square)
    square = square / weight
    if "mu" in leaf:
        square = jnp.maximum(square - (leaf["mu"].astype(square.dtype) / weight) ** 2, 0)
    eps, deviation = _number(numbers["eps"], square), jnp.sqrt(square)
    if numbers["eps_in_sqrt"]:
        return Root(jnp.sqrt(square + eps), deviation, jnp.sqrt(eps))
    return Root(deviation + eps, deviation, eps)


def _of_adagrad(state: Any, leaf: Mapping[str, jax.Array], numbers: Hyperparams) -> Root:
    square = leaf["sum_of_squares"]
    eps = _number(numbers["eps"], square)
    # What never had a gradient is not moved.
    divisor = jnp.where(square <= 0, jnp.inf, jnp.sqrt(square + eps))
    return Root(divisor, jnp.sqrt(square), jnp.sqrt(eps))


_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "eps_root": 0.0}
_DECAY = {"weight_decay": 1e-4}
_MOMENTUM = {"momentum": None, "nesterov": False}
_NESTEROV = {"nesterov": False}
_RMS = tuple(f"ScaleBy{what}State" for what in (
    "Rms", "RmsWithCount", "RStdDev", "RStdDevWithCount"
))  # fmt: skip
_ADAMS = ("ScaleByAdamState",)

OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": Optimizer((), _MOMENTUM, None, False, False),
    "rmsprop": Optimizer(
        _RMS, {"decay": 0.9, "eps": 1e-8, "eps_in_sqrt": True} | _MOMENTUM, _of_rmsprop,
        False, False,
    ),
    "adagrad": Optimizer(("ScaleByRssState",), {"eps": 1e-7}, _of_adagrad, False, False),
    "adam": Optimizer(_ADAMS, _ADAM | _NESTEROV, _of_adam, True, False),
    "adamw": Optimizer(_ADAMS, _ADAM | _DECAY | _NESTEROV, _of_adam, True, False),
    "nadam": Optimizer(_ADAMS, _ADAM, _of_adam, True, True),
    "nadamw": Optimizer(_ADAMS, _ADAM | _DECAY, _of_adam, True, True),
    "amsgrad": Optimizer(
        ("ScaleByAmsgradState",), _ADAM | {"bias_correction_mu": True}, _of_amsgrad, True, False
    ),
    "adabelief": Optimizer(
        ("ScaleByBeliefState",), _ADAM | {"eps": 1e-16, "eps_root": 1e-16} | _NESTEROV,
        _of_adabelief, True, False,
    ),
    "yogi": Optimizer(_ADAMS, _ADAM | {"eps": 1e-3}, _of_adam, True, False),
    "adamax": Optimizer(_ADAMS, {"b1": 0.9, "eps": 1e-8}, _of_adamax, True, False),
    "adamaxw": Optimizer(_ADAMS, {"b1": 0.9, "eps": 1e-8} | _DECAY, _of_adamax, True, False),
}  # fmt: skip
"""Name of the function in optax -> what is known."""

_SIGNS = ("lion", "sign_sgd", "signum", "rprop")


def optimizer_of(name: str) -> Optimizer:
    """What is known of an optimiser.

    Raises:
      ValueError: no threshold of it is known.
    """
    if name in _SIGNS:
        raise ValueError(
            f"`optimizer` must have a threshold, got {name!r}: the length of its steps does not "
            "shrink with the gradient, so that no learning rate is stable."
        )
    return OPTIMIZERS[_checks.choice("optimizer", name, tuple(OPTIMIZERS))]


def numbers_of(name: str, found: Hyperparams, given: Hyperparams | None) -> dict[str, Any]:
    """The numbers of an optimiser: optax's defaults, those found in its state, those given.

    Raises:
      TypeError: they are no mapping, or one of them is no number.
      ValueError: the optimiser has no such number, one is out of its range, or what is given is not
        what the state says.
    """
    defaults, given = optimizer_of(name).defaults, {} if given is None else given
    if not isinstance(given, Mapping):
        raise TypeError(f"`hyperparams` must map names to numbers, got {type(given).__name__}.")
    for key, value in given.items():
        if key not in defaults:
            raise ValueError(
                f"`hyperparams` of {name} must be among {', '.join(defaults)}, got {key!r}."
            )
        _check(key, value, defaults[key])
        stated = _checks.host_value(found[key]) if key in found else None
        if stated is not None and _checks.host_value(value) is not None and (stated != value).any():
            raise ValueError(
                f"`hyperparams` must agree with `optimizer_state`, whose {key} is {stated}, got "
                f"{value}."
            )
    return {**defaults, **{key: found[key] for key in defaults if key in found}, **given}


def _check(key: str, value: Any, default: Any) -> None:
    label = f"hyperparams['{key}']"
    if isinstance(default, bool):
        _checks.boolean(label, value)
    elif value is not None or default is not None:
        _checks.number(label, value)
        if key in ("b1", "b2", "decay", "momentum"):
            _checks.between(label, value, 0, 1)


def threshold_of(name: str, learning_rate: ArrayLike, numbers: Hyperparams) -> jax.Array:
    """The largest stable eigenvalue (), from the recurrence at E = -1."""
    known = optimizer_of(name)
    momentum = numbers["b1"] if known.averages else numbers.get("momentum")
    momentum = 0.0 if momentum is None else momentum
    dtype = _tree.wide_dtype(jnp.asarray(learning_rate, jnp.result_type(float)))
    rate, b = jnp.asarray(learning_rate, dtype), jnp.asarray(momentum, dtype)
    decay = jnp.asarray(numbers.get("weight_decay", 0.0), dtype)
    share = 1 - b if known.averages else jnp.ones((), dtype)
    if known.nesterov or numbers.get("nesterov", False):
        share = share * (1 + 2 * b)
    return (2 / rate - decay) * _numerics.divide(1 + b, share, otherwise=jnp.inf)
