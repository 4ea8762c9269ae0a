"""Running batch statistics after an update that had no clean pass of its own."""

from collections.abc import Callable
from typing import Any

import jax

from regjax._base import Params


def updated_statistics(
    apply: Callable[..., tuple[Any, Any]],
    params: Params,
    state: Any,
    inputs: Any,
    *,
    key: jax.Array | None = None,
) -> Any:
    """The model's state after one forward pass in train mode at `params`.

    Transformations that take the gradient elsewhere and never at the parameters themselves
    (`perturbed_gradient`, `entropy_sgd`) would otherwise leave statistics of perturbed weights, or
    none: drop the state that comes out of their `grad_fn`, and call this once after the update.
    Where the loss is computed at the parameters anyway, its new state serves as well.

    Args:
      apply: of a `Model`.
      params: tree of parameters.
      state: the model's state before.
      inputs: of the step's batch, leading axis the examples.
      key: typed key of dropout, or None.

    Returns:
      The new state: the running statistics have taken one step towards those of the batch.
    """
    return apply(params, state, inputs, train=True, key=key)[1]
