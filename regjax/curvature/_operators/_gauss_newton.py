"""Curvature through the network's outputs: J' A J, with A the curvature of the loss there.

J is the Jacobian of the outputs with respect to the parameters. A product is one forward-mode
pass (u = J v), a small product at the outputs (a = A u) and one reverse-mode pass (J' a); the
three matrices here differ in A alone.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks
from regjax._base import Batch, ModelFn, OutputLossFn, Params, PRNGKey, Tree
from regjax._programs import Program
from regjax.curvature._operators._curvature import (
    CurvatureOperator,
    Linearization,
    build,
    parts_of,
    trace,
)


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
    return _of_loss(
        _loss_hessian, model_fn, output_loss_fn, params, (inputs, targets), chunk_size
    )


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
      ValueError: the output loss is not a scalar, or as in `hessian`.

    References:
      F. Kunstner, L. Balles, P. Hennig (2019), Limitations of the empirical Fisher approximation,
      arXiv:1905.12558, eq. 3.
    """
    return _of_loss(
        _observed_score, model_fn, output_loss_fn, params, (inputs, targets), chunk_size
    )


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
      model_fn: (params, inputs) -> outputs (examples, ..., classes or dimensions): logits of a
        softmax, or means of normals of unit variance. All axes but the last enumerate independent
        predictions; the first is the axis of the mean.
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      key: typed key of the draws; None with `num_samples=None`.
      num_samples: draws per prediction, or None for the exact expectation.
      likelihood: "categorical" (softmax cross-entropy) or "normal" (half the squared error).
      chunk_size: number of examples per pass, None for all at once (see `hessian`).

    Returns:
      An `Operator` of shape (n, n), in squared units of the log-likelihood's gradient.

    Raises:
      TypeError: `key` is not a typed key though draws are asked for.
      ValueError: `likelihood` is unknown, `num_samples` below one, or as in `hessian`.

    References:
      J. Martens (2020), New insights and perspectives on the natural gradient method,
      arXiv:1412.1193, sections 5 and 9.
    """
    _checks.choice("likelihood", likelihood, tuple(_EXACT))
    if num_samples is None:
        model, _ = _traced_model(model_fn, params, (inputs,), chunk_size)
        return _sandwich(Partial(_EXACT[likelihood]), model, params, (inputs,), chunk_size)
    _checks.integer("num_samples", num_samples)
    # One key for each example and draw: the draws do not depend on how the data are chunked.
    keys = draw_keys(_checks.key("key", key), 0, _checks.num_examples(inputs), num_samples)
    model, _ = _traced_model(model_fn, params, (inputs, keys), chunk_size)
    return _sandwich(Partial(_SAMPLED[likelihood]), model, params, (inputs, keys), chunk_size)


def draw_keys(key: jax.Array, first: int, num_examples: int, num_samples: int) -> jax.Array:
    """Keys (num_examples, num_samples) that belong to the examples' numbers, from `first` on."""
    return _draw_keys(key, jnp.uint32(first), num_examples, num_samples)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw_keys(key: jax.Array, first: jax.Array, num_examples: int, num_samples: int) -> jax.Array:
    numbers = first + jnp.arange(num_examples, dtype=jnp.uint32)
    each = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number), num_samples))
    return each(numbers)


def _of_loss(
    curvature: Callable[..., Tree],
    model_fn: ModelFn,
    output_loss_fn: OutputLossFn,
    params: Params,
    batch: Batch,
    chunk_size: int | None,
) -> CurvatureOperator:
    """The matrix whose middle follows from a loss of the outputs."""
    model, parts = _traced_model(model_fn, params, batch, chunk_size)
    outputs = [model.outputs(params, inputs) for inputs, _ in parts]
    targets = [targets for _, targets in parts]
    loss = trace(output_loss_fn, *zip(outputs, targets, strict=True))
    shape = getattr(loss.outputs(outputs[0], targets[0]), "shape", None)
    if shape != ():
        raise ValueError(
            f"`output_loss_fn` must return a scalar, the mean over examples, got shape {shape}."
        )
    return _sandwich(Partial(curvature, loss), model, params, batch, chunk_size)


def _traced_model(
    model_fn: ModelFn, params: Params, batch: Batch, chunk_size: int | None
) -> tuple[Program, tuple[Batch, ...]]:
    """The program of a model, and the shapes of the batches that it is for."""
    _checks.floating_tree("params", params)
    parts = parts_of(model_fn, batch, chunk_size)
    return trace(model_fn, *((params, part[0]) for part in parts)), parts


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


def _exact_categorical(outputs: jax.Array, tangent: jax.Array) -> jax.Array:
    probabilities = jax.nn.softmax(outputs)
    centred = tangent - jnp.sum(probabilities * tangent, axis=-1, keepdims=True)
    return probabilities * centred / outputs.shape[0]


def _exact_normal(outputs: jax.Array, tangent: jax.Array) -> jax.Array:
    return tangent / outputs.shape[0]


def _score_products(scores: jax.Array, tangent: jax.Array) -> jax.Array:
    """The mean over draws of s <s, u>; scores (examples, draws, ..., classes)."""
    tangent = tangent[:, None]
    inner = jnp.sum(scores * tangent, axis=-1, keepdims=True)
    return jnp.mean(scores * inner, axis=1) / tangent.shape[0]


def _sampled_categorical(outputs: jax.Array, keys: jax.Array, tangent: jax.Array) -> jax.Array:
    sample = jax.vmap(jax.vmap(jax.random.categorical, (0, None)))
    one_hot = jax.nn.one_hot(sample(keys, outputs), outputs.shape[-1], dtype=outputs.dtype)
    return _score_products(jax.nn.softmax(outputs)[:, None] - one_hot, tangent)


def _sampled_normal(outputs: jax.Array, keys: jax.Array, tangent: jax.Array) -> jax.Array:
    sample = jax.vmap(
        jax.vmap(lambda key: jax.random.normal(key, outputs.shape[1:], outputs.dtype))
    )
    return _score_products(sample(keys), tangent)


_EXACT = {"categorical": _exact_categorical, "normal": _exact_normal}
_SAMPLED = {"categorical": _sampled_categorical, "normal": _sampled_normal}

