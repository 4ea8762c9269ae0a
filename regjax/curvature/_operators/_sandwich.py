"""Curvature through the network's outputs: J' A J, with A the curvature of the loss there.

J is the Jacobian of the outputs with respect to the parameters. A product is one forward-mode
pass (u = J v), a small product at the outputs (a = A u) and one reverse-mode pass (J' a).

Outputs are a tree of arrays. Its integer leaves have no derivative: they are apart, as `others`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _loops, _tree
from regjax._base import Batch, Mask, ModelFn, OutputLossFn, Params, Tree, applied, as_partial
from regjax._differentiation import (
    DIFFERENCES,
    Mode,
    choose,
    jaxpr_of,
    linearized,
    pull,
    push,
    static,
)
from regjax._programs import Program
from regjax._separable import ensure_separable, has_numbers
from regjax._subsets import part_of
from regjax.curvature._operators._curvature import (
    CurvatureOperator,
    Form,
    Linearization,
    build,
    trace,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def traced_model(model_fn: ModelFn, params: Params, parts: tuple[Batch, ...]) -> Program:
    """The program of a model for the inputs of batches of some shapes."""
    _checks.floating_tree("params", params)
    return trace(model_fn, *((params, part[0]) for part in parts))


def of_forms(
    forms: Sequence[Callable[..., Form]],
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    data: Batch,
    weights: ArrayLike | None,
    *,
    chunk_size: int | None,
    wrt: Mask,
    differences: bool,
) -> list[CurvatureOperator]:
    """The matrices that the forms make of a model and a loss of its outputs, on the same data."""
    batch = with_weights(data, weights)
    model_fn, params = part_of(model_fn, params, wrt, differences=differences)
    options: Any = {"chunk_size": chunk_size, "differences": differences}
    return [
        build(form(model_fn, output_loss_fn, params, *batch, **options), params, batch, chunk_size)
        for form in forms
    ]


def with_weights(batch: Batch, weights: ArrayLike | None) -> Batch:
    """The batch with the weights of its predictions, if there are any.

    Raises:
      TypeError: they are no array of numbers.
      ValueError: one that is known is negative or not finite.
    """
    if weights is None:
        return batch
    array = jnp.asarray(weights)
    if not (jnp.issubdtype(array.dtype, jnp.floating) or array.dtype.kind in "biu"):
        raise TypeError(f"`weights` must be real numbers, got {array.dtype}.")
    if not array.ndim:
        raise ValueError("`weights` must have an axis of examples, got a single number.")
    known = _checks.host_value(array)
    if known is not None and _loops.is_concrete(array):
        wrong = known[~(known >= 0) | ~(known < float("inf"))]
        if wrong.size:
            raise ValueError(f"`weights` must be non-negative and finite, got {wrong[0]}.")
    return (*batch, array.astype(_weight_dtype(array)))


def batch_with_weights(number: int, batch: Batch) -> Batch:
    """The same of a batch in which the weights come after so many others, if they do."""
    given, weights = batch[:number], batch[number:]
    return with_weights(given, *weights) if len(weights) == 1 else batch


def _weight_dtype(array: jax.Array) -> Any:
    return _tree.wide_dtype(array) if jnp.issubdtype(array.dtype, jnp.floating) else jnp.float32


def weighted_sum(weights: jax.Array, values: jax.Array) -> jax.Array:
    """Weights times values, which do not count where the weight is 0, not even as NaN."""
    weights = weights.reshape(weights.shape + (1,) * (values.ndim - weights.ndim))
    return jnp.where(weights > 0, weights.astype(values.dtype) * values, jnp.zeros_like(values))


def outer(scores: Tree, tangent: Tree, share: ArrayLike) -> Tree:
    """Share times s_i <s_i, u_i>, for each example i; share () or (examples,)."""

    def rows(leaf: jax.Array) -> jax.Array:
        return leaf.reshape(leaf.shape[0], -1)

    products = jax.tree.map(lambda s, u: jnp.sum(rows(s) * rows(u), axis=1), scores, tangent)
    inner = functools.reduce(jnp.add, jax.tree.leaves(products)) * share
    scaled = lambda s: (rows(s) * inner[:, None].astype(s.dtype)).reshape(s.shape)
    return jax.tree.map(scaled, scores)


def ensure_own_losses(
    output_loss_fn: OutputLossFn,
    reduced: Callable[..., Tree],
    model: Program,
    loss: Program,
    params: Params,
    batch: Batch,
) -> None:
    """Tests that each example has a loss of its own, of data that need not be split.

    Args:
      output_loss_fn: the user's.
      reduced: (outputs, *rest of the batch) -> loss.
      model: (params, inputs) -> outputs.
      loss: the program of `reduced`.
      params: the parameters.
      batch: all data.

    Raises:
      ValueError: it has none, given the outputs.
    """
    if not has_numbers(model, loss, params, batch):
        return
    outputs = applied(model, params, batch[:1])
    floats, _ = split(outputs)
    shift = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), floats)
    ensure_separable(
        Partial(_shifted, as_partial(reduced)), shift, (outputs, *batch[1:]),
        size=1, name="output_loss_fn", functions=(output_loss_fn,), programs=(loss,),
    )  # fmt: skip


def ensure_own_outputs(
    model_fn: ModelFn, model: Program, params: Params, inputs: Tree, size: int
) -> None:
    """Tests that each example has outputs of its own, of data that are about to be split.

    Args:
      model_fn: the user's.
      model: its program.
      params: the parameters.
      inputs: all of them.
      size: number of examples of a chunk.

    Raises:
      ValueError: it has none.
    """
    curved = Partial(_curved, as_partial(model_fn))
    shares = np.cos(np.arange(_checks.num_examples(inputs), dtype=np.float32))
    ensure_separable(
        curved, params, (inputs, shares), size=size, name="model_fn",
        functions=(model_fn,), programs=(model,),
    )  # fmt: skip


def _curved(model_fn: Partial, params: Params, inputs: Tree, shares: jax.Array) -> jax.Array:
    """A mean over the examples that shows what an output has of the others.

    Curved, and with another factor for each example, since the means and the squares of
    standardised values are the same in every batch.
    """
    floats, _ = split(model_fn(params, inputs))

    def mean(leaf: jax.Array) -> jax.Array:
        size = math.prod(leaf.shape[1:])
        rows = jax.nn.softplus(leaf).reshape(len(shares), size)
        each = rows @ jnp.cos(jnp.arange(size, dtype=rows.dtype))
        return jnp.mean(each * shares.astype(rows.dtype))

    means = [_tree.wide(mean(leaf)) for leaf in jax.tree.leaves(floats)]
    return functools.reduce(jnp.add, means)


def _shifted(loss_fn: Callable[..., Tree], shift: Tree, outputs: Tree, *rest: Tree) -> Tree:
    floats, others = split(outputs)
    moved = jax.tree.map(lambda leaf, by: leaf + by[None], floats, shift)
    return loss_fn(_tree.merge(moved, others), *rest)


def split(outputs: Tree) -> tuple[Tree, Tree]:
    """What of the outputs has a derivative, and the others; None in the places of each other."""
    is_float = lambda leaf: jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return _tree.partition(outputs, map(is_float, jax.tree.leaves(outputs)))


def positive(function: _Function) -> _Function:
    """Marks a curvature at the outputs that is positive semi-definite whatever the data are."""
    function.__dict__["is_positive"] = True
    return function


def sandwich(
    curvature: Partial,
    model: Program,
    weights: Partial | None,
    example: tuple[Params, Tree],
    *,
    differences: bool,
) -> Form:
    """How J' A J follows from a model.

    Args:
      curvature: (floats, others, *rest of the batch, u) -> A u, u a tree like `floats`.
      model: (params, inputs) -> outputs.
      weights: as of a `Form`.
      example: parameters and inputs, or their shapes.
      differences: whether J v may be a difference where JAX cannot differentiate the model.

    Raises:
      TypeError: the model cannot be differentiated.
    """
    mode = choose(
        there_and_back, jaxpr_of(model), (model, *example),
        name="model_fn", differences=differences,
    )  # fmt: skip
    multiply, linearize = static(_multiply, mode), static(_linearize, mode)
    if mode == DIFFERENCES:
        return Form(
            Linearization(None, Partial(multiply, curvature, step=jnp.float32(1))), model, weights
        )
    linearization = Linearization(Partial(linearize, curvature), Partial(multiply, curvature))
    return Form(linearization, model, weights)


def there_and_back(mode: Mode, model_fn: ModelFn, params: Params, inputs: Tree) -> Tree:
    """J' J v, for a vector like the parameters."""
    function = lambda params: split(model_fn(params, inputs))
    _, _, jacobian = linearized(mode, function, params, 1.0)
    return pull(mode, jacobian, params, push(mode, jacobian, params))


def _linearize(
    mode: Mode, curvature: Partial, model_fn: ModelFn, params: Params, inputs: Tree, *rest: Tree,
    step: ArrayLike = 1.0,
) -> Partial:  # fmt: skip
    function = lambda params: split(model_fn(params, inputs))
    floats, others, jacobian = linearized(mode, function, params, step)
    # A `Partial` of a `Partial` would hold the arrays of the inner one as static.
    return Partial(static(_apply, mode), jacobian, curvature, (floats, others, *rest))


def _multiply(
    mode: Mode, curvature: Partial, model_fn: ModelFn, params: Params, vector: Params,
    inputs: Tree, *rest: Tree, step: ArrayLike = 1.0,
) -> Tree:  # fmt: skip
    return _linearize(mode, curvature, model_fn, params, inputs, *rest, step=step)(vector)


def _apply(mode: Mode, jacobian: Any, curvature: Partial, operands: Tree, vector: Params) -> Tree:
    return pull(mode, jacobian, vector, curvature(*operands, push(mode, jacobian, vector)))
