"""Gates: rules that decide at each step whether a penalty is on, for the whole network at once."""

from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _numerics
from regjax._arguments import checked
from regjax._base import Tree
from regjax.transforms._static_args import check_static

Leaves = list[jax.Array]


class Gate(NamedTuple):
    """A rule that decides at each step whether a penalty is on, for the whole network at once.

    For `coherent_regularization`; see `delayed_gate`, `cosine_gate` and `ratio_gate`.

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
      init: function () -> state of the gate, a tree of arrays.
      decide: function (loss gradients, penalty gradients, state, count) -> (on, state). The
        gradients are lists of the masked leaves, count is the number of updates so far, and on is
        a bool array ().
    """

    init: Callable[[], Tree]
    decide: Callable[[Leaves, Leaves, Tree, jax.Array], tuple[jax.Array, Tree]]


def always_gate() -> Gate:
    """Makes a gate that is always open, which gives an ordinary penalty.

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
      delay: number of steps. Five epochs is a good start.

    Returns:
      A `Gate` without state.

    Raises:
      ValueError: `delay` is negative.
    """
    check_static("delay", delay, 0)
    return Gate(lambda: (), lambda grads, added, state, count: (count >= delay, state))


@checked
def cosine_gate(threshold: float = 0.5, *, hold: int | None = None) -> Gate:
    """Makes a gate that is open while the gradients of loss and penalty agree.

        <g, g + r> / (|g| |g + r|) > threshold

    Here g is the gradient of the loss and r that of the penalty, over all masked leaves together.
    Where training ends, g = -r, so that the cosine falls and the gate would close again: pass
    `hold`.

    Example:
      >>> gate = transforms.cosine_gate(0.5)
      >>> grads, added = [jnp.array([1.0, 0.0])], [jnp.array([0.0, 1.0])]  # a cosine of 0.71
      >>> on, state = gate.decide(grads, added, gate.init(), 0)
      >>> print(on)
      True

    Args:
      threshold: between 0 and 1. The default is our choice; 0.8 protects the loss more and
        regularises less.
      hold: after this many open steps in a row the gate stays open for good. One epoch works well.
        None: never.

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

        |g| > threshold |r|

    Here g is the gradient of the loss and r that of the penalty, over all masked leaves together.

    Example:
      >>> gate = transforms.ratio_gate(2.0)
      >>> grads, added = [jnp.array([3.0, 0.0])], [jnp.array([0.0, 1.0])]
      >>> on, state = gate.decide(grads, added, gate.init(), 0)
      >>> print(on)
      True

    Args:
      threshold: at least 0.
      hold: after this many open steps in a row the gate stays open for good. None: never.

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
