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
