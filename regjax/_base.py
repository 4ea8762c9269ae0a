"""The vocabulary of the library: what a loss, a model, a gradient and a product look like.

A loss is a mean over independent examples, so that data can be split into chunks; what breaks this
says so (`couples_examples`) or is found out (`check_separable`).
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _programs, _tree
from regjax._arguments import checked

Params: TypeAlias = Any
"""Tree of real floating-point arrays."""

Batch: TypeAlias = tuple[Any, ...]
"""Trees of arrays that share one leading axis, the examples: often (inputs, targets)."""

GradFn: TypeAlias = Callable[[Params, Any], Params]
"""(params, i) -> gradient at other parameters, on inner batch or shard i (int32) of the step."""

MatVec: TypeAlias = Callable[[Params], Params]
"""A symmetric linear map from trees (or flat vectors) to trees of the same structure."""

State: TypeAlias = Any
"""Tree of what a model keeps beside its parameters: batch statistics, counts, keys."""

Mask: TypeAlias = Any
"""Which leaves are meant: a tree of bools like the parameters or an upper part of it, a function
(path, leaf) -> bool, a filter of nnx, a function params -> such a tree, or None for all."""

Tree: TypeAlias = Any
"""Any other tree of arrays; what its leaves are is said where it is used."""

OutputLossFn: TypeAlias = Callable[[Any, Any], jax.Array]
"""(outputs, targets) -> scalar, the mean over the examples."""

PRNGKey: TypeAlias = jax.Array
"""Typed key from `jax.random.key`."""

ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]
"""A number, or a function of the number of updates so far that gives one."""

Callback: TypeAlias = Callable[[int, int], None]
"""Called as callback(done, total) from the host while a solver runs."""


class LossFn(Protocol):
    """(params, *batch) -> scalar, the mean over the examples."""

    def __call__(self, params: Params, /, *batch: Tree) -> jax.Array:
        """Returns the mean loss, shape ()."""
        ...


class ModelFn(Protocol):
    """(params, inputs) -> outputs, leading axis the examples."""

    def __call__(self, params: Params, inputs: Tree, /) -> Tree:
        """Returns the outputs."""
        ...


def couples_examples(function: Callable[..., Tree]) -> bool:
    """Tells whether `function` says that it couples the examples of a batch.

    Args:
      function: a loss or a model, perhaps inside of `functools.partial` or `jax.tree_util.Partial`.

    Returns:
      Its attribute `couples_examples`; False for plain callables, which `check_separable` tests.
    """
    return _says(function, "couples_examples")


def differs_by_chunk(function: Callable[..., Tree]) -> bool:
    """Tells whether `function` says that each chunk of a batch is meant to be another function."""
    return _says(function, "differs_by_chunk")


def _says(function: Callable[..., Tree], name: str) -> bool:
    while isinstance(function, functools.partial) and not hasattr(function, name):
        function = function.func
    return bool(getattr(function, name, False))


@checked
def check_separable(loss_fn: LossFn, params: Params, *batch: Tree, tol: float = 1e-4) -> None:
    """Checks that a loss is a mean over independent examples, by splitting the batch unevenly.

    Evaluates the loss three times, outside of `jit`.

    Args:
      loss_fn: (params, *batch) -> scalar.
      params: tree of parameters.
      *batch: arrays with a leading axis of at least two examples. Of two, the parts are equal, and
        a mean that forgets the sizes goes unnoticed.
      tol: allowed difference between the loss of the whole batch and the size-weighted mean
        of two unequal parts, relative to the largest magnitude of the three losses.

    Raises:
      ValueError: the losses differ (a sum, or batch norm in train mode), are not finite scalars,
        or there are fewer than two examples.
    """
    _checks.non_negative("tol", tol)
    length = _checks.num_examples(batch)
    if length < 2:
        raise ValueError(f"`batch` must hold at least two examples to be split, got {length}.")
    cut = max(1, length // 3)
    first = jax.tree.map(lambda leaf: leaf[:cut], batch)
    second = jax.tree.map(lambda leaf: leaf[cut:], batch)
    whole, one, two = (_finite_scalar(loss_fn(params, *part)) for part in (batch, first, second))
    mean = (cut * one + (length - cut) * two) / length
    # At a minimum of zero the losses are squares of rounding, and no mean of one another.
    rounding = float(jnp.finfo(_tree.vector_dtype(params)).eps) ** 2
    if abs(whole - mean) > tol * max(abs(whole), abs(one), abs(two)) + rounding:
        raise ValueError(
            f"`loss_fn` must be the mean over independent examples: the whole batch gives "
            f"{whole:.6g}, the size-weighted mean of {cut} and {length - cut} examples gives "
            f"{mean:.6g}. A sum does this, and batch norm or dropout in train mode."
        )


def as_partial(function: Callable[..., Tree]) -> Any:
    """Returns `function` as a pytree: as it is if it is one already, else a static function."""
    leaves = jax.tree.leaves(function)
    is_plain = len(leaves) == 1 and leaves[0] is function
    return Partial(function) if is_plain else function


def check_loss(
    loss_fn: Callable[..., Tree], params: Params, batch: Batch, *, name: str = "loss_fn"
) -> None:
    """Checks, without evaluating it, that `loss_fn` gives a real floating-point scalar."""
    _checks.function(name, loss_fn)
    _checks.floating_tree("params", params)
    # A second call for the same shapes traces nothing.
    check_scalar(applied.eval_shape(as_partial(loss_fn), params, batch), name=name)


def check_scalar(loss: Tree, *, name: str = "loss_fn") -> None:
    """Checks that what a loss gives, known by its shape, is a real floating-point scalar."""
    shape = getattr(loss, "shape", None)
    if shape != ():
        raise ValueError(f"`{name}` must return a scalar, the mean loss, got shape {shape}.")
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"`{name}` must return a real floating-point number, got {loss.dtype}.")


@_programs.bounded
@jax.jit
def applied(function: Callable[..., Tree], params: Params, batch: Batch) -> Tree:
    """Calls function(params, *batch), compiled once for a function that is a pytree."""
    return function(params, *batch)


def _finite_scalar(loss: jax.Array) -> float:
    shape = np.shape(loss) if loss is not None else None
    if shape != ():
        raise ValueError(f"`loss_fn` must return a scalar, got shape {shape}.")
    if not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise TypeError(f"`loss_fn` must return a real floating-point number, got {loss!r}.")
    if not jnp.isfinite(loss):
        raise ValueError(f"`loss_fn` must be finite on the batch, got {loss}.")
    return float(loss)
