"""Batch normalization by another norm than the second."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from regjax import _checks, _numerics
from regjax.normalization import _statistics
from regjax.normalization._layer import (
    Arrays,
    Layer,
    Standardized,
    check_options,
    running_average,
    stored,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LpNorm(Layer):
    """Normalizes each channel by another norm than the standard deviation.

        outputs = (x - mean) / (norm + epsilon) * scale + bias
        norm = E[|x|], sqrt(E[x^2]) or max |x|

    Mean and norm go over the batch. The norm is that of the inputs before the mean is subtracted.

    Example:
      >>> layer = normalization.LpNorm(order=1)
      >>> params, state = layer.init_params((1,)), layer.init_state((1,))
      >>> outputs, state = layer.apply(params, state, jnp.array([[1.0], [3.0]]), train=True)
      >>> print(outputs.ravel())  # the mean of the inputs is 2, and that of their magnitudes too
      [-0.5  0.5]

    Attributes:
      order: 1, 2 or math.inf, for the three norms.
      momentum: weight of the old running averages of mean and norm.
      epsilon: added to the norm, in units of the inputs.

    Raises:
      ValueError: an option is out of its range.

    References:
      S. Santurkar et al. (2018), arXiv:1805.11604, section 3.3. We read it so that the norm is
      taken before the mean is subtracted.
    """

    order: float = 2
    momentum: float = 0.99
    epsilon: float = 1e-5
    initial_state: ClassVar = {"mean": 0.0, "norm": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.momentum, self.epsilon)
        if _checks.real("order", self.order) not in (1, 2, math.inf):
            raise ValueError(f"`order` must be 1, 2 or inf, got {self.order}.")

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        if not train:
            mean, norm = stored(x, state["mean"], state["norm"])
            return Standardized(x, mean, self._factor(norm)), state
        axes = range(x.ndim - 1)
        found = _statistics.moments(x, axes, devices=self.devices, mask=mask)
        norm = self._norm(x, tuple(axes), mask)
        factor = self._factor(norm)
        return Standardized(x, found.reference, factor, -found.shift * factor), {
            "mean": running_average(self.momentum, state["mean"], found.mean),
            "norm": running_average(self.momentum, state["norm"], norm),
        }

    def _factor(self, norm: jax.Array) -> jax.Array:
        return _numerics.divide(1, norm + self.epsilon)

    def _norm(self, x: jax.Array, axes: tuple[int, ...], mask: jax.Array | None) -> jax.Array:
        size = jnp.abs(x) if mask is None else jnp.where(mask, jnp.abs(x), 0)
        if self.order == math.inf:
            return jnp.max(self.devices.gather(jnp.max(size, axes, keepdims=True))[0], 0)
        mean_of = lambda values: _statistics.mean(values, axes, devices=self.devices, mask=mask)
        if self.order == 1:
            return mean_of(size)
        # The same power for all devices; squares do not under- or overflow then.
        power = jnp.min(self.devices.gather(_numerics.near_one(size, axes)[1])[0], 0)
        return _statistics.root(mean_of((power * size) ** 2)) / power
