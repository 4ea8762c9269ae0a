"""Running batch statistics: one more step of them, or those of many batches at given weights."""

import functools
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from regjax._adapters import Model
from regjax._base import Params, PRNGKey, State, Tree
from regjax._numerics import divide
from regjax._runners import ApplyFn


def updated_statistics(
    model: Model,
    params: Params,
    inputs: Tree,
    *,
    state: State = None,
    key: PRNGKey | None = None,
) -> State:
    """Returns the model's state after one forward pass in train mode at `params`.

    Transformations that take the gradient elsewhere and never at the parameters themselves
    (`perturbed_gradient`, `entropy_sgd`) would otherwise leave statistics of perturbed weights, or
    none: drop the state that comes out of their `grad_fn`, and call this once after the update.
    Where the loss is computed at the parameters anyway, its new state serves as well.

    Args:
      model: from one of the adapters.
      params: tree of parameters.
      inputs: of the step's batch, leading axis the examples.
      state: the state before; None: the model's own.
      key: typed key of dropout, or None.

    Returns:
      The new state: the running statistics have taken one step towards those of the batch.
    """
    state = model.state if state is None else state
    return model.apply(params, state, inputs, train=True, key=key)[1]


def population_statistics(
    model: Model,
    params: Params,
    batches: Iterable[Tree],
    *,
    state: State = None,
    key: PRNGKey | None = None,
) -> State:
    """Returns the model's state with the mean of the batch statistics of many batches at `params`.

    Running averages lag behind the weights, and belong to other ones after weights were averaged,
    perturbed or rescaled. Statistics are recognised as what one train pass moves from s to
    m s + (1 - m) b, for whatever momentum m; the mean of b over the batches takes their place. With
    `unbiased_running_variance` that is the paper's population variance; flax's own batch norm
    leaves out the factor n / (n - 1) (`normalization.exact_population_statistics`).

    Args:
      model: from one of the adapters.
      params: tree of parameters.
      batches: inputs of each batch, of one size; any iterable.
      state: the state before, whose leaves stay as they are where they are no such averages; None:
        the model's own.
      key: typed key of dropout, or None.

    Returns:
      A state like `state`.

    Raises:
      ValueError: there is no batch.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithm 2, lines 8 to 10.
    """
    state = model.state if state is None else state
    floating = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    zero = jax.tree.map(lambda s: jnp.zeros_like(s) if floating(s) else s, state)
    total, num_batches, rest = zero, 0, zero
    for inputs in batches:
        # (1 - m) b, and from a start of its size m times that start more.
        moved = _train_pass(model.apply, params, zero, inputs, key)
        if num_batches == 0:
            start = jax.tree.map(lambda s: 1 + jnp.abs(s) if floating(s) else s, moved)
            other = _train_pass(model.apply, params, start, inputs, key)
            rest = jax.tree.map(
                lambda a, b, s: 1 - (a - b) / s if floating(s) else s, other, moved, start
            )
        total = jax.tree.map(lambda a, b: a + b if floating(a) else a, total, moved)
        num_batches += 1
    if num_batches == 0:
        raise ValueError("`batches` must hold at least one batch, got none.")

    def mean(old: jax.Array, total: jax.Array, rest: jax.Array) -> jax.Array:
        if not floating(old):
            return old
        return divide(total / num_batches, rest, where=rest > _FROZEN, otherwise=old)

    return jax.tree.map(mean, state, total, rest)


# A leaf that moves by less of the way than this, 1 - m, is rounding about one that stays.
_FROZEN = 1e-5


@functools.partial(jax.jit, static_argnums=0)
def _train_pass(
    apply: ApplyFn, params: Params, state: State, inputs: Tree, key: PRNGKey | None
) -> State:
    return apply(params, state, inputs, train=True, key=key)[1]
