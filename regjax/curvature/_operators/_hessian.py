"""The Hessian: of a loss, or of a loss known by its gradient."""

from collections.abc import Callable

import jax
from jax.tree_util import Partial

from regjax import _checks
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree, check_loss, check_scalar
from regjax._losses import mean_loss, mean_weights, whole
from regjax._separable import ensure_separable
from regjax.curvature._operators._curvature import (
    CurvatureOperator,
    Form,
    Linearization,
    build,
    parts_of,
    trace,
)
from regjax.curvature._precision import precision


@checked
def hvp(loss_fn: LossFn, params: Params, vector: Params, *batch: Tree) -> Params:
    """Computes a Hessian-vector product by forward-over-reverse differentiation.

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters.
      vector: tree like `params`.
      *batch: arrays with a leading axis of examples.

    Returns:
      H v, a tree like `params`, in the units of the loss per squared parameter times `vector`.

    Raises:
      ValueError: `vector` is not a tree like `params`, or the loss is not a scalar.
      TypeError: `vector` is complex, or the loss is.

    References:
      B. Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6(1).
    """
    check_loss(loss_fn, params, batch)
    _checks.same_tree("vector", vector, params)
    _checks.real_tree("vector", vector)
    with precision():
        return differentiate_gradient(whole(loss_fn), params, vector, *batch)


@checked
def hessian(
    loss_fn: LossFn, params: Params, *batch: Tree, chunk_size: int | None = None
) -> CurvatureOperator:
    """Makes the Hessian of the mean loss over the batch.

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, or a `regjax.WeightedMean`,
        which goes over parts of the data as it goes over all. It is traced now: the
        operator is that of the loss as it is, and the arrays that it closes over are data of the
        operator. A new function of the same program compiles nothing again.
      params: tree of real floating-point parameters, n in all.
      *batch: arrays with a leading axis of examples.
      chunk_size: number of examples per pass, for bounded memory; the ragged last chunk counts by
        its size. None takes the whole batch at once and keeps the linearisation if it fits. Where
        the batch is divided over the devices of a mesh, each passes over its own examples.

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      TypeError: a parameter is not real floating point.
      ValueError: the loss is not a scalar, the batch has no common leading axis, `chunk_size` is
        not positive, or it splits a batch whose examples the loss couples (batch norm in train
        mode: ask for "train_per_chunk" by name). The arrays of the batch are divided differently,
        or lie on a mesh with explicit axes.
    """
    _checks.floating_tree("params", params)
    return build(
        hessian_form(loss_fn, params, *batch, chunk_size=chunk_size), params, batch, chunk_size
    )


def hessian_form(loss_fn: LossFn, params: Params, *batch: Tree, chunk_size: int | None) -> Form:
    """How the Hessian follows from the loss; tests a loss that is to be split."""
    parts, size = parts_of(loss_fn, batch, chunk_size)
    program = trace(loss_fn, *((params, *part) for part in parts))
    check_scalar(program.outputs(params, *batch))
    if size is not None:
        ensure_separable(
            loss_fn, params, batch, size=size, name="loss_fn",
            functions=(loss_fn,), programs=(program,),
        )  # fmt: skip
    loss = mean_loss(program)
    weights = None if loss is program else Partial(mean_weights, program)
    linearization = Linearization(Partial(_linearize_gradient), Partial(differentiate_gradient))
    return Form(linearization, loss, weights)


@checked
def from_gradient(grad_fn: Callable[[Params], Params], params: Params) -> CurvatureOperator:
    """Makes the Hessian of a loss that is known by its gradient alone.

    Args:
      grad_fn: params -> gradient; traced now, as in `hessian`.
      params: tree of parameters.

    Returns:
      An `Operator` of shape (n, n): the Jacobian of `grad_fn` at `params`.

    Raises:
      TypeError: a parameter or a leaf of the gradient is not real floating point.
      ValueError: the gradient has another structure or other shapes than the parameters.
    """
    _checks.floating_tree("params", params)
    gradient = trace(grad_fn, (params,))
    _checks.same_tree("grad_fn(params)", gradient.outputs(params), params)
    _checks.floating_tree("grad_fn(params)", gradient.outputs(params))
    return build(Form(_JACOBIAN, gradient), params, (), None)


def _linearize_gradient(loss_fn: Callable[..., Tree], params: Params, *batch: Tree) -> Tree:
    return jax.linearize(jax.grad(lambda p: loss_fn(p, *batch)), params)[1]


def differentiate_gradient(
    loss_fn: Callable[..., Tree], params: Params, vector: Params, *batch: Tree
) -> Tree:
    return jax.jvp(jax.grad(lambda p: loss_fn(p, *batch)), (params,), (vector,))[1]


def _linearize(function: Callable[[Tree], Tree], params: Params) -> Tree:
    return jax.linearize(function, params)[1]


def _differentiate(function: Callable[[Tree], Tree], params: Params, vector: Params) -> Tree:
    return jax.jvp(function, (params,), (vector,))[1]


_JACOBIAN = Linearization(Partial(_linearize), Partial(_differentiate))
