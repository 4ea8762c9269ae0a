"""What batch norm regularises: the quadratic constraint that it puts on a plain layer."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from regjax import _checks, _numerics, _tree
from regjax._arguments import checked
from regjax._one_program import one_program
from regjax._printing import legible


@legible
class BatchNormResult(NamedTuple):
    """A batch-normalized layer as a plain layer with a penalty; k units.

    Attributes:
      equivalent_kernel: (d, k), w~ = scale w / sqrt(w' Sigma w + epsilon).
      equivalent_bias: (k,), bias - w~' mean.
      multiplier: (k,), lambda of the penalty lambda (w~' Sigma w~) of which the unit is at a
        minimum, in units of the loss over the squared outputs. A penalty with a factor 1/2 has
        twice this value. It is meaningful only if `relative_residual` is small.
      relative_residual: (k,), |g + 2 lambda Sigma w~| / |g|, 0 at a minimum along the constraint.
      isotropic_rate: (k,), lambda tr(Sigma) / d, the strength of a plain decay |w~|^2 of equal
        mean.
      signal_penalty: (k,), lambda w~' (Sigma - Sigma_noise) w~.
      noise_penalty: (k,), lambda w~' Sigma_noise w~, which is weight decay if the noise is
        isotropic.
    """

    equivalent_kernel: jax.Array
    equivalent_bias: jax.Array
    multiplier: jax.Array
    relative_residual: jax.Array
    isotropic_rate: jax.Array
    signal_penalty: jax.Array
    noise_penalty: jax.Array


@checked
def batch_norm_regularization(
    kernel: jax.Array,
    scale: ArrayLike,
    bias: ArrayLike,
    mean: jax.Array,
    covariance: jax.Array,
    grad: jax.Array,
    *,
    epsilon: float = 0.0,
    noise_covariance: jax.Array | None = None,
) -> BatchNormResult:
    """Expresses units before a batch norm as plain units with a data-dependent penalty.

    A unit with the kernel w, followed by batch norm with a fixed scale, computes the same as a
    plain unit with the kernel

        w~ = scale w / sqrt(w' Sigma w + epsilon)

    where Sigma is the covariance of the inputs. So training w minimises the loss of w~ under the
    constraint w~' Sigma w~ = scale^2 (for epsilon = 0). At the minimum the gradient g of the loss
    with respect to w~ balances the constraint, with the multiplier

        lambda = -<w~, g> / (2 w~' Sigma w~)

    lambda is positive if the scale is below the one that the loss alone would choose, and zero if
    scale and bias are trained to their optimum.

    Example:
      >>> kernel, grad = jnp.array([[1.0], [0.0]]), jnp.array([[-4.0], [0.0]])  # of one unit
      >>> result = diagnostics.batch_norm_regularization(
      ...     kernel, 2.0, 0.0, jnp.zeros(2), jnp.eye(2), grad
      ... )
      >>> print(result.equivalent_kernel.ravel(), result.multiplier, result.relative_residual)
      [2. 0.] [1.] [0.]

    Args:
      kernel: (d, k), w of k units.
      scale: (k,) or a number, gamma of the batch norm.
      bias: (k,) or a number, beta of the batch norm.
      mean: (d,), mean of the inputs.
      covariance: (d, d), biased covariance Sigma of the inputs, noise included.
      grad: (d, k), gradient of the mean loss with respect to w~ (not w), with constant statistics.
      epsilon: that of the batch norm.
      noise_covariance: (d, d), the part of Sigma that is noise, independent of the signal; None:
        zero.

    Returns:
      A `BatchNormResult`; zero kernels and gradients give zeros.

    Raises:
      ValueError: a shape does not fit, or `epsilon` is negative.
      TypeError: an array is not real floating point.

    References:
      A derivation of our own on the question of A. Annamalai, N. Thakur (2022), arXiv:2209.07587.
      No constant is the paper's.
    """
    _checks.number("epsilon", epsilon)
    kernel = _tree.wide(_checks.floating_array("kernel", kernel))
    for name, given in (("scale", scale), ("bias", bias)):
        _checks.real(name, given)
    if kernel.ndim != 2:
        raise ValueError(f"`kernel` must have shape (d, k), got {kernel.shape}.")
    size, units = kernel.shape
    noise = jnp.zeros_like(covariance) if noise_covariance is None else noise_covariance
    for name, array, shape in (
        ("mean", mean, (size,)),
        ("covariance", covariance, (size, size)),
        ("noise_covariance", noise, (size, size)),
        ("grad", grad, (size, units)),
    ):
        if jnp.shape(_checks.floating_array(name, array)) != shape:
            raise ValueError(f"`{name}` must have shape {shape}, got {jnp.shape(array)}.")
    covariance, noise, grad = (jnp.asarray(a, kernel.dtype) for a in (covariance, noise, grad))
    scale, bias = (jnp.broadcast_to(jnp.asarray(a, kernel.dtype), units) for a in (scale, bias))

    return _found(
        kernel, scale, bias, jnp.asarray(mean, kernel.dtype), covariance, grad, epsilon, noise
    )


@one_program()
def _found(
    kernel: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    mean: jax.Array,
    covariance: jax.Array,
    grad: jax.Array,
    epsilon: ArrayLike,
    noise: jax.Array,
) -> BatchNormResult:
    def along(one: jax.Array, other: jax.Array) -> jax.Array:
        return jnp.sum(one * other, 0)

    variance = along(kernel, covariance @ kernel) + epsilon
    equivalent = kernel * _numerics.divide(scale, jnp.sqrt(variance))[None]
    spread = covariance @ equivalent
    multiplier = _numerics.divide(-along(equivalent, grad), 2 * along(equivalent, spread))
    remainder = grad + 2 * multiplier[None] * spread
    norm = lambda matrix: _numerics.norms_along(matrix, (0,))[0]
    noise_penalty = multiplier * along(equivalent, noise @ equivalent)
    return BatchNormResult(
        equivalent_kernel=equivalent,
        equivalent_bias=bias - mean @ equivalent,
        multiplier=multiplier,
        relative_residual=_numerics.divide(norm(remainder), norm(grad)),
        isotropic_rate=multiplier * jnp.trace(covariance) / len(covariance),
        signal_penalty=multiplier * along(equivalent, spread) - noise_penalty,
        noise_penalty=noise_penalty,
    )
