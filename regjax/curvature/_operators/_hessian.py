"""The Hessian: of a loss, or of a loss known by its gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree, check_loss, check_scalar
from regjax._differentiation import (
    DIFFERENCES,
    choose_of_gradient,
    differentiated,
    jacobian_map,
    jacobian_product,
    jaxpr_of,
    static,
    widened,
)
from regjax.curvature._operators._curvature import (
    CurvatureOperator,
    Linearization,
    build,
    parts_of,
    trace,
)
from regjax.curvature._precision import precision


@checked
def hvp(
    loss_fn: LossFn, params: Params, vector: Params, *batch: Tree, differences: bool = False
) -> Params:
    """Computes a Hessian-vector product by forward-over-reverse differentiation.

    Where a function within the loss has no forward rule (`jax.custom_vjp`), reverse over reverse.

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters.
      vector: tree like `params`.
      *batch: arrays with a leading axis of examples.
      differences: whether a central difference of gradients may be taken where neither is possible,
        as in `hessian`.

    Returns:
      H v, a tree like `params`, in the units of the loss per squared parameter times `vector`.

    Raises:
      ValueError: `vector` is not a tree like `params`, or the loss is not a scalar.
      TypeError: `vector` is complex, or the loss is, or a function within the loss cannot be
        differentiated twice.

    References:
      B. Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6(1).
    """
    check_loss(loss_fn, params, batch)
    _checks.same_tree("vector", vector, params)
    _checks.real_tree("vector", vector)
    with precision():
        return differentiated(
            _of_loss, loss_fn, params, vector, *batch, name="loss_fn", differences=differences
        )


@checked
def hessian(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    chunk_size: int | None = None,
    differences: bool = False,
) -> CurvatureOperator:
    """Makes the Hessian of the mean loss over the batch.

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples. It is traced now: the
        operator is that of the loss as it is, and the arrays that it closes over are data of the
        operator. A new function of the same program compiles nothing again.
      params: tree of real floating-point parameters, n in all.
      *batch: arrays with a leading axis of examples.
      chunk_size: number of examples per pass, for bounded memory; the ragged last chunk counts by
        its size. None takes the whole batch at once and keeps the linearisation if it fits. Where
        the batch is divided over the devices of a mesh, each passes over its own examples.
      differences: whether products may be central differences of gradients where JAX cannot
        differentiate the loss twice, neither forward over reverse nor reverse over reverse: a
        function within it has a rule of its own (`jax.custom_vjp`) that has no rule. Parameters
        are then taken in float32 at least. A product takes four gradients in a solver, and what
        it is off by, as two steps tell, is part of the residual norms of `top_eigenpairs`,
        `lanczos` and `spectral_density`; not of the standard errors of `trace` and `diagonal`. At
        kinks, as those of ReLU, two steps may tell too little.

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      TypeError: a parameter is not real floating point, or a function within the loss cannot be
        differentiated twice.
      ValueError: the loss is not a scalar, the batch has no common leading axis, `chunk_size` is
        not positive, or it splits a batch whose examples the loss couples (batch norm in train
        mode: ask for "train_per_chunk" by name). The arrays of the batch are divided differently,
        or lie on a mesh with explicit axes.
    """
    _checks.floating_tree("params", params)
    params = widened(params) if differences else params
    parts = parts_of(loss_fn, batch, chunk_size)
    loss = trace(loss_fn, *((params, *part) for part in parts))
    check_scalar(loss.outputs(params, *batch))
    mode = choose_of_gradient(
        _of_loss, jaxpr_of(loss), loss, params, params, *batch,
        name="loss_fn", differences=differences,
    )  # fmt: skip
    linearization = of_gradient(mode, _of_loss)
    return build(linearization, loss, params, batch, chunk_size)


@checked
def from_gradient(
    grad_fn: Callable[[Params], Params], params: Params, *, differences: bool = False
) -> CurvatureOperator:
    """Makes the Hessian of a loss that is known by its gradient alone.

    Args:
      grad_fn: params -> gradient; traced now, as in `hessian`.
      params: tree of parameters.
      differences: whether products may be central differences where JAX cannot differentiate
        `grad_fn`, neither forwards nor backwards (see `hessian`).

    Returns:
      An `Operator` of shape (n, n): the Jacobian of `grad_fn` at `params`.

    Raises:
      TypeError: a parameter or a leaf of the gradient is not real floating point, or a function
        within `grad_fn` cannot be differentiated.
      ValueError: the gradient has another structure or other shapes than the parameters.
    """
    _checks.floating_tree("params", params)
    params = widened(params) if differences else params
    gradient = trace(grad_fn, (params,))
    _checks.same_tree("grad_fn(params)", gradient.outputs(params), params)
    _checks.floating_tree("grad_fn(params)", gradient.outputs(params))
    mode = choose_of_gradient(
        _itself, jaxpr_of(gradient), gradient, params, params,
        name="grad_fn", differences=differences,
    )  # fmt: skip
    return build(of_gradient(mode, _itself), gradient, params, (), None)


def of_gradient(mode: str, gradient: Callable[..., Params]) -> Linearization:
    """How the Jacobian of a gradient follows from its function.

    Args:
      mode: the way.
      gradient: a module-level function, (function, params, *batch) -> gradient.
    """
    multiply = static(jacobian_product, mode, gradient)
    if mode == DIFFERENCES:
        return Linearization(None, Partial(multiply, step=jnp.float32(1)))
    return Linearization(
        Partial(static(jacobian_map, mode, gradient)),
        Partial(multiply),
    )


def differentiate_gradient(
    loss_fn: Callable[..., Tree], params: Params, vector: Params, *batch: Tree
) -> Tree:
    """The product of the Hessian and a vector, by automatic differentiation."""
    return differentiated(_of_loss, loss_fn, params, vector, *batch, name="loss_fn")


def _of_loss(loss_fn: Callable[..., Tree], params: Params, *batch: Tree) -> Params:
    return jax.grad(lambda params: loss_fn(params, *batch))(params)


def _itself(grad_fn: Callable[[Params], Params], params: Params) -> Params:
    return grad_fn(params)
