"""The Hessian: of a loss, or of a loss known by its gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks
from regjax._arguments import checked
from regjax._base import LossFn, Mask, Params, Tree, check_loss, check_scalar
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
from regjax._losses import mean_loss, mean_weights, whole
from regjax._separable import ensure_separable
from regjax._subsets import gradient_of_part, part_of, part_of_gradient
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
def hvp(
    loss_fn: LossFn,
    params: Params,
    vector: Params,
    *batch: Tree,
    wrt: Mask = None,
    differences: bool = False,
) -> Params:
    """Computes a Hessian-vector product by forward-over-reverse differentiation.

    Where a function within the loss has no forward rule (`jax.custom_vjp`), it is reverse over
    reverse. For many products with one matrix make it once, with `hessian`.

    Example:
      >>> loss_fn = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 3.0])
      >>> print(curvature.hvp(loss_fn, jnp.zeros(2), jnp.array([0.0, 1.0]), x, y))  # of X'X / N
      [1. 2.]

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: tree of parameters.
      vector: tree like `params`.
      *batch: arrays with a leading axis of examples.
      wrt: which leaves are meant (see `hessian`); `vector` has None elsewhere.
      differences: whether a central difference of gradients may be taken where JAX cannot
        differentiate the loss twice (see `hessian`).

    Returns:
      H v, a tree like `params`, in the units of the loss per squared parameter times `vector`.

    Raises:
      ValueError: `vector` is not a tree like `params`, or the loss is not a scalar.
      TypeError: `vector` is complex, or the loss is, or a function within the loss cannot be
        differentiated twice.

    References:
      B. Pearlmutter (1994), Fast exact multiplication by the Hessian, Neural Computation 6(1).
    """
    loss_fn, params = part_of(loss_fn, params, wrt)
    check_loss(loss_fn, params, batch)
    _checks.same_tree("vector", vector, params)
    _checks.real_tree("vector", vector)
    with precision():
        return differentiated(
            _of_loss, whole(loss_fn), params, vector, *batch,
            name="loss_fn", differences=differences,
        )  # fmt: skip


@checked
def hessian(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    chunk_size: int | None = None,
    wrt: Mask = None,
    differences: bool = False,
) -> CurvatureOperator:
    """Makes the Hessian of the mean loss over the batch.

    The matrix is known by its products with vectors and is never formed, so that it takes no more
    memory than a few gradients. `top_eigenpairs`, `spectral_density`, `trace`, `solve` and the like
    need nothing else.

    Example:
      >>> loss_fn = lambda w, x, y: 0.5 * jnp.mean((x @ w - y) ** 2)
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 3.0])
      >>> hessian = curvature.hessian(loss_fn, jnp.zeros(2), x, y)
      >>> print(hessian @ jnp.array([0.0, 1.0]))
      [1. 2.]
      >>> print(hessian.dense())  # X'X / N; for small ones alone
      [[1. 1.]
       [1. 2.]]

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples, or a `regjax.WeightedMean`
        over them. It is traced now: later changes of what it closes over do not count. A new
        function of the same program compiles nothing again.
      params: tree of real floating-point parameters, n in all.
      *batch: arrays with a leading axis of examples.
      chunk_size: number of examples per pass, for bounded memory; the last chunk may be smaller and
        counts by its size. None takes the whole batch at once and, if it fits in memory, keeps what
        all products share. Where the batch is divided over the devices of a mesh, each device
        passes over its own examples.
      wrt: which leaves the matrix is of, a tree of bools like `params`, a function (path, leaf) ->
        bool, or a filter of nnx (see `regjax.subset`). The matrix is the principal submatrix of
        these leaves, and its vectors have None elsewhere. The others may have any type. None: all.
      differences: whether products may be central differences of gradients where JAX cannot
        differentiate the loss twice, neither forward over reverse nor reverse over reverse: a
        function within it has a rule of its own (`jax.custom_vjp`) that has no rule. Parameters are
        then taken in float32 at least. A product takes four gradients in a solver, and what it is
        off by, as two steps tell, is part of the residual norms of `top_eigenpairs`, `lanczos` and
        `spectral_density`; not of the standard errors of `trace` and `diagonal`. At kinks, such as
        those of ReLU, two steps may tell too little.

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      TypeError: a parameter is not real floating point, or a function within the loss cannot be
        differentiated twice.
      ValueError: the loss is not a scalar, the batch has no common leading axis, `chunk_size` is
        not positive, or it splits a batch whose examples the loss couples (batch norm in train
        mode: ask for "train_per_chunk" by name). The arrays of the batch are divided differently
        over devices, or `wrt` chooses nothing.
    """
    loss_fn, params = part_of(loss_fn, params, wrt)
    _checks.floating_tree("params", params)
    params = widened(params) if differences else params
    form = hessian_form(loss_fn, params, *batch, chunk_size=chunk_size, differences=differences)
    return build(form, params, batch, chunk_size)


def hessian_form(
    loss_fn: LossFn, params: Params, *batch: Tree, chunk_size: int | None, differences: bool = False
) -> Form:
    """How the Hessian follows from the loss; tests a loss that is to be split."""
    parts, size = parts_of(loss_fn, params, batch, chunk_size)
    program = trace(loss_fn, *((params, *part) for part in parts))
    check_scalar(program.outputs(params, *batch))
    if size is not None:
        ensure_separable(
            loss_fn, params, batch, size=size, name="loss_fn",
            functions=(loss_fn,), programs=(program,),
        )  # fmt: skip
    loss = mean_loss(program)
    weights = None if loss is program else Partial(mean_weights, program)
    mode = choose_of_gradient(
        _of_loss, jaxpr_of(program), loss, params, params, *batch,
        name="loss_fn", differences=differences,
    )  # fmt: skip
    return Form(of_gradient(mode, _of_loss), loss, weights)


@checked
def from_gradient(
    grad_fn: Callable[[Params], Params],
    params: Params,
    *,
    wrt: Mask = None,
    differences: bool = False,
) -> CurvatureOperator:
    """Makes the Hessian of a loss of which only the gradient is given.

    Example:
      >>> grad_fn = lambda w: jnp.array([3.0, 1.0]) * w
      >>> print(curvature.from_gradient(grad_fn, jnp.ones(2)) @ jnp.ones(2))
      [3. 1.]

    Args:
      grad_fn: params -> gradient; traced now, like the loss in `hessian`.
      params: tree of parameters.
      wrt: which leaves the matrix is of (see `hessian`); `grad_fn` takes and gives all of them.
      differences: whether products may be central differences where JAX cannot differentiate
        `grad_fn`, neither forwards nor backwards (see `hessian`).

    Returns:
      An `Operator` of shape (n, n), the Jacobian of `grad_fn` at `params`.

    Raises:
      TypeError: a parameter or a leaf of the gradient is not real floating point, or a function
        within `grad_fn` cannot be differentiated.
      ValueError: the gradient has another structure or other shapes than the parameters.
    """
    grad_fn, params = gradient_of_part(grad_fn, params, wrt)
    _checks.floating_tree("params", params)
    params = widened(params) if differences else params
    gradient = trace(grad_fn, (params,))
    _checks.same_tree("grad_fn(params)", gradient.outputs(params), params)
    _checks.floating_tree("grad_fn(params)", gradient.outputs(params))
    mode = choose_of_gradient(
        _itself, jaxpr_of(gradient), gradient, params, params,
        name="grad_fn", differences=differences,
    )  # fmt: skip
    linearization = of_gradient(mode, _itself)._replace(of_part=Partial(part_of_gradient))
    return build(Form(linearization, gradient), params, (), None)


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
