"""Running batch statistics: one more step of them, or those of many batches at given weights."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

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


def population_statistics(
    apply: Callable[..., tuple[Any, Any]],
    params: Params,
    state: Any,
    batches: Iterable[Any],
    *,
    key: jax.Array | None = None,
) -> Any:
    """The model's state with the mean of the batch statistics of many batches at `params`.

    Running averages lag behind the weights, and belong to other ones after weights were averaged,
    perturbed or rescaled. Statistics are recognised as what one train pass moves from s to
    m s + (1 - m) b, for whatever momentum m; the mean of b over the batches takes their place. With
    `unbiased_running_variance` that is the paper's population variance; flax's own batch norm
    leaves out the factor n / (n - 1) (`normalization.exact_population_statistics`).

    Args:
      apply: of a `Model`.
      params: tree of parameters.
      state: the model's state. Leaves that are no such averages stay as they are.
      batches: inputs of each batch, of one size; any iterable.
      key: typed key of dropout, or None.

    Returns:
      A state like `state`.

    Raises:
      ValueError: there is no batch.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithm 2, lines 8 to 10.
    """
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    zero = jax.tree.map(lambda s: jnp.zeros_like(s) if floating(s) else s, state)
    total, num_batches, rest = zero, 0, zero
    for inputs in batches:
        # (1 - m) b, and from a start of its size m times that start more.
        moved = _train_pass(apply, params, zero, inputs, key)
        if num_batches == 0:
            start = jax.tree.map(lambda s: 1 + jnp.abs(s) if floating(s) else s, moved)
            other = _train_pass(apply, params, start, inputs, key)
            rest = jax.tree.map(
                lambda a, b, s: 1 - (a - b) / s if floating(s) else s, other, moved, start
            )
        total = jax.tree.map(lambda a, b: a + b if floating(a) else a, total, moved)
        num_batches += 1
    if num_batches == 0:
        raise ValueError("`batches` must hold at least one batch, got none.")

    def mean(old: Any, total: Any, rest: Any) -> Any:
        if not floating(old):
            return old
        ticks = rest > _FROZEN
        return jnp.where(ticks, total / num_batches / jnp.where(ticks, rest, 1), old)

    return jax.tree.map(mean, state, total, rest)


# A leaf that moves by less of the way than this, 1 - m, is rounding about one that stays.
_FROZEN = 1e-5


@functools.partial(jax.jit, static_argnums=0)
def _train_pass(apply: Any, params: Any, state: Any, inputs: Any, key: Any) -> Any:
    return apply(params, state, inputs, train=True, key=key)[1]
