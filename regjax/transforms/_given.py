"""The gradient function that an `update` is given, in any of the forms that trainers have.

`grad_fn(params, i)` may give the gradient, or what `jax.value_and_grad` gives, as dicts or as
flax's variables. Instead of it `value_fn(params)`, optax's name, or `obj_fn(params)`, Levanter's,
may give the loss.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.tree_util import Partial

from regjax import _base, _checks, _losses
from regjax._arguments import checked
from regjax._base import GradFn, Params, Tree

_Function = TypeVar("_Function", bound=Callable[..., Any])
_VALUES = ("value_fn", "obj_fn")


@checked
def assume_joined(grad_fn: _Function) -> _Function:
    """Declares that a gradient function covers all micro-batches of an accumulated step.

    `optax.MultiSteps` averages the gradients of the micro-batches. A transformation inside it that
    takes another gradient would take that of the last micro-batch alone. This is an error, unless
    you declare with this function that `grad_fn` gives the mean over all micro-batches. Usually the
    other order is what you want, in which each micro-batch climbs by itself:

        optax.chain(sam(0.05), optax.MultiSteps(optax.sgd(0.1), 4))

    Example:
      >>> tx = optax.MultiSteps(optax.chain(transforms.sam(1.0), optax.sgd(0.1)), 2)
      >>> params = jnp.array([3.0, 4.0])
      >>> state = tx.init(params)
      >>> grad_fn = transforms.assume_joined(lambda params, i: params)  # of all micro-batches
      >>> for grads in (params - 1.0, params + 1.0):
      ...     updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
      >>> print(updates)
      [-0.36 -0.48]

    Args:
      grad_fn: (params, i) -> the mean gradient over all micro-batches; or a `value_fn`.

    Returns:
      A function that does the same and is accepted inside `optax.MultiSteps`.

    Raises:
      TypeError: `grad_fn` cannot be called.
    """
    joined: Any = functools.partial(_checks.function("grad_fn", grad_fn))
    joined.covers_micro_batches = True
    return joined


def given(grad_fn: GradFn | None, extra: Mapping[str, Any], *, num_shards: int = 1) -> GradFn:
    """Returns the gradient function among the arguments of an `update`.

    Raises:
      TypeError: it cannot be called.
      ValueError: there is none, or more than one; it does not tell the shards of a batch apart; or
        it would be that of one micro-batch of several.
    """
    found = {"grad_fn": grad_fn, **{name: extra.get(name) for name in _VALUES}}
    found = {name: function for name, function in found.items() if function is not None}
    if not found:
        raise ValueError(
            "`grad_fn` must be given, got None: call update(grads, state, params, grad_fn=lambda "
            "params, i: gradient), or with value_fn=lambda params: loss. Flax's "
            "TrainState.apply_gradients drops it: call regjax.transforms.apply_gradients(state, "
            "grads, grad_fn=...). Trainers that hand nothing on take their gradient from "
            "sharpness_aware_gradient or noisy_gradient, with no transformation in the chain."
        )
    if len(found) > 1:
        raise ValueError(
            f"`grad_fn` must be the only one of grad_fn, value_fn and obj_fn, got "
            f"{' and '.join(found)}. Where another member of the chain needs a second one, "
            'only_extra(tx, "grad_fn") lets one through.'
        )
    ((name, function),) = found.items()
    if not callable(function):
        form = "(params, i) -> gradient" if name == "grad_fn" else "params -> loss"
        raise TypeError(f"`{name}` must be a function {form}, got {function!r}.")
    if _is_in_multi_steps() and not getattr(function, "covers_micro_batches", False):
        raise ValueError(
            f"`{name}` must cover all micro-batches inside of optax.MultiSteps, where it would be "
            "that of the last one alone. Put the transformation in front, "
            "optax.chain(sam(0.05), optax.MultiSteps(optax.sgd(0.1), 4)), so that each climbs by "
            f"itself; or say regjax.transforms.assume_joined({name}) of one that covers all."
        )
    if name == "grad_fn":
        _check_takes_index(function)
        return function
    if num_shards > 1:
        raise ValueError(
            f"`num_shards` must be 1 with `{name}`, which does not tell shards apart, got "
            f"{num_shards}: pass grad_fn=lambda params, i: gradient on shard i."
        )
    options = {key: extra[key] for key in _keywords(function) if key in extra}
    return Partial(functools.partial(_slope, name), _base.as_partial(function), options)


def _check_takes_index(grad_fn: GradFn) -> None:
    """Refuses a gradient function of the parameters alone, as `jax.grad` gives it."""
    try:
        signature = inspect.signature(grad_fn)
    except (TypeError, ValueError):
        return  # some callables do not tell
    try:
        signature.bind(None, 0)
    except TypeError:
        raise TypeError(
            f"`grad_fn` must be a function (params, i) -> gradient, got one that takes "
            f"{signature}: with `i`, which may be ignored, it is lambda params, i: ..."
        ) from None


def understood(name: str, result: Tree, params: Params) -> Params:
    """Returns the gradient in what a gradient function gave, as a tree like `params`.

    Raises:
      TypeError: a leaf is not real floating point.
      ValueError: it is no tree like the parameters, nor a pair of a loss and such a tree.
    """
    if isinstance(result, tuple) and len(result) == 2 and not _has_structure(result, params):
        first, second = result
        if is_value(first) and not (_is_scalar(params) and _is_scalar(first)):
            result = second
        else:
            raise ValueError(
                f"`{name}` must be the gradient, or the (loss, gradient) or ((loss, aux), gradient)"
                f" of jax.value_and_grad, got a pair of {shown(first)} and {shown(second)}: take "
                "one of them."
            )
    grads = _checks.same_tree(name, renamed(result, params), params)
    return _checks.floating_leaves(name, grads)


def renamed(tree: Tree, like: Tree) -> Tree:
    """Returns `tree` in the structure of `like`, if their leaves have the same names.

    So a tree of flax's variables, or a `State`, is a dict of arrays, and the other way round. Of
    variables that `like` does not have the gradient is left out, as `nnx.Optimizer` does.
    """
    if _has_structure(tree, like):
        return tree
    leaves, has_variables = named_leaves(tree), _has_variables(tree)
    names = list(named_leaves(like))
    if set(names) == set(leaves) or (has_variables and set(names) <= set(leaves)):
        return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])
    return tree


def named_leaves(tree: Tree) -> dict[tuple[str, ...], Any]:
    """Lists the leaves of a tree by their names, those of flax's variables without `value`."""
    plain = nnx.as_pure(tree) if _has_variables(tree) else tree
    return {
        tuple(jax.tree_util.keystr((entry,), simple=True) for entry in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(plain)
    }


def _has_variables(tree: Tree) -> bool:
    is_ours = lambda node: isinstance(node, nnx.Variable | nnx.State)
    return any(map(is_ours, jax.tree.leaves(tree, is_leaf=is_ours)))


def _has_structure(tree: Tree, like: Tree) -> bool:
    structure: Any = jax.tree.structure(tree)
    return bool(structure == jax.tree.structure(like))


def is_value(value: Tree) -> bool:
    """Tells a loss, or a pair of a loss and whatever."""
    if isinstance(value, tuple) and len(value) == 2:
        value = value[0]
    return _is_scalar(value)


def _is_scalar(value: Tree) -> bool:
    return jax.tree_util.all_leaves([value]) and jnp.shape(value) == ()


def shown(tree: Tree) -> str:
    return f"shape {jnp.shape(tree)}" if jax.tree_util.all_leaves([tree]) else str(type(tree))


def _keywords(function: Callable[..., Any]) -> list[str]:
    """Names the arguments of a `value_fn` that optax hands on to it: all but the parameters."""
    try:
        return list(inspect.signature(function).parameters)[1:]
    except (TypeError, ValueError):  # one of C
        return []


def _slope(
    name: str, value_fn: Callable[..., Any], options: Tree, params: Params, i: jax.Array | int
) -> Params:
    del i

    def loss(params: Params) -> jax.Array:
        value = value_fn(params, **options)
        if type(value) is tuple and len(value) == 2 and not _base.terms(value):
            value = value[0]  # (loss, aux)
        value = jnp.asarray(value) if isinstance(value, float) else value
        _base.check_scalar(value, name=name)
        return _losses.scalar(value)

    return jax.grad(loss)(params)


def _is_in_multi_steps() -> bool:
    """Tells whether optax's accumulation is among the callers; nothing else shows it.

    It calls `update` for each micro-batch, with the mean gradient so far, and keeps the last.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code is optax.MultiSteps.update.__code__:
            return True
        frame = frame.f_back
    return False
