"""How the spread of decentralised learners acts on the step of their mean."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _numerics, _tree, curvature
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree
from regjax._printing import legible


@legible
class LandscapeNoiseResult(NamedTuple):
    """The step of the mean weights, split along the full gradient g at them.

    Attributes:
      effective_learning_rate: (), alpha_e = lr <g_a, g> / ||g||^2; NaN where g = 0.
      noise_power: (), Delta = ||eta||^2, the squared length of the rest of the step; all of it,
        lr^2 ||g_a||^2, where g = 0.
      dispersion: (), sqrt(mean_j ||w_j - w_a||^2), in units of the parameters.
      curvature_trace: (), mean_j d_j' H d_j with d_j = w_j - w_a, the trace of the Hessian times
        the covariance of the learners; twice the loss that the spread costs, to second order.
    """

    effective_learning_rate: jax.Array
    noise_power: jax.Array
    dispersion: jax.Array
    curvature_trace: jax.Array


@checked
def landscape_dependent_noise(
    loss_fn: LossFn,
    params: Params,
    mean_grads: Params,
    *batch: Tree,
    learning_rate: ArrayLike,
    chunk_size: int | None = None,
) -> LandscapeNoiseResult:
    """Splits the step of the mean weights w_a into descent on the full loss and noise.

        w_a - lr g_a = w_a - alpha_e g + eta,   alpha_e = lr <g_a, g> / ||g||^2,   <eta, g> = 0

    Here g_a is the mean of the gradients that the learners took at their own weights, and g the
    gradient of the full loss at w_a. To leading order E g_a - g is the gradient of half the
    `curvature_trace` with respect to the weights, with fixed deviations from the mean. For
    synchronous SGD E alpha_e = lr; for learners that spread over a rough landscape it is less. On a
    quadratic loss alpha_e does not depend on the spread. Pass the full data: a mini-batch would add
    its noise to ||g||^2 and make alpha_e too small.

    This costs a gradient and n Hessian products on the batch. Inside `jax.jit` the products cost
    nothing if `curvature_trace` is not used.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> params = jnp.array([[1.0], [3.0]])  # two learners, whose mean is 2
      >>> mean_grads = jax.vmap(jax.grad(loss_fn))(params).mean(0)
      >>> result = diagnostics.landscape_dependent_noise(
      ...     loss_fn, params, mean_grads, learning_rate=0.1
      ... )
      >>> print(f"{result.effective_learning_rate:.2f} {result.dispersion:.2f}")
      0.10 1.00

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over the examples.
      params: stacked tree with leaves (n, ...), the weights w_j of n learners before the step.
      mean_grads: tree of leaves (...), g_a: `transforms.mean_params` of the stacked gradients.
      *batch: arrays with a leading axis of examples, the full data.
      learning_rate: lr of plain SGD.
      chunk_size: number of examples per pass, for bounded memory; None: all at once.

    Returns:
      A `LandscapeNoiseResult`.

    Raises:
      ValueError: `params` is not stacked like `mean_grads`, `learning_rate` is negative, or the
        loss is no scalar or cannot be split in chunks.
      TypeError: a parameter is not real floating point.

    References:
      W. Zhang et al. (2021), arXiv:2112.01433, for the quantities. The identities and the Hessian
      term are ours.
    """
    _checks.number("learning_rate", learning_rate)
    _checks.floating_tree("mean_grads", mean_grads)
    leaves = jax.tree.leaves(_checks.floating_tree("params", params))
    _checks.same_tree("params", params, mean_grads, leading=jnp.shape(leaves[0])[:1] or (1,))
    center, deviations = _centered(params)
    loss_fn, chunk_size = _chunks.prepared(loss_fn, center, batch, chunk_size)
    gradient = _chunks.mean(Partial(_gradient, loss_fn), center, batch, chunk_size)
    hessian = curvature.hessian(loss_fn, center, *batch, chunk_size=chunk_size)
    return _split_step(
        mean_grads, gradient, deviations, hessian.matmat(deviations), jnp.asarray(learning_rate)
    )


@jax.jit
def _centered(params: Params) -> tuple[Params, Params]:
    """Computes the mean over the learners, and the deviations from it in float32 at least."""
    means = jax.tree.map(lambda leaf: _tree.mean_rows(_tree.wide(leaf)), params)
    deviations = jax.tree.map(lambda leaf, mean: _tree.wide(leaf) - mean[None], params, means)
    center = jax.tree.map(lambda leaf, mean: mean.astype(leaf.dtype), params, means)
    return center, deviations


def _gradient(loss_fn: Partial, params: Params, *batch: Tree) -> Params:
    return jax.grad(lambda p: loss_fn(p, *batch))(params)


@jax.jit
def _split_step(
    mean_grads: Params,
    gradient: Params,
    deviations: Params,
    products: Params,
    learning_rate: jax.Array,
) -> LandscapeNoiseResult:
    norm, direction = _numerics.scaled_norm(gradient), _numerics.unit(gradient)
    rate = learning_rate.astype(norm.dtype)
    effective = rate * _numerics.divide(_tree.inner(mean_grads, direction), norm)
    noise = jax.tree.map(
        lambda a, g: (
            effective.astype(_tree.wide_dtype(g)) * _tree.wide(g)
            - rate.astype(_tree.wide_dtype(a)) * _tree.wide(a)
        ),
        mean_grads,
        gradient,
    )
    num = len(jax.tree.leaves(deviations)[0])
    return LandscapeNoiseResult(
        effective_learning_rate=jnp.where(norm > 0, effective, jnp.nan),
        noise_power=_tree.inner(noise, noise),
        dispersion=_numerics.scaled_norm(deviations) / math.sqrt(num),
        curvature_trace=_tree.inner(deviations, products) / num,
    )
