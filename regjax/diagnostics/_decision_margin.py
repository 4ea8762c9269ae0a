"""How far an input is from the decision boundary of its class."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _chunks, _jacobian, _loops, _tree
from regjax._base import as_partial
from regjax.diagnostics._spline_partition import ratio


def decision_margin(
    model_fn: Callable[..., Any],
    params: Any,
    inputs: jax.Array,
    labels: jax.Array,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """The signed distance of each input from the decision boundary of its class.

        margin(x) = min_{j != y} (f_y(x) - f_j(x)) / ||grad_x (f_y - f_j)(x)||

    Negative where another class wins. Exact if no boundary of a unit is closer; else that of the
    linear piece around x. Two logits with the same gradient have no boundary between them: it is
    infinitely far, on the side of their difference. Costs a reverse pass for each class.

    Args:
      model_fn: (params, inputs) -> logits (N, classes), each row a function of its own example
        alone, such as `regjax.model_function(model)`.
      params: tree of parameters.
      inputs: (N, ...), real floating point.
      labels: (N,), integers from 0 to classes - 1; others give NaN where they are traced.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      Margins (N,), in the units of the inputs and float32 at least.

    Raises:
      ValueError: a label is out of range, shapes do not fit, or the model couples the examples.
      TypeError: `labels` are not integers, or `inputs` not real floating point.

    References:
      R. Balestriero, R. Baraniuk (2022), arXiv:2209.14778, on margins; the formula is the usual one
      for piecewise linear classifiers.
    """
    labels = check_classifier("model_fn", model_fn, params, inputs, labels)
    function = Partial(margins, as_partial(model_fn))
    return _chunks.each(function, params, (inputs, labels), chunk_size)


def margins(model_fn: Partial, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """`decision_margin` of one chunk."""
    logits, rows = _jacobian.rows(lambda x: model_fn(params, x), inputs)
    logits, rows, own = _tree.wide(logits), _tree.wide(rows), labels[:, None]
    difference = jnp.take_along_axis(logits, own, 1) - logits
    gradients = jnp.take_along_axis(rows, own.T[:, :, None], 0) - rows
    distances = ratio(difference, jnp.sqrt(jnp.sum(gradients**2, 2)).T)
    # The class itself is infinitely far: 0 / 0.
    is_class = (labels >= 0) & (labels < logits.shape[1])
    return jnp.where(is_class, jnp.min(distances, 1), jnp.nan)


def check_classifier(
    name: str, function: Any, params: Any, inputs: Any, labels: Any, *rest: Any
) -> jax.Array:
    """The labels as an array, checked against the logits."""
    _jacobian.check_model(name, function, inputs)
    shape = getattr(jax.eval_shape(as_partial(function), params, inputs, *rest), "shape", None)
    if shape is None or len(shape) != 2 or shape[0] != len(inputs) or shape[1] < 2:
        raise ValueError(
            f"`{name}` must return logits of shape ({len(inputs)}, classes), two classes at least, "
            f"got {shape}."
        )
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers, got {labels.dtype}.")
    if labels.shape != (len(inputs),):
        raise ValueError(f"`labels` must have shape ({len(inputs)},), got {labels.shape}.")
    if _loops.is_concrete(labels) and not (labels.min() >= 0 and labels.max() < shape[1]):
        raise ValueError(
            f"`labels` must be between 0 and {shape[1] - 1}, got {labels.min()} to {labels.max()}."
        )
    return labels
