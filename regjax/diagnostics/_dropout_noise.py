"""Whether dropout's gradient noise points where the loss is curved."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from regjax import _checks, _chunks, _numerics, curvature
from regjax._arguments import checked
from regjax._base import LossFn, Params, PRNGKey, Tree
from regjax._finite import check_product
from regjax._printing import legible


@legible
class DropoutNoiseResult(NamedTuple):
    """Covariance Sigma of dropout's gradient over K masks, and the Hessian H of n parameters.

    Numbers that depend on Sigma alone, and `curvatures` and `product_trace`, are exact for these
    masks. The standard errors of the others are over the random probes.

    Attributes:
      eigenvalues: (d,), the largest of Sigma, from above.
      eigenvectors: tree like the parameters with a leading axis d, orthonormal; 0 where the
        eigenvalue is at rounding level.
      curvatures: (d,), v' H v along them; NaN where the eigenvalue is at rounding level.
      noise_trace: (), tr Sigma.
      noise_norm: (), ||Sigma||_F.
      product_trace: (), tr(H Sigma).
      hessian_trace: (), tr H, estimated.
      hessian_trace_standard_error: (), NaN with a single probe, as are those below.
      hessian_norm: (), ||H||_F, estimated.
      hessian_norm_standard_error: ().
      alignment: (), tr(H Sigma) / (||H|| ||Sigma||), the cosine of the two matrices.
      alignment_standard_error: ().
      null_alignment: (), mean alignment if Sigma's eigenvectors were random.
      null_alignment_standard_error: ().
      null_std: (), standard deviation of the alignment over such random eigenvectors.
    """

    eigenvalues: jax.Array
    eigenvectors: Params
    curvatures: jax.Array
    noise_trace: jax.Array
    noise_norm: jax.Array
    product_trace: jax.Array
    hessian_trace: jax.Array
    hessian_trace_standard_error: jax.Array
    hessian_norm: jax.Array
    hessian_norm_standard_error: jax.Array
    alignment: jax.Array
    alignment_standard_error: jax.Array
    null_alignment: jax.Array
    null_alignment_standard_error: jax.Array
    null_std: jax.Array


@checked
def dropout_noise_alignment(
    loss_fn: LossFn,
    dropout_loss_fn: Callable[[Params, PRNGKey], jax.Array],
    params: Params,
    *batch: Tree,
    key: PRNGKey,
    num_samples: int,
    num_directions: int,
    num_probes: int = 32,
    chunk_size: int | None = None,
) -> DropoutNoiseResult:
    """Compares the covariance of dropout's gradient noise with the Hessian of a loss.

        alignment = tr(H Sigma) / (||H||_F ||Sigma||_F)
        null      = tr H tr Sigma / (n ||H||_F ||Sigma||_F)

    Here Sigma is the covariance of the gradient over K dropout masks, and H the Hessian of n
    parameters. Two positive matrices that have nothing in common have a positive alignment too:
    `null` is its mean, and `null_std` its spread, if Sigma keeps its eigenvalues and has random
    eigenvectors. An alignment above them means that the directions agree.

    Because Sigma has only K masks, ||Sigma||_F is too large by about
    (tr Sigma)^2 / (2 K ||Sigma||_F), and alignment and null are too small by the same factor. Their
    ratio, n tr(H Sigma) / (tr H tr Sigma), does not have this error. The costs are K gradients,
    K + `num_probes` Hessian products, and memory for each of these vectors.

    Example:
      >>> loss_fn = lambda w: 0.5 * jnp.sum(w**2)
      >>> def dropout_loss_fn(w, key):  # the gradient is 4 w or 0, of variance 4 at w = 1
      ...     return 0.5 * jnp.sum((2.0 * jax.random.bernoulli(key, 0.5, w.shape) * w) ** 2)
      >>> result = diagnostics.dropout_noise_alignment(
      ...     loss_fn, dropout_loss_fn, jnp.ones(2), key=jax.random.key(0), num_samples=200,
      ...     num_directions=1,
      ... )
      >>> print(f"{result.noise_trace:.0f} {result.hessian_trace:.0f}")
      8 2

    Args:
      loss_fn: (params, *batch) -> scalar, the mean loss without dropout.
      dropout_loss_fn: (params, key) -> scalar, the mean loss under the mask that `key` draws. Bind
        the data as arguments: `jax.tree_util.Partial(loss, inputs=...)`.
      params: tree of n real floating-point parameters.
      *batch: arrays with a leading axis of examples, for `loss_fn`.
      key: typed key. The masks are those of `curvature.dropout_covariance` with the first key of
        `jax.random.split(key)`.
      num_samples: K, number of masks, at least 2.
      num_directions: d, number of eigenvectors, at most K - 1.
      num_probes: number of random probes for the trace and the norm of H.
      chunk_size: number of examples per pass in the Hessian; None: all at once.

    Returns:
      A `DropoutNoiseResult`.

    Raises:
      ValueError: a count is out of its range, or a loss is no scalar or cannot be split.
      TypeError: a parameter is not real floating point, or `key` is not a typed key.

    References:
      Z. Zhang et al., arXiv:2111.01022 and the first version of arXiv:2207.05952, for the question.
      The alignment as a cosine, its null model and all errors are ours.
    """
    _checks.integer("num_samples", num_samples, minimum=2)
    _checks.integer(
        "num_directions", num_directions, maximum=(num_samples - 1, "`num_samples` less one")
    )
    _checks.integer("num_probes", num_probes)
    loss_fn, chunk_size = _chunks.prepared(loss_fn, params, batch, chunk_size)
    mask_key, probe_key = jax.random.split(_checks.key("key", key))
    factor = curvature.dropout_covariance_factor(
        dropout_loss_fn, params, key=mask_key, num_samples=num_samples
    )
    probes = jax.random.rademacher(probe_key, (num_probes, factor.shape[1]), factor.dtype)
    rows = jnp.concatenate([factor, probes])
    hessian = curvature.hessian(loss_fn, params, *batch, chunk_size=chunk_size)
    space = hessian.space
    images = hessian.block_product(space.shard(rows))
    check_product(hessian, images, vectors=rows, name="loss_fn")
    images = space.gather(images)
    vectors, found = _compare(factor, probes, images, num_directions)
    return DropoutNoiseResult(eigenvectors=_trees(space, vectors), **found)


@functools.partial(jax.jit, static_argnums=3)
def _compare(
    factor: jax.Array, probes: jax.Array, images: jax.Array, num_directions: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    num_masks, size = factor.shape
    gram, product = _dot(factor, factor), _dot(factor, images[:num_masks])
    eigenvalues, vectors, curvatures = _principal(factor, gram, product, num_directions)
    noise_trace, noise_norm = jnp.trace(gram), _numerics.scaled_norm(gram)
    # Of the same probes, so that the errors of trace and norm are known together.
    forms = jnp.sum(probes * images[num_masks:], 1)
    squares = jnp.sum(images[num_masks:] ** 2, 1)
    hessian_trace, trace_error = _numerics.mean_and_error(forms)
    hessian_norm = jnp.sqrt(jnp.mean(squares))
    norm_errors = (squares - hessian_norm**2) / (2 * hessian_norm)
    _, norm_error = _numerics.mean_and_error(norm_errors)
    alignment = jnp.trace(product) / (hessian_norm * noise_norm)
    per_null = noise_trace / (size * noise_norm * hessian_norm)
    null_errors = per_null * (forms - hessian_trace * norm_errors / hessian_norm)
    _, null_error = _numerics.mean_and_error(null_errors)
    return vectors, {
        "eigenvalues": eigenvalues,
        "curvatures": curvatures,
        "noise_trace": noise_trace,
        "noise_norm": noise_norm,
        "product_trace": jnp.trace(product),
        "hessian_trace": hessian_trace,
        "hessian_trace_standard_error": trace_error,
        "hessian_norm": hessian_norm,
        "hessian_norm_standard_error": norm_error,
        "alignment": alignment,
        "alignment_standard_error": jnp.abs(alignment) * norm_error / hessian_norm,
        "null_alignment": per_null * hessian_trace,
        "null_alignment_standard_error": null_error,
        "null_std": _null_std(size, hessian_trace / hessian_norm, noise_trace / noise_norm),
    }


def _principal(
    factor: jax.Array, gram: jax.Array, product: jax.Array, num_directions: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes leading eigenpairs of R' R and the curvatures along them.

    From R R' = W diag(values) W':  v = R' w / sqrt(value).
    """
    values, weights = jnp.linalg.eigh(gram)
    values, weights = values[::-1][:num_directions], weights[:, ::-1][:, :num_directions]
    # What is below is rounding: masks beyond the rank, or none that drops anything.
    sound = ~(values <= len(gram) * jnp.finfo(values.dtype).eps * values[0])
    roots = jnp.sqrt(jnp.where(sound, values, 1))
    vectors = _numerics.divide(_dot(weights.T, factor.T), roots[:, None], where=sound[:, None])
    forms = jnp.sum(weights * _dot(product, weights.T), 0)
    return values, vectors, _numerics.divide(forms, values, where=sound, otherwise=jnp.nan)


def _null_std(size: int, hessian_share: jax.Array, noise_share: jax.Array) -> jax.Array:
    """Computes the standard deviation of the alignment over random rotations of one matrix.

    For symmetric A and B without trace and Q uniform among the rotations, tr(A Q B Q') has the
    variance 2 ||A||^2 ||B||^2 / ((n - 1) (n + 2)), by Schur's lemma. A share is trace over norm.
    """
    without_trace = (1 - hessian_share**2 / size) * (1 - noise_share**2 / size)
    # The estimated trace may pass the bound that the true one keeps. The product is no int32.
    pairs = float(max(size - 1, 1) * (size + 2))
    return jnp.sqrt(2 * jnp.maximum(without_trace, 0) / pairs)


def _dot(one: jax.Array, other: jax.Array) -> jax.Array:
    """Computes the inner products of the rows of two matrices."""
    return jnp.matmul(one, other.T, precision="highest")


@functools.partial(jax.jit, static_argnums=0)
def _trees(space: curvature.Space, rows: jax.Array) -> Params:
    return space.unravel_rows(rows)
