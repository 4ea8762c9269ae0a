"""The Fisher information matrix of a model's own predictions."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks
from regjax._arguments import checked
from regjax._base import Mask, ModelFn, Params, PRNGKey, Tree
from regjax._losses import Factors
from regjax._subsets import part_of
from regjax.curvature._operators._curvature import CurvatureOperator, Form, build, parts_of
from regjax.curvature._operators._likelihoods import LIKELIHOODS, check_outputs, check_weights
from regjax.curvature._operators._sandwich import (
    ensure_own_outputs,
    positive,
    sandwich,
    traced_model,
    weighted_sum,
    with_weights,
)


@checked
def fisher(
    model_fn: ModelFn,
    params: Params,
    inputs: Tree,
    weights: ArrayLike | None = None,
    *,
    key: PRNGKey | None,
    num_samples: int | None = 1,
    likelihood: str = "categorical",
    chunk_size: int | None = None,
    wrt: Mask = None,
    differences: bool = False,
) -> CurvatureOperator:
    """Makes the Fisher information matrix of the model's own predictive distribution.

        mean over the examples of J' E[s s'] J,   J the Jacobian of the outputs

    The score s is the gradient of the log-likelihood with respect to the outputs, for a target that
    is drawn from the model: no targets are passed. It is summed over the predictions of an example.
    With `num_samples` the expectation is a mean over so many draws, which `key` fixes for all
    products; the matrix, and what is computed of it, is then that of these draws. With None it is
    exact, and equal to the Gauss-Newton matrix of the likelihood's loss.

    Example:
      >>> model_fn = lambda w, x: x @ w  # logits, 0 here, so that both answers are equally likely
      >>> x = jnp.array([[1.0, 0.0], [1.0, 2.0]])
      >>> exact = {"key": None, "num_samples": None, "likelihood": "bernoulli"}
      >>> print(curvature.fisher(model_fn, jnp.zeros(2), x, **exact).dense())  # p (1 - p) X'X / N
      [[0.25 0.25]
       [0.25 0.5 ]]

    Args:
      model_fn: (params, inputs) -> outputs, an array with a leading axis of examples: logits of a
        softmax (examples, ..., classes), with all axes but the last for independent predictions; or
        logits of independent yes and no (examples, ...); or means of independent normals of unit
        variance (examples, ...).
      params: tree of real floating-point parameters, n in all.
      inputs: array or tree with a leading axis of examples.
      weights: (examples, ...) of the predictions, such as a mask of tokens, whose axes are the
        first of those of the outputs. The mean is then the weighted mean over the predictions.
        None: one for each example.
      key: typed key for the draws; None with `num_samples=None`.
      num_samples: draws per prediction, or None for the exact expectation.
      likelihood: "categorical" (softmax cross-entropy), "bernoulli" (sigmoid cross-entropy) or
        "normal" (half the squared error).
      chunk_size: number of examples per pass, None for all at once (see `hessian`).
      wrt: which leaves of the parameters the matrix is of (see `hessian`).
      differences: whether products may be made of central differences where JAX cannot
        differentiate the model (see `hessian`).

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
    model_fn, params = part_of(model_fn, params, wrt, differences=differences)
    batch = with_weights((inputs,), weights)
    form = fisher_form(
        model_fn, params, *batch,
        key=key, num_samples=num_samples, likelihood=likelihood, chunk_size=chunk_size,
        differences=differences,
    )  # fmt: skip
    if num_samples is not None:
        # One key for each example and draw: the draws do not depend on how the data are chunked.
        keys = draw_keys(_checks.key("key", key), 0, _checks.num_examples(inputs), num_samples)
        batch = (*batch, keys)
    return build(form, params, batch, chunk_size)


def fisher_form(
    model_fn: ModelFn,
    params: Params,
    *batch: Tree,
    chunk_size: int | None,
    key: PRNGKey | None,
    num_samples: int | None = 1,
    likelihood: str = "categorical",
    differences: bool = False,
) -> Form:
    """How the matrix follows from (inputs,), or (inputs, weights), and the keys of draws."""
    exact, sampled = LIKELIHOODS[_checks.choice("likelihood", likelihood, tuple(LIKELIHOODS))]
    if num_samples is not None:
        _checks.integer("num_samples", num_samples)
        _checks.key("key", key)
    parts, size = parts_of(model_fn, params, batch, chunk_size)
    model = traced_model(model_fn, params, parts)
    outputs = model.outputs(params, batch[0])
    check_outputs(likelihood, outputs, _checks.num_examples(batch))
    if size is not None:
        ensure_own_outputs(model_fn, model, params, batch[0], size)
    example = params, batch[0]
    covariance = Partial(exact if num_samples is None else sampled)
    if len(batch) == 1:
        return sandwich(Partial(_mean, covariance), model, None, example, differences=differences)
    check_weights(likelihood, batch[1], outputs)
    curvature = Partial(_weighted_mean, covariance, Factors(()))
    weights = Partial(_mean_weights)
    return sandwich(curvature, model, weights, example, differences=differences)


def draw_keys(key: jax.Array, first: int, num_examples: int, num_samples: int) -> jax.Array:
    """Keys (num_examples, num_samples) that belong to the examples' numbers, from `first` on."""
    return _draw_keys(key, jnp.uint32(first), num_examples, num_samples)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _draw_keys(key: jax.Array, first: jax.Array, num_examples: int, num_samples: int) -> jax.Array:
    numbers = first + jnp.arange(num_examples, dtype=jnp.uint32)
    each = jax.vmap(lambda number: jax.random.split(jax.random.fold_in(key, number), num_samples))
    return each(numbers)


@positive
def _mean(
    covariance: Callable[..., jax.Array], outputs: jax.Array, _: None, *rest: jax.Array
) -> jax.Array:
    return covariance(outputs, *rest) / outputs.shape[0]


@positive
def _weighted_mean(
    covariance: Callable[..., jax.Array],
    factors: Factors,
    outputs: jax.Array,
    _: None,
    weights: jax.Array,
    *rest: jax.Array,
) -> jax.Array:
    (factor,) = factors.of(1)
    products = weighted_sum(weights, covariance(outputs, *rest))
    return products / outputs.shape[0] * factor.astype(products.dtype)


def _mean_weights(
    params: Params, inputs: Tree, weights: jax.Array, *keys: jax.Array
) -> tuple[jax.Array, ...]:
    return (jnp.sum(weights) / weights.shape[0],)
