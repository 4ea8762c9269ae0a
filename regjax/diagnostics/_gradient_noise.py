"""How noisy the gradient of a batch is, beside the gradient itself."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from regjax import _checks, _chunks, _numerics, _tree
from regjax._arguments import checked
from regjax._base import LossFn, Params, Tree, couples_examples
from regjax._printing import legible
from regjax.curvature import Operator


@legible
class NoiseScaleResult(NamedTuple):
    """The gradient G on all data, the covariance Sigma of its examples, and their ratio.

    Attributes:
      squared_gradient_norm: (), |G|^2, without the part that noise adds. It is below zero if noise
        hides it.
      squared_gradient_norm_standard_error: (), NaN if there are too few numbers for an error, as
        are those below.
      noise_trace: (), tr Sigma.
      noise_trace_standard_error: ().
      gradient_noise_scale: (), tr Sigma / |G|^2, a number of examples; NaN unless |G|^2 is above 0.
      gradient_noise_scale_standard_error: (), to first order.
      resolved: (), bool: |G|^2 is above twice its standard error. If not, the noise scale is known
        from below at most.
    """

    squared_gradient_norm: jax.Array
    squared_gradient_norm_standard_error: jax.Array
    noise_trace: jax.Array
    noise_trace_standard_error: jax.Array
    gradient_noise_scale: jax.Array
    gradient_noise_scale_standard_error: jax.Array
    resolved: jax.Array


@checked
def noise_scale(
    small_squared_norms: ArrayLike,
    large_squared_norms: ArrayLike,
    *,
    small_batch_size: int,
    large_batch_size: int,
) -> NoiseScaleResult:
    """Estimates the gradient noise scale from norms of gradients at two batch sizes.

        |G|^2    = (B |G_B|^2 - b |G_b|^2) / (B - b)
        tr Sigma = (|G_b|^2 - |G_B|^2) / (1 / b - 1 / B)

    Here G_b and G_B are gradients on batches of b and B independent examples. Both estimates are
    unbiased. The noise scale tr Sigma / |G|^2 is the ratio of their means over all pairs of
    batches. It is the batch size at which noise and gradient are equally large. The norms come for
    free where gradients are averaged, over devices or over the micro-batches of a step.

    Example:
      >>> squared_norms = jnp.array([8.0, 8.0]), jnp.array([5.0, 5.0])  # 4 + 8 / 2 and 4 + 8 / 8
      >>> result = diagnostics.noise_scale(*squared_norms, small_batch_size=2, large_batch_size=8)
      >>> print(result.squared_gradient_norm, result.noise_trace, result.gradient_noise_scale)
      4.0 8.0 2.0

    Args:
      small_squared_norms: |G_b|^2, (pairs,), or (pairs, m) with m small batches in each pair.
      large_squared_norms: |G_B|^2, (pairs,), each at the same weights as the small ones.
      small_batch_size: b, number of examples in a small batch.
      large_batch_size: B, number of examples in a large batch, above b. The small batches may be
        its parts.

    Returns:
      A `NoiseScaleResult`. Its errors are over the pairs, as if these were independent.

    Raises:
      ValueError: `large_batch_size` is not above `small_batch_size`, the arrays do not fit each
        other, or a number is negative or not finite.
      TypeError: an array is not real floating point.

    References:
      S. McCandlish, J. Kaplan, D. Amodei (2018), arXiv:1812.06162, appendix A.1.
    """
    small = _tree.wide(_checks.floating_array("small_squared_norms", small_squared_norms))
    large = _tree.wide(_checks.floating_array("large_squared_norms", large_squared_norms))
    _checks.non_negative("small_squared_norms", small, finite=True)
    _checks.non_negative("large_squared_norms", large, finite=True)
    if (
        large.ndim != 1
        or small.ndim not in (1, 2)
        or small.shape[:1] != large.shape
        or not small.size
    ):
        raise ValueError(
            "`small_squared_norms` must have shape (pairs,) or (pairs, m) beside "
            f"`large_squared_norms` of shape (pairs,), got {small.shape} and {large.shape}."
        )
    _check_sizes(small_batch_size, large_batch_size)
    dtype = jnp.result_type(small, large)
    small = jnp.mean(small.astype(dtype), axis=1) if small.ndim == 2 else small.astype(dtype)
    squares, traces = _estimates(small, large.astype(dtype), small_batch_size, large_batch_size)
    square, square_error = _numerics.mean_and_error(squares)
    trace, trace_error = _numerics.mean_and_error(traces)
    scale = _ratio(trace, square)
    _, scale_error = _numerics.mean_and_error((traces - scale * squares) / square)
    return NoiseScaleResult(
        square, square_error, trace, trace_error, scale, scale_error, square > 2 * square_error
    )


@checked
def gradient_noise(
    loss_fn: LossFn,
    params: Params,
    *batch: Tree,
    batch_size: int,
    metric: Operator | None = None,
) -> NoiseScaleResult:
    """Measures the gradient noise scale at some weights, from small batches and from all data.

        gradient noise scale = tr Sigma / |G|^2

    G is the gradient on all N examples, and Sigma the covariance of single examples' gradients. The
    estimates are those of `noise_scale` with B = N, and their errors come from leaving one batch
    out at a time. Costs two passes of gradients, and with a `metric` one product per batch.

    With a metric H, squared norms are g'H g, and the noise scale is tr(H Sigma) / G'H G. If H is
    the Hessian, it is the batch size at which noise takes as much from a step of the best length as
    the gradient gains.

    Example:
      >>> loss_fn = lambda w, x: 0.5 * jnp.mean((w - x) ** 2)
      >>> x = jnp.array([1.0, 3.0, 1.0, 3.0])  # of variance 4 / 3
      >>> result = diagnostics.gradient_noise(loss_fn, jnp.array(0.0), x, batch_size=1)
      >>> print(f"{result.noise_trace:.3f} {result.gradient_noise_scale:.3f}")
      1.333 0.364

    Args:
      loss_fn: (params, *batch) -> scalar, the mean over independent examples.
      params: tree of real floating-point parameters.
      *batch: arrays with a leading axis of N examples.
      batch_size: b, which divides N into at least two batches. Batches are taken in order: shuffle
        data that are sorted.
      metric: H, an operator of the parameters such as `curvature.hessian(...)`; None: the identity.

    Returns:
      A `NoiseScaleResult`. With only two batches the errors are NaN.

    Raises:
      ValueError: `batch_size` is the number of examples or does not divide it, `metric` has other
        parameters, or the loss is not a mean over independent examples.
      TypeError: a parameter is not real floating point, or `metric` is not an operator.

    References:
      S. McCandlish, J. Kaplan, D. Amodei (2018), arXiv:1812.06162, appendix A.1: their noise scale
      with the Hessian as `metric`, their simple noise scale without. The errors are ours.
    """
    if couples_examples(loss_fn):
        raise ValueError(
            "`loss_fn` must not couple the examples of a batch (batch norm or dropout in train "
            'mode), got one that does; use mode="evaluation".'
        )
    num_examples = _checks.num_examples(batch)
    _check_sizes(batch_size, num_examples, names=("batch_size", "the number of examples"))
    if num_examples % batch_size:
        raise ValueError(
            f"`batch_size` must divide the number of examples, {num_examples}, got {batch_size}."
        )
    if metric is not None:
        if not isinstance(metric, Operator):
            raise TypeError(f"`metric` must be an operator, got {type(metric).__name__}.")
        _checks.same_tree("metric", metric.space.like(), params)
    loss_fn, size = _chunks.prepared(loss_fn, params, batch, batch_size)
    mean = _chunks.mean(Partial(_gradient, loss_fn), params, batch, size)
    image = mean if metric is None else metric.matvec(mean)
    measure = Partial(_of_batch, loss_fn, image, metric)
    squares, along = (rows[::batch_size] for rows in _chunks.each(measure, params, batch, size))
    return _left_out(squares, along, _tree.inner(mean, image), batch_size)


def _check_sizes(
    small: int, large: int, names: tuple[str, str] = ("small_batch_size", "`large_batch_size`")
) -> None:
    _checks.integer(names[0], small)
    if names[0] == "small_batch_size":
        _checks.integer("large_batch_size", large)
    if small >= large:
        raise ValueError(
            f"`{names[0]}` must be below {names[1]}, {large}, got {small}: the noise shows in the "
            "difference of two batch sizes."
        )


def _estimates(
    small: jax.Array, large: jax.Array, small_size: float, large_size: float
) -> tuple[jax.Array, jax.Array]:
    """|G|^2 and tr Sigma."""
    squares = (large_size * large - small_size * small) / (large_size - small_size)
    return squares, (small - large) / (1 / small_size - 1 / large_size)


def _ratio(trace: jax.Array, square: jax.Array) -> jax.Array:
    return _numerics.divide(trace, square, where=square > 0, otherwise=jnp.nan)


def _left_out(
    squares: jax.Array, along: jax.Array, whole: jax.Array, batch_size: int
) -> NoiseScaleResult:
    """Estimates from |G_j|^2, <G_j, G> and |G|^2 of m batches, with their jackknife errors."""
    m = len(squares)
    square, trace = _estimates(jnp.mean(squares), whole, batch_size, m * batch_size)
    # Without batch j: the mean of the other squares, and the square of the other gradients' mean.
    rest = jnp.mean(squares) + (jnp.mean(squares) - squares) / (m - 1)
    others = whole + (2 * m * (whole - along) + squares - whole) / (m - 1) ** 2
    if m > 2:
        each = _estimates(rest, others, batch_size, (m - 1) * batch_size)
    else:
        each = (jnp.full_like(squares, jnp.nan),) * 2
    error = lambda values: jnp.sqrt((m - 1) / m * jnp.sum((values - jnp.mean(values)) ** 2))
    square_error = error(each[0])
    scale = _ratio(trace, square)
    scale_error = error((each[1] - scale * each[0]) / square)
    return NoiseScaleResult(
        square, square_error, trace, error(each[1]), scale, scale_error, square > 2 * square_error
    )


def _gradient(loss_fn: LossFn, params: Params, *batch: Tree) -> Params:
    return jax.grad(lambda params: loss_fn(params, *batch))(params)


def _of_batch(
    loss_fn: LossFn, image: Params, metric: Operator | None, params: Params, *batch: Tree
) -> tuple[jax.Array, jax.Array]:
    """|g|^2 and <g, G> of the gradient g of a batch, the same for each of its examples."""
    gradient = _gradient(loss_fn, params, *batch)
    own = gradient if metric is None else metric.matvec(gradient)
    numbers = _tree.inner(gradient, own), _tree.inner(gradient, image)
    num_examples = _checks.num_examples(batch)
    square, along = (jnp.full(num_examples, number) for number in numbers)
    return square, along
