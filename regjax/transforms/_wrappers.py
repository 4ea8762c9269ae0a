"""Transformations around a transformation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from regjax._base import Params


def only_extra(
    tx: optax.GradientTransformation, *names: str
) -> optax.GradientTransformationExtraArgs:
    """Passes only the named extra arguments on to `tx`, and drops the others.

    Use it for members of a chain that reject unknown arguments, such as optax's line searches,

        only_extra(optax.scale_by_backtracking_linesearch(15), "value", "grad", "value_fn")

    and for those that would read too many: `only_extra(sam(0.05), "grad_fn")` beside a `value_fn`.

    Example:
      >>> def update(updates, state, params=None, *, value):  # takes `value` and nothing else
      ...     return value * updates, state
      >>> strict = optax.GradientTransformationExtraArgs(lambda params: (), update)
      >>> tx = optax.chain(transforms.sam(1.0), transforms.only_extra(strict, "value"))
      >>> params = jnp.array([3.0, 4.0])
      >>> extra = {"grad_fn": lambda params, i: params, "value": 10.0}
      >>> updates, state = tx.update(params, tx.init(params), params, **extra)
      >>> print(updates)
      [36. 48.]

    Args:
      tx: a transformation.
      *names: names of the extra arguments that are passed on.

    Returns:
      A transformation that takes any extra argument.

    Raises:
      TypeError: `tx` is not a transformation, or a name is not a string.
    """
    tx = with_extra_args(tx)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"`names` must be names of arguments, got {name!r}.")

    def update(
        updates: Params, state: optax.OptState, params: Params | None = None, **extra: object
    ) -> tuple[Params, optax.OptState]:
        kept = {name: value for name, value in extra.items() if name in names}
        return tx.update(updates, state, params, **kept)

    return optax.GradientTransformationExtraArgs(tx.init, update)


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      inner: of the wrapped transformation.
      num_skipped: (), int32, steps left out so far.
    """

    inner: optax.OptState
    num_skipped: jax.Array


def skip_nonfinite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Skips a step, and the change of the state, if an update of `tx` is not finite.

    `optax.apply_if_finite` looks at the incoming gradient, which a transformation that takes
    another gradient does not use. It also puts `tx` into a branch, in which XLA on CPU runs
    convolutions an order of magnitude slower. Here `tx` always runs, and its results are selected.

    Example:
      >>> tx = transforms.skip_nonfinite(optax.sgd(0.1))
      >>> params = jnp.array([1.0, 2.0])
      >>> state = tx.init(params)
      >>> for grads in (jnp.array([1.0, jnp.nan]), jnp.array([1.0, 1.0])):
      ...     updates, state = tx.update(grads, state, params)
      ...     print(updates, state.num_skipped)
      [0. 0.] 1
      [-0.1 -0.1] 1

    Args:
      tx: a transformation, or a whole chain.

    Returns:
      A transformation whose state counts the skipped steps.

    Raises:
      TypeError: `tx` is not a transformation.
    """
    tx = with_extra_args(tx)

    def init(params: Params) -> SkipNonfiniteState:
        return SkipNonfiniteState(tx.init(params), jnp.int32(0))

    def update(
        updates: Params, state: SkipNonfiniteState, params: Params | None = None, **extra: object
    ) -> tuple[Params, SkipNonfiniteState]:
        new, inner_state = tx.update(updates, state.inner, params, **extra)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]
        keep = jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)
        new = jax.tree.map(lambda leaf: jnp.where(keep, leaf, jnp.zeros_like(leaf)), new)
        inner_state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), inner_state, state.inner)
        skipped = state.num_skipped + jnp.where(keep, 0, 1).astype(jnp.int32)
        return new, SkipNonfiniteState(inner_state, skipped)

    return optax.GradientTransformationExtraArgs(init, update)


def with_extra_args(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns `tx`, if it is a transformation, as one that takes extra arguments."""
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(f"`tx` must be a transformation such as optax.scale_by_adam(), got {tx!r}.")
    return optax.with_extra_args_support(tx)
