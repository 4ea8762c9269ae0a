"""The covariance of the gradient over dropout masks, from sampled gradients."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from regjax import _checks, _chunks
from regjax._arguments import checked
from regjax._base import Mask, Params, PRNGKey, check_scalar
from regjax._losses import Whole, whole
from regjax._space import Space
from regjax._subsets import part_of
from regjax.curvature._operators._curvature import trace
from regjax.curvature._operators._matvec import matvec_operator
from regjax.curvature._operators._operator import Operator
from regjax.curvature._precision import precision


@checked
def dropout_covariance(
    dropout_loss_fn: Callable[..., Any],
    params: Params,
    *,
    key: PRNGKey,
    num_samples: int,
    wrt: Mask = None,
) -> Operator:
    """Estimates the covariance of dropout's gradient noise from sampled masks.

        Sigma v = 1 / K sum_k (g_k - mean g) <g_k - mean g, v>,    g_k = grad R_drop under mask k

    The K = `num_samples` gradients are computed once, one at a time, and kept; a product takes 4 K
    n operations and no pass over the network. The mean of ||g_k||^2 is ||mean g||^2 + tr Sigma
    exactly; `regularizers.dropout_gradient_penalty` with the same key is lr / 4 times that.

    How far it is from the covariance over all masks: its mean over draws is (K - 1) / K times that,
    its rank is at most K - 1, and a quadratic form v' Sigma v has a relative standard error of
    about sqrt(2 / K), more with noise of heavier tails than a normal distribution's. The trace
    averages over directions and is better than that. The largest eigenvalue, whose direction is
    fitted to the draws, comes out too large: by about (1 + sqrt(d / K))^2 with d directions of like
    size.

    Example:
      >>> def dropout_loss_fn(w, key):  # each weight is kept with probability 1/2
      ...     return jnp.sum(w * jax.random.bernoulli(key, 0.5, w.shape))
      >>> options = {"key": jax.random.key(0), "num_samples": 99}
      >>> noise = curvature.dropout_covariance(dropout_loss_fn, jnp.ones(2), **options)
      >>> print(f"{jnp.trace(noise.dense()):.1f}")  # 2 * 1/2 * 1/2
      0.5

    Args:
      dropout_loss_fn: (params, key) -> scalar, the mean loss under the mask of `key`. Data are
        bound as arguments: `jax.tree_util.Partial(loss, inputs=...)`.
      params: tree of real floating-point parameters, n in all.
      key: typed key; the masks are those of `jax.random.split(key, num_samples)`.
      num_samples: number of sampled masks, at least 2.
      wrt: which leaves of the parameters the matrix is of (see `hessian`).

    Returns:
      An `Operator` of shape (n, n), in squared units of the gradient.

    Raises:
      ValueError: the loss is not a scalar, or `num_samples` is below 2.
      TypeError: a parameter is not real floating point, or `key` is not a typed key.

    References:
      Z. Zhang, Z.-Q. Xu (2024), Implicit regularization of dropout, arXiv:2207.05952, whose R2
      holds its trace. The estimate and its errors are ours.
    """
    dropout_loss_fn, params = part_of(dropout_loss_fn, params, wrt)
    factor = dropout_covariance_factor(dropout_loss_fn, params, key=key, num_samples=num_samples)
    return matvec_operator(Partial(_multiply, factor), params, is_positive=True)


@checked
def dropout_covariance_factor(
    dropout_loss_fn: Callable[..., Any], params: Params, *, key: PRNGKey, num_samples: int
) -> jax.Array:
    """Computes rows R whose R' R is the `dropout_covariance` of the same key.

    A function of that matrix is exact by way of the small R R' (K, K).

    Example:
      >>> def dropout_loss_fn(w, key):  # each weight is kept with probability 1/2
      ...     return jnp.sum(w * jax.random.bernoulli(key, 0.5, w.shape))
      >>> options = {"key": jax.random.key(0), "num_samples": 99}
      >>> rows = curvature.dropout_covariance_factor(dropout_loss_fn, jnp.ones(2), **options)
      >>> print(rows.shape, f"{jnp.sum(rows**2):.1f}")  # the trace, 2 * 1/2 * 1/2
      (99, 2) 0.5

    Args:
      dropout_loss_fn: (params, key) -> scalar, the mean loss under the mask of `key`.
      params: tree of real floating-point parameters, n in all.
      key: typed key; the masks are those of `jax.random.split(key, num_samples)`.
      num_samples: K, at least 2.

    Returns:
      (K, n), rows (g_k - mean g) / sqrt(K) in the order of `jax.tree.leaves(params)`.

    Raises:
      ValueError: the loss is not a scalar, or `num_samples` is below 2.
      TypeError: a parameter is not real floating point, or `key` is not a typed key.
    """
    _checks.integer("num_samples", num_samples, minimum=2)
    _checks.floating_tree("params", params)
    loss = _traced(dropout_loss_fn, params, _checks.key("key", key))
    keys = jax.random.split(key, num_samples)
    return _centred(_chunks.each(Partial(_gradient, loss), params, (keys,), 1))


def _traced(dropout_loss_fn: Callable[..., Any], params: Params, key: PRNGKey) -> Whole:
    loss = trace(dropout_loss_fn, (params, key))
    check_scalar(loss.outputs(params, key), name="dropout_loss_fn")
    return whole(loss)


def _gradient(dropout_loss_fn: Whole, params: Params, keys: jax.Array) -> jax.Array:
    with precision():
        gradient = jax.grad(dropout_loss_fn)(params, keys[0])
    return Space.of(params).ravel(gradient)[None]


@jax.jit
def _centred(rows: jax.Array) -> jax.Array:
    # Less one of them first: equal gradients give 0 exactly, and a large mean rounds nothing off.
    rows = rows - rows[:1]
    scale = jnp.sqrt(jnp.asarray(rows.shape[0], rows.dtype))
    return (rows - jnp.mean(rows, 0, keepdims=True)) / scale


def _multiply(factor: jax.Array, vector: Params) -> Params:
    space = Space.of(vector)
    return space.unravel((factor @ space.ravel(vector, factor.dtype)) @ factor)
