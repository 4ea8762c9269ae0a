"""How far an input is from the decision boundary of its class."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _jacobian, _numerics, _tree
from regjax._arguments import checked
from regjax._base import ModelFn, Params, Tree
from regjax.diagnostics._spline_partition import ratio


@checked
def decision_margin(
    model_fn: ModelFn,
    params: Params,
    inputs: jax.Array,
    targets: jax.Array,
    *,
    chunk_size: int | None = None,
) -> jax.Array:
    """Computes the signed distance of each input from the decision boundary of its class.

        margin(x) = min_{j != y} (f_y(x) - f_j(x)) / ||grad_x (f_y - f_j)(x)||

    Here f are the logits and y is the class of x. The margin is negative where another class wins.
    For a ReLU network it is exact if no boundary of a unit is closer to x; else it belongs to the
    linear piece around x. Two logits with the same gradient have no boundary between them, and the
    distance is infinite, with the sign of their difference. Costs one reverse pass per class.

    Example:
      >>> model_fn = lambda params, x: x @ params
      >>> params = jnp.array([[1.0, -1.0], [0.0, 0.0]])  # two classes, the boundary is x_0 = 0
      >>> inputs, targets = jnp.array([[3.0, 5.0], [3.0, 5.0]]), jnp.array([0, 1])
      >>> print(diagnostics.decision_margin(model_fn, params, inputs, targets))
      [ 3. -3.]

    Args:
      model_fn: (params, inputs) -> logits (N, classes), each row a function of its own example
        alone, such as `regjax.model_function(model)`.
      params: tree of parameters.
      inputs: (N, ...), real floating point.
      targets: (N,), integers from 0 to classes - 1; others give NaN where they are traced.
      chunk_size: number of examples per pass; None: all at once.

    Returns:
      Margins (N,), in the units of the inputs and float32 at least.

    Raises:
      ValueError: a target is out of range, shapes do not fit, or the model couples the examples.
      TypeError: `targets` are not integers, or `inputs` not real floating point.

    References:
      R. Balestriero, R. Baraniuk (2022), arXiv:2209.14778, on margins. The formula is the usual one
      for piecewise linear classifiers.
    """
    targets = check_classifier("model_fn", model_fn, params, inputs, targets)
    function = Partial(margins, _chunks.fixed(model_fn, params, inputs, chunk_size))
    return _chunks.each(function, params, (inputs, targets), chunk_size)


def margins(model_fn: Partial, params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Computes the `decision_margin` of one chunk."""
    logits, rows = _jacobian.rows(lambda x: model_fn(params, x), inputs)
    logits, rows, own = _tree.wide(logits), _tree.wide(rows), targets[:, None]
    difference = jnp.take_along_axis(logits, own, 1) - logits
    gradients = jnp.take_along_axis(rows, own.T[:, :, None], 0) - rows
    distances = ratio(difference, _numerics.norms_along(gradients, (2,))[:, :, 0].T)
    # The class itself is infinitely far: 0 / 0.
    is_class = (targets >= 0) & (targets < logits.shape[1])
    return jnp.where(is_class, jnp.min(distances, 1), jnp.nan)


def check_classifier(
    name: str,
    function: Callable[..., jax.Array],
    params: Params,
    inputs: jax.Array,
    targets: ArrayLike,
    *rest: Tree,
) -> jax.Array:
    """Returns the targets as an array, checked against the logits."""
    _jacobian.check_model(name, function, inputs)
    shape = getattr(
        jax.eval_shape(lambda *arguments: function(*arguments), params, inputs, *rest),
        "shape",
        None,
    )
    if shape is None or len(shape) != 2 or shape[0] != len(inputs) or shape[1] < 2:
        raise ValueError(
            f"`{name}` must return logits of shape ({len(inputs)}, classes), two classes at least, "
            f"got {shape}."
        )
    if not isinstance(targets, (jax.Array, np.ndarray, list, tuple)):
        raise TypeError(f"`targets` must be an array of integers, got {type(targets).__name__}.")
    targets = targets if isinstance(targets, jax.Array) else jnp.asarray(targets)
    if not jnp.issubdtype(targets.dtype, jnp.integer):
        raise TypeError(f"`targets` must be integers, got {targets.dtype}.")
    if targets.shape != (len(inputs),):
        raise ValueError(f"`targets` must have shape ({len(inputs)},), got {targets.shape}.")
    known = _checks.host_value(targets)
    if known is not None and not (known.min() >= 0 and known.max() < shape[1]):
        raise ValueError(
            f"`targets` must be between 0 and {shape[1] - 1} (the outputs of `model_fn` less one), "
            f"got {known.min()} to {known.max()}."
        )
    return targets
