"""Losses as means over the examples: what a loss returns made a scalar, whole or of a part.

A weighted mean over N examples is a plain mean of what each adds to its sum, times N over the whole
weight. Once that factor is known, data may be split as those of any other mean: a part of n
examples gives sum / n times the factor, and counts by n.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from regjax import _checks, _jaxprs, _loops, _numerics, _programs, _tree
from regjax._arguments import checked
from regjax._base import Batch, Loss, LossFn, Params, Tree, Wrapper, as_partial, terms
from regjax._programs import Program
from regjax._sharding import find


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["function"], meta_fields=["assumed", "has_aux"]
)
@dataclasses.dataclass(frozen=True)
class _Declared(Wrapper):
    """A function with what its user says of it.

    Attributes:
      function: the user's, a pytree.
      assumed: whether it does not couple the examples, which nobody is to test.
      has_aux: whether it gives (loss, aux).
    """

    function: Callable[..., Tree]
    assumed: bool = False
    has_aux: bool = False

    @property
    def within(self) -> Callable[..., Tree]:
        return self.function

    @property
    def couples_examples(self) -> bool:
        return not self.assumed and super().couples_examples

    @property
    def assumed_separable(self) -> bool:
        return self.assumed or super().assumed_separable

    def __call__(self, *arguments: Tree) -> Tree:
        result = self.function(*arguments)
        if not self.has_aux:
            return result
        if not isinstance(result, tuple) or len(result) != 2 or terms(result):
            kind = type(result).__name__
            raise TypeError(f"`loss_fn` must return a pair (loss, aux), got a {kind}.")
        return result[0]


@checked
def without_aux(loss_fn: Callable[..., tuple[Loss, Tree]]) -> LossFn:
    """Takes the loss alone of a function that returns (loss, aux).

    Training code differentiates such functions with `has_aux=True`.

    Example:
      >>> loss_fn = lambda params, x: (jnp.mean((x * params) ** 2), {"accuracy": 0.5})
      >>> params, x = jnp.ones(()), jnp.array([1.0, 3.0])
      >>> hessian = curvature.hessian(regjax.without_aux(loss_fn), params, x)
      >>> print(hessian.matvec(jnp.ones(())))  # 2 (1 + 9) / 2
      10.0

    Args:
      loss_fn: (params, *batch) -> (loss, aux), the loss a scalar or a `WeightedMean`. What only aux
        needs is not computed.

    Returns:
      (params, *batch) -> loss, a pytree, for any function that takes a `loss_fn`.

    Raises:
      TypeError: `loss_fn` is not callable or, when it is called, returns no pair.
    """
    return _Declared(as_partial(loss_fn), has_aux=True)


@checked
def assume_separable(loss_fn: LossFn) -> LossFn:
    """Declares that a loss is a mean over independent examples, so that this is not tested.

    A function that splits data tests a loss once by values and gradients on its first part (see
    `check_separable`). The declaration saves that test; if it is false, the matrix is wrong and
    nothing says so.

    Example:
      >>> loss_fn = regjax.assume_separable(lambda params, x: jnp.mean((x * params) ** 2))
      >>> x = jnp.array([1.0, 3.0])
      >>> hessian = curvature.hessian(loss_fn, jnp.ones(()), x, chunk_size=1)
      >>> print(hessian.matvec(jnp.ones(())))  # 2 (1 + 9) / 2
      10.0

    Args:
      loss_fn: (params, *batch) -> scalar or `WeightedMean`; or a model, (params, inputs) ->
        outputs.

    Returns:
      The same function, a pytree.

    Raises:
      TypeError: `loss_fn` is not callable.
    """
    return _Declared(as_partial(loss_fn), assumed=True)


def declared(loss_fn: Callable[..., Loss]) -> LossFn:
    """A pytree of a loss that was tested, or need not be."""
    return _Declared(loss_fn, assumed=True)


def scalar(loss: Loss) -> jax.Array:
    """The value of what a loss returns: sum over weight, added up; NaN where a weight is 0.

    Raises:
      ValueError: a weight is seen not to be positive and finite.
    """
    weighted = terms(loss)
    if not weighted:
        return loss
    return functools.reduce(operator.add, map(_quotient, weighted))


def _quotient(term: Any) -> jax.Array:
    check_weight(term.weight, "loss_fn", minimum=None)
    total = _tree.wide(term.sum)
    return _numerics.divide(total, term.weight.astype(total.dtype), otherwise=jnp.nan)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["loss_fn"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Whole(Wrapper):
    """(params, *batch) -> scalar, of data that stay together."""

    loss_fn: Callable[..., Loss]

    @property
    def within(self) -> Callable[..., Tree]:
        return self.loss_fn

    def __call__(self, *arguments: Tree) -> jax.Array:
        return scalar(self.loss_fn(*arguments))


def whole(loss_fn: Callable[..., Loss]) -> Whole:
    """The scalar loss of data that stay together, as a pytree."""
    return Whole(as_partial(loss_fn))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Factors:
    """N over the whole weight, for each of the weighted means of a loss; none: 1 for each."""

    values: tuple[jax.Array, ...]

    def of(self, number: int) -> tuple[jax.Array, ...]:
        """The factors of so many weighted means."""
        return self.values or (jnp.float32(1),) * number


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["loss_fn", "factors"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class MeanLoss(Wrapper):
    """(params, *batch) -> scalar, of a part of the data: the mean over its examples.

    Attributes:
      loss_fn: gives weighted means.
      factors: those of all data.
    """

    loss_fn: Callable[..., Loss]
    factors: Factors

    @property
    def within(self) -> Callable[..., Tree]:
        return self.loss_fn

    def __call__(self, first: Tree, *batch: Tree) -> jax.Array:
        weighted = terms(self.loss_fn(first, *batch))
        pairs = zip(weighted, self.factors.of(len(weighted)), strict=True)
        length = _checks.num_examples(batch)
        return functools.reduce(operator.add, (_share(term.sum, f, length) for term, f in pairs))


def _share(total: jax.Array, factor: jax.Array, length: int) -> jax.Array:
    total = _tree.wide(total)
    return total / length * factor.astype(total.dtype)


def mean_loss(loss_fn: Program) -> Program | MeanLoss:
    """A traced loss as a mean over the examples of any part, if weighted without factors yet."""
    trace = next(iter(loss_fn.code.traces.values()))
    return MeanLoss(loss_fn, Factors(())) if terms(trace.outputs) else loss_fn


def with_factors(tree: Tree, factors: Factors) -> Tree:
    """`tree` with the factors of all data where it has some."""
    is_factors = lambda node: isinstance(node, Factors)
    put = lambda node: factors if is_factors(node) else node
    return jax.tree.map(put, tree, is_leaf=is_factors)


def mean_weights(loss_fn: Callable[..., Loss], first: Tree, *batch: Tree) -> tuple[jax.Array, ...]:
    """The weights of a loss over the number of examples, in the type of its sums or float32.

    A mask is often of lower precision than the sums, in which the quotient would be rounded.
    """
    length = _checks.num_examples(batch)
    weighted = terms(loss_fn(first, *batch))
    return tuple(term.weight.astype(_tree.wide(term.sum).dtype) / length for term in weighted)


def factors_of(weights: Partial, params: Params, batch: Batch, name: str = "loss_fn") -> Factors:
    """The factors of all data.

    Args:
      weights: (params, *batch) -> weights over the number of examples.
      params: the parameters.
      batch: all data.
      name: what the loss is called in a message.

    Raises:
      ValueError: a weight is not positive and finite, or it depends on the parameters.
    """
    check_constant(weights, params, batch, name)
    if placement := find(batch, params, weights):
        weights, params = placement.replicate((weights, params))
        batch = placement.shard(batch)
    return inverse(evaluated(weights, params, batch), name)


def inverse(means: Sequence[jax.Array], name: str = "loss_fn") -> Factors:
    """The factors of weights over the number of examples.

    Raises:
      ValueError: one is not positive and finite.
    """
    for mean in means:
        check_weight(mean, name, minimum=None)
    return Factors(tuple(1 / mean for mean in means))


def check_weight(weight: Any, name: str, *, minimum: float | None = 0) -> None:
    """Checks a weight that is known: at least `minimum`, or above zero if that is None.

    Raises:
      ValueError: it is not, or not finite.
    """
    if not _loops.is_concrete(weight):
        return
    value = float(np.asarray(weight))
    allowed = value > 0 if minimum is None else value >= minimum
    if not (allowed and np.isfinite(value)):
        rule = "positive" if minimum is None else "non-negative"
        raise ValueError(
            f"`{name}(...).weight` must be {rule} and finite, got {value:g}. Is the "
            "mask or the list of weights of these data all zeros, negative or NaN?"
        )


def check_constant(weights: Partial, params: Params, batch: Batch, name: str = "loss_fn") -> None:
    """Checks that weights do not depend on the parameters.

    Raises:
      ValueError: they do.
    """
    if not any(_read(weights, params, batch)[: len(jax.tree.leaves(params))]):
        return
    slopes = jax.grad(lambda params, *batch: sum(weights(params, *batch)))
    if _loops.is_concrete(weights, params, batch):
        found = jax.tree.leaves(slopes(params, *batch))
        is_constant = not any(np.asarray(leaf).any() for leaf in found)
    else:  # Those of what was stopped are zeros that read nothing.
        is_constant = not any(_read(slopes, params, batch))
    if not is_constant:
        raise ValueError(
            f"`{name}(...).weight` must not depend on the parameters, got one whose derivative is "
            "not zero. A quotient of two functions of the parameters is a plain scalar loss, for "
            "data in one piece."
        )


def _read(function: Callable[..., Tree], params: Params, batch: Batch) -> list[bool]:
    """Which leaves of its arguments a function reads."""
    return _jaxprs.read(jax.make_jaxpr(function)(*_programs.structs((params, *batch))))


def check_parts(
    weights: Partial, params: Params, batch: Batch, size: int, name: str = "loss_fn"
) -> None:
    """Checks the weights of the parts of data that a host can look at, on one device.

    Args:
      weights: (params, *batch) -> weights over the number of examples.
      params: the parameters.
      batch: all data.
      size: number of examples of a part; what is left over is not looked at.
      name: what the loss is called in a message.

    Raises:
      ValueError: one is negative, or they are not the weight of all parts together.
    """
    count = _checks.num_examples(batch) // size
    if not _loops.is_concrete(weights, params, batch) or find(batch, params) is not None:
        return
    parts = jax.tree.map(
        lambda leaf: leaf[: count * size].reshape(count, size, *leaf.shape[1:]), batch
    )
    own = [np.asarray(values, np.float64) for values in _of_parts(weights, params, parts)]
    for value in np.concatenate(own):
        check_weight(value, name)
    if count * size < _checks.num_examples(batch):
        return
    for values, whole in zip(own, map(float, evaluated(weights, params, batch)), strict=True):
        if not abs(np.mean(values) - whole) <= 1e-4 * whole:
            raise ValueError(
                f"`{name}(...).weight` must add up over the data, got {np.sum(values) * size:g} of "
                f"parts of {size} examples and {whole * count * size:g} of all: return the weight "
                "as it is, and not 1 in place of 0."
            )


@_programs.bounded
@jax.jit
def _of_parts(weights: Partial, params: Params, parts: Batch) -> tuple[jax.Array, ...]:
    return jax.vmap(lambda part: weights(params, *part))(parts)


@_programs.bounded
@jax.jit
def evaluated(weights: Partial, params: Params, batch: Batch) -> tuple[jax.Array, ...]:
    """The weights of a batch."""
    return weights(params, *batch)
