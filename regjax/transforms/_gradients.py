"""What `update` is given besides the gradients, and gradients in the dtypes it was given.

A transformation that needs a gradient somewhere else than at the parameters takes it through the
update: `tx.update(grads, state, params, grad_fn=grad_fn)`, grad_fn(params, i) -> gradient.
"""

import jax
import jax.numpy as jnp
import optax

from regjax._base import GradFn, Params


def check_params(params: Params | None) -> Params:
    """Returns `params`, or raises an error that says how to pass them."""
    if params is None:
        raise ValueError("`params` must be given: call update(updates, state, params, ...).")
    return params


def check_whole_params(params: Params | None) -> Params:
    """Returns `params`, or raises an error that says that `grad_fn` needs all of them."""
    params = check_params(params)
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise ValueError(
            "`params` must be whole, because `grad_fn` needs all of them: instead of optax.masked "
            "or optax.partition use the transformation's own `mask`."
        )
    return params


def check_grad_fn(grad_fn: GradFn | None) -> GradFn:
    """Returns `grad_fn`, or raises an error that says how to pass it."""
    if grad_fn is None:
        raise ValueError(
            "`grad_fn` must be given, got None: call "
            "update(grads, state, params, grad_fn=lambda params, i: gradient)."
        )
    return grad_fn


def like(tree: Params, reference: Params) -> Params:
    """Casts the leaves of `tree` to the dtypes of `reference`."""
    return jax.tree.map(lambda leaf, ref: leaf.astype(jnp.result_type(ref)), tree, reference)
