"""The vocabulary of the library: what a loss, a model, a gradient and a product look like.

A loss is a mean over independent examples, or a weighted mean, so that data can be split into
chunks; what breaks this says so (`couples_examples`) or is found out (`_separable.py`).
"""

import abc
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _programs
from regjax._printing import noted

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

OutputLossFn: TypeAlias = Callable[[Any, Any], Any]
"""(outputs, targets) -> the mean over the examples, or a `WeightedMean`, as of a `LossFn`."""

PRNGKey: TypeAlias = jax.Array
"""Typed key from `jax.random.key`."""

ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[jax.Array], ArrayLike]
"""A number, or a function of the number of updates so far that gives one."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """What a solver knows while it runs, for the time of a call of its callback.

    Attributes:
      find: () -> the result so far.
    """

    find: Callable[[], Any]

    @property
    def result(self) -> Any:
        """The result so far, in the form of the solver's own: values with their bounds, estimates.

        Computed when it is asked for, which for eigenpairs takes some share of a product.
        """
        return self.find()


Callback: TypeAlias = Callable[[int, int, Progress], None]
"""Called as callback(done, total, progress) from the host while a solver runs.

An exception ends the run; it reaches the caller with the result so far as its `result`.
"""


class WeightedMean(NamedTuple):
    """A weighted mean before the division: what a loss may return in place of sum / weight.

    Where data are split, the mean over all of them is the sum of the sums over the sum of the
    weights; the quotients of the parts would not be enough. A loss may also return a tuple of
    several weighted means, which are added, such as a mean over tokens and a penalty that is a mean
    over something else.

    Example:
      >>> def loss_fn(params, errors, mask):  # a mean over the tokens that the mask keeps
      ...     nll = (params * errors) ** 2
      ...     return regjax.WeightedMean(jnp.sum(mask * nll), jnp.sum(mask))
      >>> errors, mask = jnp.array([1.0, 2.0, 3.0]), jnp.array([1.0, 1.0, 0.0])
      >>> hessian = curvature.hessian(loss_fn, jnp.ones(()), errors, mask, chunk_size=1)
      >>> print(hessian.matvec(jnp.ones(())))  # 2 (1 + 4) / 2, chunk by chunk
      5.0

    Attributes:
      sum: (), real floating point, the sum of weight times loss.
      weight: (), float32 at least or an integer, the sum of the weights; must not depend on the
        parameters.
    """

    sum: jax.Array
    weight: jax.Array


Loss: TypeAlias = Any
"""What a loss returns: a mean over the examples, (), a `WeightedMean` or a tuple of them."""


class LossFn(Protocol):
    """(params, *batch) -> the mean over the examples, or a `WeightedMean`."""

    def __call__(self, params: Params, /, *batch: Tree) -> Loss:
        """Returns the mean loss, shape (), or a weighted mean."""
        ...


class ModelFn(Protocol):
    """(params, inputs) -> outputs, leading axis the examples."""

    def __call__(self, params: Params, inputs: Tree, /) -> Tree:
        """Returns the outputs."""
        ...


def couples_examples(function: Callable[..., Tree]) -> bool:
    """Tells whether `function` says that the output of an example depends on the other examples.

    Functions that say so, such as a model with batch norm in train mode, cannot be split into
    chunks of examples.

    Example:
      >>> model = regjax.from_nnx(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
      >>> regjax.couples_examples(regjax.model_function(model, mode="train"))
      True
      >>> regjax.couples_examples(regjax.model_function(model))  # stored statistics
      False

    Args:
      function: a loss or a model, perhaps inside of `functools.partial` or `jax.tree_util.Partial`.

    Returns:
      Its attribute `couples_examples`; False for plain callables, which are tested where data are
      split (`check_separable`).
    """
    return _says(function, "couples_examples")


def differs_by_chunk(function: Callable[..., Tree]) -> bool:
    """Tells whether `function` says that each chunk of a batch is meant to be another function."""
    return _says(function, "differs_by_chunk")


def assumed_separable(function: Callable[..., Tree]) -> bool:
    """Tells whether its user says that nobody is to test whether `function` couples examples."""
    return _says(function, "assumed_separable")


class Wrapper(abc.ABC):
    """A function of another one, which says of itself what that one says.

    Whoever wraps a loss or a model inherits from this: what a user declared must not be lost.
    """

    @property
    @abc.abstractmethod
    def within(self) -> Callable[..., Tree]:
        """The function that is wrapped."""

    @property
    def couples_examples(self) -> bool:
        """Tells whether one example's result depends on the others."""
        return couples_examples(self.within)

    @property
    def differs_by_chunk(self) -> bool:
        """Tells whether each chunk has statistics of its own, as asked for by name."""
        return differs_by_chunk(self.within)

    @property
    def assumed_separable(self) -> bool:
        """Tells whether nobody is to test whether the examples couple."""
        return assumed_separable(self.within)


def _says(function: Callable[..., Tree], name: str) -> bool:
    while isinstance(function, functools.partial) and not hasattr(function, name):
        function = function.func
    return bool(getattr(function, name, False))


def as_partial(function: Callable[..., Tree]) -> Any:
    """Returns `function` as a pytree: as it is if it is one already, else a static function."""
    leaves = jax.tree.leaves(function)
    is_plain = len(leaves) == 1 and leaves[0] is function
    return Partial(function) if is_plain else function


def check_loss(
    loss_fn: Callable[..., Tree], params: Params, batch: Batch, *, name: str = "loss_fn"
) -> None:
    """Checks, without evaluating it, that `loss_fn` gives a loss."""
    _checks.function(name, loss_fn)
    _checks.floating_tree("params", params)
    # A second call for the same shapes traces nothing.
    with noted(params, *batch):
        loss = applied.eval_shape(as_partial(loss_fn), params, batch)
    check_scalar(loss, name=name)


def terms(loss: Loss) -> tuple[WeightedMean, ...]:
    """The weighted means that a loss adds up; none if it is a plain mean."""
    if isinstance(loss, WeightedMean):
        return (loss,)
    is_sum = isinstance(loss, tuple) and all(isinstance(part, WeightedMean) for part in loss)
    return loss if is_sum else ()


def check_scalar(loss: Tree, *, name: str = "loss_fn") -> None:
    """Checks that what a loss gives, known by its shape, is a real floating-point scalar.

    Or a `WeightedMean`, or a tuple of them.
    """
    weighted = terms(loss)
    for term in weighted:
        _check_number(term.sum, f"{name}(...).sum")
        _check_weight(term.weight, name)
    if weighted:
        return
    if isinstance(loss, (tuple, list, dict)) or loss is None:
        kind = type(loss).__name__
        found = kind if loss is None else f"a {kind} of {len(loss)}"
        raise ValueError(
            f"`{name}` must return a scalar, the mean loss, got {found}. If it returns (loss, "
            f"aux), pass regjax.without_aux({name}); if it returns a sum and what divides it, "
            "return regjax.WeightedMean(sum, weight)."
        )
    _check_number(loss, name)


def _check_number(value: Tree, name: str) -> None:
    shape = getattr(value, "shape", None)
    if shape != ():
        remedy = ": take its mean over the examples" if shape else ""
        raise ValueError(
            f"`{name}` must return a scalar, the mean loss, got shape {shape}{remedy}."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"`{name}` must return a real floating-point number, got {value.dtype}.")


def _check_weight(weight: Tree, name: str) -> None:
    shape, dtype = getattr(weight, "shape", None), getattr(weight, "dtype", jnp.bool_)
    if shape != ():
        raise ValueError(f"`{name}(...).weight` must be one number, got shape {shape}.")
    is_wide = jnp.issubdtype(dtype, jnp.integer) or (
        jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 32
    )
    if not is_wide:
        raise TypeError(
            f"`{name}(...).weight` must be of an integer type or float32 at least, in which counts "
            f"are exact, got {dtype}."
        )


@_programs.bounded
@jax.jit
def applied(function: Callable[..., Tree], params: Params, batch: Batch) -> Tree:
    """Calls function(params, *batch), compiled once for a function that is a pytree."""
    return function(params, *batch)
