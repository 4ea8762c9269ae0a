"""A step of flax's `TrainState` that hands on what its own method drops."""

import dataclasses
from typing import Any, TypeVar

import optax

from regjax._base import Params

_State = TypeVar("_State")


def apply_gradients(state: _State, grads: Params, **options: Any) -> _State:
    """Calls `state.apply_gradients` of flax's `TrainState`, with arguments for the transformation.

                state = apply_gradients(state, grads, grad_fn=grad_fn, batch_stats=batch_stats)

    The method itself ignores keywords that are not fields of the state, so that `grad_fn` would
    never reach the transformation. Here a keyword that names a field goes to the method, and every
    other one goes to `tx.update`. A subclass's own `apply_gradients` is called as usual.

    Example:
      >>> from flax.training.train_state import TrainState
      >>> params = {"w": jnp.array([3.0, 4.0])}  # of the loss |w|^2 / 2
      >>> tx = optax.chain(transforms.sam(1.0), optax.sgd(0.1))
      >>> state = TrainState.create(apply_fn=None, params=params, tx=tx)
      >>> state = transforms.apply_gradients(state, params, grad_fn=lambda params, i: params)
      >>> print(state.params["w"])
      [2.64 3.52]

    Args:
      state: a `flax.training.train_state.TrainState`, or of a subclass.
      grads: the gradient.
      **options: new values of fields, and arguments of `tx.update` such as `grad_fn`, `value_fn` or
        `value`.

    Returns:
      The state after the step.

    Raises:
      TypeError: `state` is not a `TrainState`. `nnx.Optimizer` needs no such function:
        `optimizer.update(model, grads, grad_fn=grad_fn)` passes the argument on.
      ValueError: `tx` is among the options.
    """
    tx: Any = getattr(state, "tx", None)
    if not (dataclasses.is_dataclass(state) and hasattr(state, "apply_gradients") and tx):
        raise TypeError(
            "`state` must be a TrainState of flax, with tx and apply_gradients, got "
            f"{type(state).__name__}. nnx.Optimizer.update(model, grads, grad_fn=grad_fn) hands on "
            "by itself what it is given."
        )
    if "tx" in options:
        raise ValueError("`options` must not hold `tx`: a step does not replace it.")
    fields = {field.name for field in dataclasses.fields(state)}
    extra = {name: value for name, value in options.items() if name not in fields}
    changes = {name: value for name, value in options.items() if name in fields}
    inner = optax.with_extra_args_support(tx)

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None, **more: Any
    ) -> tuple[Params, optax.OptState]:
        return inner.update(updates, state, params, **extra, **more)

    holder: Any = state
    bound = optax.GradientTransformationExtraArgs(tx.init, update)
    return holder.replace(tx=bound).apply_gradients(grads=grads, **changes).replace(tx=tx)
