"""Curvature through the network's outputs: J' A J, with A the curvature of the loss there.

J is the Jacobian of the outputs with respect to the parameters. A product is one forward-mode
pass (u = J v), a small product at the outputs (a = A u) and one reverse-mode pass (J' a); the
three matrices here differ in A alone.
"""

import functools

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Batch, ModelFn, OutputLossFn, Params, PRNGKey, Tree, check_scalar
from regjax._programs import Program
from regjax.curvature._operators._curvature import (
    CurvatureOperator,
    Linearization,
    build,
    parts_of,
    trace,
)
from regjax.curvature._operators._likelihoods import LIKELIHOODS, check_outputs


@checked
def gauss_newton(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    inputs: Tree,
    targets: Tree,
    *,
    chunk_size: int | None = None,
) -> CurvatureOperator:
    """Makes the generalised Gauss-Newton matrix.

        J' (d2 loss / d outputs2) J,   J the Jacobian of the outputs

    It is the Hessian without the curvature of the network itself: positive semi-definite for a
    loss that is convex in the outputs, and equal to the Hessian where the residuals vanish.

    Args:
      model_fn: (params, inputs) -> outputs, leading axis the examples.
      output_loss_fn: (outputs, targets) -> scalar, the mean over the examples.
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      targets: array or tree with the same leading axis.
      chunk_size: number of examples per pass, None for all at once (see `hessian`).

    Returns:
      An `Operator` of shape (n, n).

    Raises:
      ValueError: the output loss is not a scalar, or as in `hessian`.

    References:
      N. Schraudolph (2002), Fast curvature matrix-vector products for second-order gradient
      descent, Neural Computation 14(7).
    """
    model, parts = _traced_model(model_fn, params, (inputs, targets), chunk_size)
    curvature = Partial(_loss_hessian, _traced_loss(output_loss_fn, model, params, parts))
    return _sandwich(curvature, model, params, (inputs, targets), chunk_size)


@checked
def empirical_fisher(
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    inputs: Tree,
    targets: Tree,
    *,
    chunk_size: int | None = None,
) -> CurvatureOperator:
    """Makes the mean of the outer products of each example's gradient with itself.

        mean_i g_i g_i',   g_i the gradient of example i's loss

    Targets are the observed ones, so this is neither the Fisher matrix nor an approximation of
    the Hessian away from a good fit. The examples must not couple through the loss.

    Args:
      model_fn: (params, inputs) -> outputs, leading axis the examples.
      output_loss_fn: (outputs, targets) -> scalar, the mean over the examples.
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      targets: array or tree with the same leading axis.
      chunk_size: number of examples per pass, None for all at once (see `hessian`).

    Returns:
      An `Operator` of shape (n, n), in squared units of the gradient.

    Raises:
      ValueError: the output loss is not a scalar, the outputs are no array with the examples in
        front, or as in `hessian`.

    References:
      F. Kunstner, L. Balles, P. Hennig (2019), Limitations of the empirical Fisher approximation,
      arXiv:1905.12558, eq. 3.
    """
    model, parts = _traced_model(model_fn, params, (inputs, targets), chunk_size)
    check_outputs("empirical", model.outputs(params, inputs), _checks.num_examples(inputs))
    curvature = Partial(_observed_score, _traced_loss(output_loss_fn, model, params, parts))
    return _sandwich(curvature, model, params, (inputs, targets), chunk_size)


@checked
def fisher(
    model_fn: ModelFn,
    params: Params,
    inputs: Tree,
    *,
    key: PRNGKey | None,
    num_samples: int | None = 1,
    likelihood: str = "categorical",
    chunk_size: int | None = None,
) -> CurvatureOperator:
    """Makes the Fisher information matrix of the model's own predictive distribution.

    The mean over the examples of J' E[s s'] J, s the score of a target drawn from the model. With
    `num_samples` the expectation is a mean over that many draws, fixed by `key` for all products;
    with None it is exact, and then equal to the Gauss-Newton matrix of the likelihood's loss.

    Args:
      model_fn: (params, inputs) -> outputs, an array whose leading axis is that of the mean: logits
        of a softmax (examples, ..., classes), with all axes but the last for independent
        predictions; or logits of independent yes and no (examples, ...); or means of independent
        normals of unit variance (examples, ...).
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      key: typed key of the draws; None with `num_samples=None`.
      num_samples: draws per prediction, or None for the exact expectation.
      likelihood: "categorical" (softmax cross-entropy), "bernoulli" (sigmoid cross-entropy) or
        "normal" (half the squared error).
      chunk_size: number of examples per pass, None for all at once (see `hessian`).

    Returns:
      An `Operator` of shape (n, n), in squared units of the log-likelihood's gradient.

    Raises:
      TypeError: `key` is not a typed key though draws are asked for.
      ValueError: `likelihood` is unknown or does not go with the shape of the outputs,
        `num_samples` is below one, or as in `hessian`.

    References:
      J. Martens (2020), New insights and perspectives on the natural gradient method,
      arXiv:1412.1193, sections 5 and 9.
    """
    exact, sampled = LIKELIHOODS[_checks.choice("likelihood", likelihood, tuple(LIKELIHOODS))]
    num_examples = _checks.num_examples(inputs)
    model, _ = _traced_model(model_fn, params, (inputs,), chunk_size)
    check_outputs(likelihood, model.outputs(params, inputs), num_examples)
    if num_samples is None:
        return _sandwich(Partial(exact), model, params, (inputs,), chunk_size)
    _checks.integer("num_samples", num_samples)
    # One key for each example and draw: the draws do not depend on how the data are chunked.
    keys = draw_keys(_checks.key("key", key), 0, num_examples, num_samples)
    return _sandwich(Partial(sampled), model, params, (inputs, keys), chunk_size)


def draw_keys(key: jax.Array, first: int, num_examples: int, num_samples: int) -> jax.Array:
    """Keys (num_examples, num_samples) that belong to the examples' numbers, from `first` on."""
    return _draw_keys(key, jnp.uint32(first), num_examples, num_samples)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw_keys(key: jax.Array, first: jax.Array, num_examples: int, num_samples: int) -> jax.Array:
    numbers = first + jnp.arange(num_examples, dtype=jnp.uint32)
    each = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number), num_samples))
    return each(numbers)


def _traced_model(
    model_fn: ModelFn, params: Params, batch: Batch, chunk_size: int | None
) -> tuple[Program, tuple[Batch, ...]]:
    """The program of a model, and the shapes of the batches that it is for."""
    _checks.floating_tree("params", params)
    parts = parts_of(model_fn, batch, chunk_size)
    return trace(model_fn, *((params, part[0]) for part in parts)), parts


def _traced_loss(
    output_loss_fn: OutputLossFn, model: Program, params: Params, parts: tuple[Batch, ...]
) -> Program:
    """The program of a loss of the outputs of a model for batches of (inputs, targets)."""
    signatures = [(model.outputs(params, inputs), targets) for inputs, targets in parts]
    loss = trace(output_loss_fn, *signatures)
    check_scalar(loss.outputs(*signatures[0]), name="output_loss_fn")
    return loss


def _sandwich(
    curvature: Partial,
    model: Program,
    params: Params,
    batch: Batch,
    chunk_size: int | None,
) -> CurvatureOperator:
    linearization = Linearization(
        Partial(_linearize_sandwich, curvature), Partial(_multiply_sandwich, curvature)
    )
    return build(linearization, model, params, batch, chunk_size)


def _linearize_sandwich(
    curvature: Partial, model_fn: ModelFn, params: Params, inputs: Tree, *rest: Tree
) -> Partial:
    outputs, jacobian = jax.linearize(lambda p: model_fn(p, inputs), params)
    return Partial(_apply_sandwich, jacobian, Partial(curvature, outputs, *rest))


def _multiply_sandwich(
    curvature: Partial, model_fn: ModelFn, params: Params, vector: Params, inputs: Tree, *rest: Tree
) -> Tree:
    return _linearize_sandwich(curvature, model_fn, params, inputs, *rest)(vector)


def _apply_sandwich(jacobian: Partial, curvature: Partial, vector: Params) -> Tree:
    return jax.linear_transpose(jacobian, vector)(curvature(jacobian(vector)))[0]


def _loss_hessian(output_loss_fn: Partial, outputs: Tree, targets: Tree, tangent: Tree) -> Tree:
    return jax.jvp(jax.grad(lambda o: output_loss_fn(o, targets)), (outputs,), (tangent,))[1]


def _observed_score(output_loss_fn: Partial, outputs: Tree, targets: Tree, tangent: Tree) -> Tree:
    # The gradient of a mean over N examples is 1/N times each example's own.
    scores = jax.grad(output_loss_fn)(outputs, targets) * outputs.shape[0]
    axes = tuple(range(1, outputs.ndim))
    return scores * jnp.sum(scores * tangent, axis=axes, keepdims=True) / outputs.shape[0]
