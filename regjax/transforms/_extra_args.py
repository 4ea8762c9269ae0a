"""What the transformations of this room share: masks, schedules, `grad_fn`, and two wrappers.

A transformation that needs a gradient somewhere else than at the parameters takes it through the
update: `tx.update(grads, state, params, grad_fn=grad_fn)`, grad_fn(params, i) -> gradient.
"""

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from regjax import _checks
from regjax._base import GradFn, Params
from regjax._space import Space
from regjax._tree import wide as wide
from regjax._tree import wide_dtype as wide_dtype

Mask: TypeAlias = Any
"""Tree of bools like the parameters, a function params -> such a tree, or None for all leaves."""


def value_at(number: Any, count: jax.Array) -> Any:
    """A number, or a schedule's value at `count`."""
    return number(count) if callable(number) else number


def is_zero(number: Any) -> bool:
    """Whether a setting is neutral for sure: a Python number that is zero."""
    return isinstance(number, (int, float)) and number == 0


def check_size(name: str, value: Any) -> None:
    """Checks a number or schedule that must not be negative."""
    if not callable(value):
        _checks.non_negative(name, value)


def check_static(name: str, value: Any, minimum: int) -> int:
    """Checks an integer that decides the program, so that it cannot be traced."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"`{name}` must be a Python integer, got an array: name it in inject_hyperparams, "
            "static_args=f.static_args."
        )
    return _checks.integer(name, value, minimum=minimum)


def mask_leaves(mask: Mask, params: Params) -> list[bool]:
    """One bool for each leaf of `params`."""
    return _checks.mask_leaves(mask(params) if callable(mask) else mask, params)


def check_params(params: Params | None) -> Params:
    """`params`, or an error that says how to pass them."""
    if params is None:
        raise ValueError("`params` must be given: call update(updates, state, params, ...).")
    return params


def check_whole_params(params: Params | None) -> Params:
    """`params`, or an error that says that `grad_fn` needs all of them."""
    params = check_params(params)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "`params` must be whole, because `grad_fn` needs all of them: instead of optax.masked "
            "or optax.partition use the transformation's own `mask`."
        )
    return params


def check_grad_fn(grad_fn: GradFn | None) -> GradFn:
    """`grad_fn`, or an error that says how to pass it."""
    if grad_fn is None:
        raise ValueError(
            "`grad_fn` must be given, got None: call "
            "update(grads, state, params, grad_fn=lambda params, i: gradient)."
        )
    return grad_fn


def like(tree: Any, reference: Any) -> Any:
    """`tree` with the dtypes of `reference`."""
    return jax.tree.map(lambda leaf, ref: leaf.astype(jnp.result_type(ref)), tree, reference)


def normal_like(key: jax.Array, leaves: list[Any]) -> list[jax.Array]:
    """Standard normal arrays of the shapes of `leaves`, in float32 at least.

    Drawn as one vector: XLA on CPU takes a quarter longer for a draw of each leaf.
    """
    like = [jax.ShapeDtypeStruct(jnp.shape(leaf), wide_dtype(leaf)) for leaf in leaves]
    space = Space.of(like)
    # Or each use of the noise would compute it again.
    return space.unravel(lax.optimization_barrier(space.normal(key)))


def only_extra(
    tx: optax.GradientTransformation, *names: str
) -> optax.GradientTransformationExtraArgs:
    """Passes only the named extra arguments on to `tx`, and drops the others.

    For members of a chain that reject what they do not know, such as optax's line searches:
    `only_extra(optax.scale_by_backtracking_linesearch(15), "value", "grad", "value_fn")`.

    Args:
      tx: a transformation.
      *names: of the extra arguments that it knows.

    Returns:
      A transformation that takes any extra argument.
    """
    tx = optax.with_extra_args_support(tx)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        kept = {name: value for name, value in extra.items() if name in names}
        return tx.update(updates, state, params, **kept)

    return optax.GradientTransformationExtraArgs(tx.init, update)


class SkipNonfiniteState(NamedTuple):
    """State of `skip_nonfinite`.

    Attributes:
      inner: of the wrapped transformation.
      num_skipped: (), int32, steps left out so far.
    """

    inner: Any
    num_skipped: jax.Array


def skip_nonfinite(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Leaves a step out, state and all, if an update that comes out of `tx` is not finite.

    `optax.apply_if_finite` looks at the gradient that comes in, which a transformation that takes
    another gradient does not use; and it wraps `tx` in a branch, in which XLA on CPU runs
    convolutions an order of magnitude slower. Here `tx` always runs, and its results are selected.

    Args:
      tx: a transformation, or a whole chain.

    Returns:
      A transformation whose state counts the steps left out.
    """
    tx = optax.with_extra_args_support(tx)

    def init(params: Params) -> SkipNonfiniteState:
        return SkipNonfiniteState(tx.init(params), jnp.int32(0))

    def update(
        updates: Any, state: SkipNonfiniteState, params: Any = None, **extra: Any
    ) -> tuple[Any, SkipNonfiniteState]:
        new, inner_state = tx.update(updates, state.inner, params, **extra)
        finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new)]
        keep = jnp.all(jnp.stack(finite)) if finite else jnp.bool_(True)
        new = jax.tree.map(lambda leaf: jnp.where(keep, leaf, jnp.zeros_like(leaf)), new)
        inner_state = jax.tree.map(lambda a, b: jnp.where(keep, a, b), inner_state, state.inner)
        skipped = state.num_skipped + jnp.where(keep, 0, 1).astype(jnp.int32)
        return new, SkipNonfiniteState(inner_state, skipped)

    return optax.GradientTransformationExtraArgs(init, update)
