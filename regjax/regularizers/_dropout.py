"""Dropout as penalties: what its masks add to the loss on average, and what a finite rate adds."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import Params, PRNGKey
from regjax._losses import whole
from regjax._printing import legible
from regjax.regularizers._gradient_norm import squared_gradient_norm


@legible
class DropoutGradientPenaltyResult(NamedTuple):
    """The penalty of a finite learning rate, from some masks.

    Attributes:
      value: (), the mean over the masks, unbiased; differentiable.
      standard_error: (), over the draw of the masks; NaN with a single one.
    """

    value: jax.Array
    standard_error: jax.Array


@checked
def dropout_penalty(
    features: jax.Array, kernel: jax.Array, *, keep_probability: float | jax.Array
) -> jax.Array:
    """Computes what dropout before the last layer adds to half the mean squared error, on average.

        R1 = (1 - p) / (2 n p) sum_i sum_j ||W_j||^2 f_j(x_i)^2

    The sums go over n examples i and the units j. p is the `keep_probability`, f are the `features`
    without dropout, and W_j is the row of `kernel` that unit j feeds. If a mask is 1 / p with
    probability p and else 0, then exactly

        E R_drop = R_S + R1,    R_S = 1 / (2 n) sum_i ||f(x_i) W + b - y_i||^2

    and the same holds for the gradients. The output bias b is not dropped. One mask for the whole
    batch and one mask for each example have the same mean, but not the same covariance. Take twice
    the penalty for a mean squared error without the 1/2. If other layers have dropout too, or with
    cross-entropy, the identity does not hold, and R1 is a heuristic.

    Example:
      >>> features = jnp.array([[1.0, 2.0]])  # one example with two units
      >>> kernel = jnp.array([[3.0], [1.0]])
      >>> print(regularizers.dropout_penalty(features, kernel, keep_probability=0.5))
      6.5

    Args:
      features: (n, m), outputs of the last hidden layer, where the masks would act; differentiable.
      kernel: (m, k) of the last layer; differentiable.
      keep_probability: p, above 0 and at most 1; a Python number or a traced one. flax's
        `Dropout(rate)` keeps with probability 1 - rate.

    Returns:
      The penalty (), in float32 at least, in units of the loss.

    Raises:
      ValueError: the shapes do not fit, or `keep_probability` is not above 0 and at most 1.
      TypeError: `keep_probability` is not a real number, or an array not real floating point.

    References:
      Z. Zhang, Z.-Q. Xu (2024), Implicit regularization of dropout, arXiv:2207.05952, eq. 4 and
      lemma 1. For several outputs we take the squared norm of W_j instead of its square.
    """
    f, w = _checks.floating_array("features", features), _checks.floating_array("kernel", kernel)
    if f.ndim != 2 or w.ndim != 2 or f.shape[1] != w.shape[0] or not f.size or not w.size:
        raise ValueError(
            "`features` and `kernel` must have entries and the shapes (n, m) and (m, k), got "
            f"{f.shape} and {w.shape}."
        )
    _checks.number("keep_probability", keep_probability, above_zero=True)
    _checks.between("keep_probability", keep_probability, 0, 1)
    # The squares of small features may underflow where their product with large weights does not.
    f, f_power = _numerics.near_one(_tree.wide(f), (0,))
    w, w_power = _numerics.near_one(_tree.wide(w), (1,))
    unscale = (1 / f_power[0]) * (1 / w_power[:, 0])
    total = jnp.sum((jnp.mean(f**2, 0) * unscale) * (jnp.sum(w**2, 1) * unscale))
    keep = jnp.asarray(keep_probability, total.dtype)
    return (1 - keep) / (2 * keep) * total


@checked
def dropout_gradient_penalty(
    dropout_loss_fn: Callable[[Params, PRNGKey], jax.Array],
    params: Params,
    *,
    key: PRNGKey,
    learning_rate: ArrayLike,
    num_samples: int = 1,
) -> DropoutGradientPenaltyResult:
    """Estimates what a finite learning rate adds to the loss that training with dropout minimises.

        R2 = lr / 4 E ||grad R_drop||^2 = lr / 4 (||grad E R_drop||^2 + tr Cov(grad R_drop))

    R_drop is the loss under a random mask. To first order in the learning rate lr, gradient descent
    with dropout follows the gradient flow of E R_drop + R2; `dropout_penalty` gives the difference
    between E R_drop and the loss without dropout. The loss can be any, with dropout in any layer.
    The derivative with respect to the parameters costs one Hessian product per mask. The masks
    follow one another, so that the memory is that of one mask.

    Example:
      >>> def dropout_loss_fn(w, key):
      ...     return 0.5 * jnp.sum((2.0 * jax.random.bernoulli(key, 0.5, w.shape) * w) ** 2)
      >>> result = regularizers.dropout_gradient_penalty(
      ...     dropout_loss_fn, jnp.ones(10_000), key=jax.random.key(0), learning_rate=0.001,
      ...     num_samples=4,
      ... )
      >>> print(f"{result.value:.1f}")  # 0.001 / 4 * 10000 * (4^2 / 2)
      20.0

    Args:
      dropout_loss_fn: (params, key) -> scalar, the mean loss under the mask that `key` draws. Bind
        the data as arguments: `jax.tree_util.Partial(loss, inputs=...)`.
      params: tree of parameters; differentiable.
      key: typed key. The masks are those of `jax.random.split(key, num_samples)`, the same as in
        `curvature.dropout_covariance`.
      learning_rate: that of plain gradient descent, at least 0; may be traced.
      num_samples: number of masks.

    Returns:
      A `DropoutGradientPenaltyResult`, in units of the loss.

    Raises:
      ValueError: the loss is not a scalar, `num_samples` below 1, or `learning_rate` is negative.
      TypeError: a parameter is not real floating point, or `key` is not a typed key.

    References:
      Z. Zhang, Z.-Q. Xu (2024), arXiv:2207.05952, eq. 5. The split into mean and covariance and
      the standard error are ours.
    """
    _checks.number("learning_rate", learning_rate)
    _checks.integer("num_samples", num_samples)
    _checks.key("key", key)
    loss = whole(_chunks.traced(dropout_loss_fn, params, (key,), name="dropout_loss_fn"))
    keys = jax.random.split(key, num_samples)
    norms = _chunks.each(Partial(_squared_norm, loss), params, (keys,), 1)
    factor = jnp.asarray(learning_rate, norms.dtype) / 4
    _, error = _numerics.mean_and_error(jax.lax.stop_gradient(norms))
    return DropoutGradientPenaltyResult(factor * jnp.mean(norms), factor * error)


def _squared_norm(dropout_loss_fn: Partial, params: Params, keys: jax.Array) -> jax.Array:
    return squared_gradient_norm(dropout_loss_fn, params, (keys[0],))[None]
