"""What `update` is given besides the gradients, and gradients in the dtypes it was given.

A transformation that needs a gradient somewhere else than at the parameters takes it through the
update: `tx.update(grads, state, params, grad_fn=grad_fn)`, grad_fn(params, i) -> gradient.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from regjax import _checks, _loops, _numerics
from regjax._base import GradFn, Params, Tree
from regjax.transforms import _given


def check_params(updates: Params, params: Params | None) -> Params:
    """Returns `params` if they are a tree like `updates`, or says how to pass them."""
    if params is None:
        raise ValueError("`params` must be given: call update(updates, state, params, ...).")
    _checks.same_tree("updates", updates, params)
    return params


def check_whole_params(updates: Params, params: Params | None) -> Params:
    """Returns `params`, or raises an error that says that `grad_fn` needs all of them."""
    params = check_params(updates, params)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "`params` must be whole, because `grad_fn` needs all of them: instead of optax.masked "
            "or optax.partition use the transformation's own `mask`."
        )
    return params


def carried(params: Params, tree: Tree, what: str) -> tuple[list[Tree], list[int]]:
    """Lists what a state carries for each leaf of `params`, and the places that no mask left out.

    Args:
      params: tree of parameters, or of updates like them.
      tree: like `params`, with `optax.MaskedNode` for leaves that the state knows nothing of.
      what: is in the state, for the error.
    """
    structure: Any = jax.tree.structure(params)
    try:
        found = structure.flatten_up_to(tree)
    except (ValueError, TypeError):
        raise ValueError(
            f"`params` must have the tree structure {jax.tree.structure(tree)} of {what} in "
            f"`state`, got {structure}."
        ) from None
    places = [i for i, node in enumerate(found) if not isinstance(node, optax.MaskedNode)]
    leaves = jax.tree.leaves(params)
    _checks.same_tree("params", [leaves[i] for i in places], [found[i] for i in places])
    return found, places


def checked_grad_fn(
    grad_fn: GradFn | None, extra: Mapping[str, Any], *, num_shards: int = 1
) -> GradFn:
    """Returns the gradient function of an `update`, whose results are trees like the parameters.

    Args:
      grad_fn: as in `update`.
      extra: its other arguments, of which `value_fn` or `obj_fn` may stand for `grad_fn`.
      num_shards: parts of a batch that the function has to tell apart.
    """
    function = _given.given(grad_fn, extra, num_shards=num_shards)
    return lambda params, i: _given.understood("grad_fn(params, i)", function(params, i), params)


def check_is_first(
    updates: Params,
    grads: Params | None,
    *,
    grad_fn: GradFn,
    params: Params,
    count: jax.Array,
) -> None:
    """Refuses what a step of descent made of the gradient, where the numbers are known.

    A transformation that puts a gradient into the chain would climb behind `optax.sgd`. Outside of
    `jit` this is seen in the first update: what comes in points against the gradient.

    Not inside: nothing at trace time tells an update from a gradient, a host callback would keep
    the user's step out of the compilation cache and off exports, and an update of NaN would need
    one more gradient in the program to be sure. `jax.disable_jit` makes this check of any step.

    Args:
      updates: what came in.
      grads: what goes out, if that is a gradient: only where it differs is another one taken.
      grad_fn: as in `update`, as are the rest.
      params: tree of the parameters.
      count: (), updates so far.
    """
    if not _loops.is_concrete(updates, grads, params, count) or count != 0:
        return
    if grads is not None and _numerics.cosine(updates, grads) >= 0:
        return
    if _numerics.cosine(updates, grad_fn(params, 0)) < -_AGAINST:
        raise ValueError(
            "`updates` must be the gradient, got what points against it: what reads or gives a "
            "gradient stands before the optimiser, as in optax.chain(sam(0.05), optax.sgd(0.1))."
        )


# Of the cosine, which is -1 behind SGD, and -0.8 behind Adam's first step for Gaussian gradients.
_AGAINST = 0.1


def like(tree: Params, *references: Tree) -> Params:
    """Casts the leaves of `tree` to the dtypes of a reference, or to what several promote to."""
    cast = lambda leaf, *refs: leaf.astype(sum_dtype(*refs))
    return jax.tree.map(cast, tree, *references)


def sum_dtype(*leaves: jax.Array) -> jnp.dtype:
    """The dtype in which arrays are added, such as an update and its weights.

    What puts the weights somewhere, to zero or to a norm, needs its update in this type: one in
    bfloat16 takes float32 weights to nowhere exactly.
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*leaves)
