"""The Gauss-Newton matrix of a loss of the outputs, and the mean of its outer gradients."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import (
    Batch,
    Mask,
    ModelFn,
    OutputLossFn,
    Params,
    Tree,
    WeightedMean,
    as_partial,
    check_scalar,
    terms,
)
from regjax._differentiation import (
    DIFFERENCES,
    Mode,
    choose_of_gradient,
    jacobian_product,
    jaxpr_of,
    static,
)
from regjax._losses import MeanLoss, mean_loss, mean_weights
from regjax._programs import Program
from regjax._separable import ensure_separable
from regjax.curvature._operators._curvature import (
    CurvatureOperator,
    Form,
    parts_of,
    trace,
)
from regjax.curvature._operators._likelihoods import check_outputs
from regjax.curvature._operators._sandwich import (
    ensure_own_losses,
    of_forms,
    outer,
    positive,
    sandwich,
    split,
    traced_model,
    weighted_sum,
)


@checked
def gauss_newton(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    inputs: Tree,
    targets: Tree,
    weights: ArrayLike | None = None,
    *,
    chunk_size: int | None = None,
    wrt: Mask = None,
    differences: bool = False,
) -> CurvatureOperator:
    """Makes the generalised Gauss-Newton matrix.

        J' (d2 loss / d outputs2) J,   J the Jacobian of the outputs

    It is the Hessian without the curvature of the network itself: positive semi-definite for a loss
    that is convex in the outputs, and equal to the Hessian where the residuals vanish. The model
    and the loss of its outputs are two functions here, because they are differentiated apart.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> loss_fn = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 3.0])
      >>> print(curvature.gauss_newton(model_fn, loss_fn, jnp.zeros(2), x, y).dense())  # X'X / N
      [[1. 1.]
       [1. 2.]]

    Args:
      model_fn: (params, inputs) -> outputs: an array, or a tree of arrays, with a leading axis of
        examples.
      output_loss_fn: (outputs, targets) -> scalar, the mean over the examples, or a
        `regjax.WeightedMean`; with `weights` the loss of each prediction, of their shape.
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      targets: array or tree with the same leading axis.
      weights: (examples, ...) of the predictions, such as a mask of tokens: the loss is the sum of
        weight times loss over the sum of the weights. None: the loss says how it is a mean.
      chunk_size: number of examples per pass, None for all at once (see `hessian`).
      wrt: which leaves of the parameters the matrix is of (see `hessian`).
      differences: whether products may be made of central differences where JAX cannot
        differentiate the model, or the loss twice (see `hessian`).

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      ValueError: the output loss is not a scalar (or not of the shape of `weights`), a weight is
        negative or not finite, or as in `hessian`.

    References:
      N. Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
      descent, Neural Computation 14(7).
    """
    (operator,) = of_forms(
        (gauss_newton_form,), model_fn, output_loss_fn, params, (inputs, targets), weights,
        chunk_size=chunk_size, wrt=wrt, differences=differences,
    )  # fmt: skip
    return operator


@checked
def empirical_fisher(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    inputs: Tree,
    targets: Tree,
    weights: ArrayLike | None = None,
    *,
    chunk_size: int | None = None,
    wrt: Mask = None,
    differences: bool = False,
) -> CurvatureOperator:
    """Makes the mean of the outer products of each example's gradient with itself.

        mean_i g_i g_i',   g_i the gradient of example i's loss

    The targets are those of the data, so this is not the Fisher matrix, nor an approximation of the
    Hessian away from a good fit. The examples must not couple through the loss. Of a weighted mean
    g_i is the gradient of example i's own weighted mean, and its outer product counts by its
    weight: sum_i w_i g_i g_i' / sum_i w_i.

    Example:
      >>> model_fn = lambda w, x: x @ w
      >>> loss_fn = lambda outputs, y: 0.5 * jnp.mean((outputs - y) ** 2)
      >>> x, y = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([1.0, 3.0])
      >>> matrix = curvature.empirical_fisher(model_fn, loss_fn, jnp.zeros(2), x, y)
      >>> print(matrix.dense())  # the gradients are (-1, 0) and (-3, -6)
      [[ 5.  9.]
       [ 9. 18.]]

    Args:
      model_fn: (params, inputs) -> outputs: an array, or a tree of arrays, with a leading axis of
        examples.
      output_loss_fn: (outputs, targets) -> loss, as in `gauss_newton`; not a sum of weighted means.
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      targets: array or tree with the same leading axis.
      weights: (examples, ...) of the predictions, as in `gauss_newton`.
      chunk_size: number of examples per pass, None for all at once (see `hessian`).
      wrt: which leaves of the parameters the matrix is of (see `hessian`).
      differences: whether products may be made of central differences where JAX cannot
        differentiate the model, or the loss twice (see `hessian`).

    Returns:
      An `Operator` of shape (n, n), in squared units of the gradient.

    Raises:
      ValueError: the output loss is not a scalar or adds up weighted means, the outputs have not
        the examples in front, or as in `hessian`.

    References:
      F. Kunstner, L. Balles, P. Hennig (2019), Limitations of the empirical Fisher approximation,
      arXiv:1905.12558, eq. 3.
    """
    (operator,) = of_forms(
        (empirical_fisher_form,), model_fn, output_loss_fn, params, (inputs, targets), weights,
        chunk_size=chunk_size, wrt=wrt, differences=differences,
    )  # fmt: skip
    return operator


def gauss_newton_form(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    *batch: Tree,
    chunk_size: int | None,
    differences: bool = False,
) -> Form:
    """How the matrix follows from (inputs, targets), or (inputs, targets, weights)."""
    model, loss = _programs_of(model_fn, _reduced(output_loss_fn, batch), params, batch, chunk_size)
    weights = Partial(_weights, model, loss) if _is_weighted(loss) else None
    mean, example = mean_loss(loss), (params, batch[0])
    floats, others = split(model.outputs(*example))
    operands = (mean, floats, floats, others, *batch[1:])
    mode = choose_of_gradient(
        _of_outputs, jaxpr_of(loss), *operands, name="output_loss_fn", differences=differences
    )
    step = {"step": jnp.float32(1)} if mode == DIFFERENCES else {}
    curvature = Partial(static(_loss_hessian, mode), mean, **step)
    return sandwich(curvature, model, weights, example, differences=differences)


def empirical_fisher_form(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    *batch: Tree,
    chunk_size: int | None,
    differences: bool = False,
) -> Form:
    """How the matrix follows from (inputs, targets), or (inputs, targets, weights)."""
    maps, options = (_observed, _observed_weighted), (chunk_size, differences)
    return form_of_gradients(*maps, model_fn, output_loss_fn, params, batch, *options)


def form_of_gradients(
    plain: Callable[..., Tree],
    weighted: Callable[..., Tree],
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    batch: Batch,
    chunk_size: int | None,
    differences: bool,
) -> Form:
    """J' A J, A made of the examples' gradients at the outputs, of a plain or a weighted loss."""
    reduced, example = _reduced(output_loss_fn, batch), (params, batch[0])
    model, loss = _programs_of(model_fn, reduced, params, batch, chunk_size)
    outputs = model.outputs(params, batch[0])
    check_outputs("empirical", outputs, _checks.num_examples(batch))
    if len(terms(loss.outputs(outputs, *batch[1:]))) > 1:
        raise ValueError(
            "`output_loss_fn` must return one regjax.WeightedMean, got several that add up: an "
            "example has no weight of its own."
        )
    if chunk_size is None:
        ensure_own_losses(output_loss_fn, reduced, model, loss, params, batch)
    if not _is_weighted(loss):
        return sandwich(Partial(plain, loss), model, None, example, differences=differences)
    one = jax.eval_shape(
        lambda tree: jax.tree.map(lambda leaf: leaf[:1], tree), (outputs, *batch[1:])
    )
    own = trace(reduced, one)
    curvature = Partial(weighted, mean_loss(loss), own)
    weights = Partial(_weights, model, loss)
    return sandwich(curvature, model, weights, example, differences=differences)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["loss_fn"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Predictions:
    """(outputs, targets, weights) -> the weighted mean of the losses of the predictions."""

    loss_fn: OutputLossFn

    def __call__(self, outputs: Tree, targets: Tree, weights: jax.Array) -> WeightedMean:
        losses = self.loss_fn(outputs, targets)
        shape = getattr(losses, "shape", None)
        if shape != weights.shape:
            raise ValueError(
                f"`output_loss_fn` must return the loss of each prediction, of the shape "
                f"{weights.shape} of `weights`, got {shape}."
            )
        total = jnp.sum(weighted_sum(weights, _tree.wide(losses)))
        return WeightedMean(total, jnp.sum(weights))


def _reduced(output_loss_fn: OutputLossFn, batch: Batch) -> Callable[..., Tree]:
    """The loss of the outputs and what of the batch comes with them."""
    if len(batch) == 2:
        return output_loss_fn
    return _Predictions(as_partial(output_loss_fn))


def _is_weighted(loss: Program) -> bool:
    return isinstance(mean_loss(loss), MeanLoss)


def _programs_of(
    model_fn: ModelFn,
    output_loss_fn: Callable[..., Tree],
    params: Params,
    batch: Batch,
    chunk_size: int | None,
) -> tuple[Program, Program]:
    """The programs of a model and of the loss of its outputs; tested if data are to be split."""
    parts, size = parts_of(model_fn, params, batch, chunk_size)
    model = traced_model(model_fn, params, parts)
    signatures = [(model.outputs(params, part[0]), *part[1:]) for part in parts]
    loss = trace(output_loss_fn, *signatures)
    check_scalar(loss.outputs(*signatures[0]), name="output_loss_fn")
    if size is not None:
        composed = Partial(_composed, as_partial(model_fn), as_partial(output_loss_fn))
        ensure_separable(
            composed, params, batch, size=size, name="output_loss_fn",
            functions=(model_fn, output_loss_fn), programs=(model, loss),
        )  # fmt: skip
    return model, loss


def _composed(
    model_fn: Partial, output_loss_fn: Partial, params: Params, inputs: Tree, *rest: Tree
) -> Tree:
    return output_loss_fn(model_fn(params, inputs), *rest)


def _weights(
    model: Program, loss: Program, params: Params, inputs: Tree, *rest: Tree
) -> tuple[jax.Array, ...]:
    return mean_weights(loss, model(params, inputs), *rest)


def _loss_hessian(
    mode: Mode, loss_fn: Program | MeanLoss, floats: Tree, others: Tree, *rest: Tree,
    step: ArrayLike = 1.0,
) -> Tree:  # fmt: skip
    *data, tangent = rest
    return jacobian_product(mode, _of_outputs, loss_fn, floats, tangent, others, *data, step=step)


def _of_outputs(loss_fn: Program | MeanLoss, floats: Tree, others: Tree, *data: Tree) -> Tree:
    return jax.grad(lambda floats: loss_fn(_tree.merge(floats, others), *data))(floats)


@positive
def _observed(loss_fn: Program, floats: Tree, others: Tree, *rest: Tree) -> Tree:
    *data, tangent = rest
    num_examples = _checks.num_examples(floats)
    # The gradient of a mean over N examples is 1/N times each example's own.
    scores = jax.grad(lambda floats: loss_fn(_tree.merge(floats, others), *data))(floats)
    scores = jax.tree.map(lambda leaf: leaf * num_examples, scores)
    return outer(scores, tangent, 1 / num_examples)


@positive
def _observed_weighted(
    loss_fn: MeanLoss, own: Program, floats: Tree, others: Tree, *rest: Tree
) -> Tree:
    *data, tangent = rest
    num_examples = _checks.num_examples(floats)
    total = lambda floats: terms(loss_fn.loss_fn(_tree.merge(floats, others), *data))[0].sum

    def weight(*example: Tree) -> jax.Array:
        return mean_weights(own, *jax.tree.map(lambda leaf: leaf[None], example))[0]

    weights = jax.vmap(weight)(_tree.merge(floats, others), *data)
    (factor,) = loss_fn.factors.of(1)
    # Of w_i times the example's own gradient, once divided by w_i.
    share = _numerics.divide(factor / num_examples, weights)
    return outer(jax.grad(total)(floats), tangent, share)
