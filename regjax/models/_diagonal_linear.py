"""Diagonal linear networks: sparse regression whose gradient flow is known in closed form.

The weights are w = u^N - v^N, entry by entry. With L = (1 / n) ||X w - y||^2, without 1/2, and
r = (2 / n) X'(X w - y), gradient descent of rate eta is

    u <- u - eta N r u^(N - 1),   v <- v + eta N r v^(N - 1)

The formulas here are those of its gradient flow from u = v = alpha; descent leaves them by O(eta).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from regjax import _checks
from regjax._nnx_module import Module
from regjax._printing import legible


@legible
class EarlyStoppingResult(NamedTuple):
    """The steps of descent between which to stop, to leading order.

    Attributes:
      first: (), the step at which the smallest signal has reached half its size.
      last: (), the step at which a coordinate that fits noise has grown from alpha to sqrt(alpha).
    """

    first: jax.Array
    last: jax.Array


class DiagonalLinear(Module):
    """Builds a diagonal linear network: linear regression with the weights u^N - v^N, or u^N alone.

    The parameters are `u` and, if `signed`, `v`. All their entries start at alpha = `init_scale`,
    so that the weights start at 0, or at alpha^N without v. Compare networks of different depths at
    equal alpha^N.

    Example:
      >>> module = models.DiagonalLinear(3, depth=2, init_scale=0.1)
      >>> module.u[...] = jnp.array([2.0, 0.1, 0.1])
      >>> print(module(jnp.eye(3)))  # 2^2 - 0.1^2, and 0
      [3.99 0.   0.  ]

    Args:
      num_inputs: p, number of features.
      depth: N, at least 2.
      init_scale: alpha, positive.
      signed: whether weights may be negative.
      param_dtype: of the parameters.

    Raises:
      ValueError: a number is out of its range.
      TypeError: `num_inputs` or `depth` is not a Python integer.

    References:
      J. Li, T. Nguyen, C. Hegde, R. Wong (2021), arXiv:2108.05574.
    """

    def __init__(
        self,
        num_inputs: int,
        *,
        depth: int,
        init_scale: float,
        signed: bool = True,
        param_dtype: DTypeLike = jnp.float32,
    ):
        _checks.integer("num_inputs", num_inputs)
        self.depth = _checks.integer("depth", depth, minimum=2)
        _checks.positive("init_scale", init_scale)
        start = jnp.full(num_inputs, init_scale, param_dtype)
        self.u = nnx.Param(start)
        self.v = nnx.Param(start) if signed else None

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Computes predictions (batch,) of inputs (batch, num_inputs)."""
        v = None if self.v is None else self.v[...]
        return inputs @ diagonal_weights(self.u[...], v, depth=self.depth)


def diagonal_weights(u: jax.Array, v: jax.Array | None, *, depth: int) -> jax.Array:
    """Computes the weights of the linear map.

        w = u^N - v^N

    Example:
      >>> u, v = jnp.array([2.0, 1.0]), jnp.array([1.0, 3.0])
      >>> print(models.diagonal_weights(u, v, depth=2))
      [ 3. -8.]

    Args:
      u: (p,).
      v: (p,), or None for u^N alone.
      depth: N, at least 2.

    Returns:
      Weights (p,).

    Raises:
      ValueError: `depth` is below 2.
    """
    _checks.integer("depth", depth, minimum=2)
    return u**depth if v is None else u**depth - v**depth


def conserved_quantity(u: jax.Array, v: jax.Array, *, depth: int) -> jax.Array:
    """Computes the quantity that gradient flow conserves at each coordinate, for any data.

        u v for N = 2,   u^(2 - N) + v^(2 - N) for N > 2

    From u = v = alpha it is alpha^2, or 2 alpha^(2 - N). Momentum does not conserve it.

    Example:
      >>> u, v = jnp.array([2.0, 0.5]), jnp.array([0.5, 2.0])
      >>> print(models.conserved_quantity(u, v, depth=2))
      [1. 1.]

    Args:
      u: (p,), positive.
      v: (p,), positive.
      depth: N, at least 2.

    Returns:
      The conserved quantity (p,).

    Raises:
      ValueError: `depth` is below 2.

    References:
      Our derivation for the loss without 1/2, tested against descent.
    """
    if _checks.integer("depth", depth, minimum=2) == 2:
        return u * v
    return u ** (2 - depth) + v ** (2 - depth)


def diagonal_flow(
    integrated_residual: jax.Array, *, depth: int, init_scale: float | jax.Array
) -> jax.Array:
    """Computes the weights of gradient flow from the integral S of its residual over time.

        -2 alpha^2 sinh(4 S)                                                             for N = 2,
        (alpha^(2 - N) + N (N - 2) S)^(-N / (N - 2)) - (alpha^(2 - N) - N (N - 2) S)^(-N / (N - 2))

    for N > 2. The residual is r = (2 / n) X'(X w - y). After some steps of descent, S is the
    learning rate times the sum of r over the steps.

    Example:
      >>> residual = jnp.array([-0.5, 0.5])  # summed over time
      >>> print(models.diagonal_flow(residual, depth=2, init_scale=0.5))  # -+ sinh(2) / 2
      [ 1.813 -1.813]

    Args:
      integrated_residual: (p,), S.
      depth: N, at least 2.
      init_scale: alpha, positive, with u = v = alpha at the start.

    Returns:
      Weights (p,); NaN at a coordinate whose S no flow reaches.

    Raises:
      ValueError: `depth` is below 2, or `init_scale` is not positive.

    References:
      Our derivation for the loss without 1/2, tested against descent.
    """
    _checks.integer("depth", depth, minimum=2)
    _checks.positive("init_scale", init_scale)
    integral = jnp.asarray(integrated_residual)
    alpha = jnp.asarray(init_scale, integral.dtype)
    if depth == 2:
        return -2 * alpha**2 * jnp.sinh(4 * integral)
    start, change = alpha ** (2 - depth), depth * (depth - 2) * integral
    reached = jnp.abs(change) < start
    power = lambda base: jnp.where(reached, base, 1) ** (-depth / (depth - 2))
    return jnp.where(reached, power(start + change) - power(start - change), jnp.nan)


def early_stopping_window(
    *,
    depth: int,
    init_scale: float | jax.Array,
    learning_rate: float | jax.Array,
    smallest_signal: float | jax.Array,
    noise_level: float | jax.Array,
) -> EarlyStoppingResult:
    """Computes when to stop descent: after the signal is learned and before the noise is.

    To leading order in small alpha, with orthonormal features and the smallest signal w*:

        first = log(sqrt(w* / 2) / alpha) / (4 w* eta),   last = log(1 / sqrt(alpha)) / (4 e eta)

    for N = 2, where e is the noise level, and for N > 2

        first = (alpha^(2 - N) - (w* / 2)^((2 - N) / N)) / (2 N (N - 2) w* eta)
        last  = (alpha^(2 - N) - alpha^((2 - N) / 2)) / (2 N (N - 2) e eta)

    Both grow as alpha^(2 - N), and so does their difference: deeper networks have longer windows.

    Example:
      >>> window = models.early_stopping_window(
      ...     depth=2, init_scale=1e-4, learning_rate=0.1, smallest_signal=1.0, noise_level=0.1
      ... )
      >>> print(f"{window.first:.1f} {window.last:.1f}")
      22.2 115.1

    Args:
      depth: N, at least 2.
      init_scale: alpha, positive and below 1.
      learning_rate: eta, of plain descent on the loss without 1/2.
      smallest_signal: w*, the smallest magnitude of a true weight, positive.
      noise_level: e, the largest magnitude of X' xi / n for the noise xi, positive.

    Returns:
      An `EarlyStoppingResult`, in steps. There is no such window if `last` is below `first`.

    Raises:
      ValueError: a number is out of its range.

    References:
      Our derivation for these networks, which are those of J. Li, T. Nguyen, C. Hegde, R. Wong
      (2021), arXiv:2108.05574.
    """
    _checks.integer("depth", depth, minimum=2)
    for name, value in (
        ("init_scale", init_scale),
        ("learning_rate", learning_rate),
        ("smallest_signal", smallest_signal),
        ("noise_level", noise_level),
    ):
        _checks.positive(name, value)
    if not isinstance(init_scale, jax.Array) and init_scale >= 1:
        raise ValueError(f"`init_scale` must be below 1, got {init_scale}.")
    alpha, rate, signal, noise = (
        jnp.asarray(x, jnp.result_type(float))
        for x in (init_scale, learning_rate, smallest_signal, noise_level)
    )
    if depth == 2:
        rise, growth = jnp.log(jnp.sqrt(signal / 2) / alpha), -jnp.log(alpha) / 2
        factor = 4.0
    else:
        start, power = alpha ** (2 - depth), (2 - depth) / depth
        rise, growth = start - (signal / 2) ** power, start - alpha ** ((2 - depth) / 2)
        factor = 2.0 * depth * (depth - 2)
    # A start beyond half the signal has nothing to wait for.
    first = jnp.maximum(rise, 0) / (factor * signal * rate)
    return EarlyStoppingResult(first, growth / (factor * noise * rate))
