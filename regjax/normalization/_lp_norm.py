"""Batch normalization by another norm than the second."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from regjax.normalization import _statistics
from regjax.normalization._layer import (
    Arrays,
    Layer,
    Standardized,
    check_options,
    running_average,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LpNorm(Layer):
    """Normalizes each channel by another norm than the second.

        outputs = (x - mean) / (norm + epsilon) * scale + bias
        norm = E[|x|], sqrt(E[x^2]) or max |x| of the un-centred inputs, over the batch

    Attributes:
      order: 1, 2 or math.inf.
      momentum: weight of the old running averages of mean and norm.
      epsilon: added to the norm, in units of the inputs.
      axis_name: of the mapped axis over which the batch is spread.

    Raises:
      ValueError: an option is out of its range.

    References:
      S. Santurkar et al. (2018), arXiv:1805.11604, section 3.3; that the norm is taken before the
      mean is subtracted is our reading of it.
    """

    order: float = 2
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None
    initial_state: ClassVar = {"mean": 0.0, "norm": 1.0}

    def __post_init__(self) -> None:
        check_options(self.momentum, self.epsilon)
        if self.order not in (1, 2, math.inf):
            raise ValueError(f"`order` must be 1, 2 or inf, got {self.order}.")

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool
    ) -> tuple[Standardized, Arrays]:
        if not train:
            mean, norm = (state[name].astype(x.dtype) for name in ("mean", "norm"))
            return Standardized(x, mean, 1 / (norm + self.epsilon)), state
        reference = _statistics.first(x, range(x.ndim - 1))
        mean, norm = self._mean_and_norm(x, reference)
        state = {
            "mean": running_average(self.momentum, state["mean"], mean),
            "norm": running_average(self.momentum, state["norm"], norm),
        }
        factor = 1 / (norm + self.epsilon)
        return Standardized(x, reference, factor, (reference - mean) * factor), state

    def _mean_and_norm(self, x: jax.Array, reference: jax.Array) -> tuple[jax.Array, jax.Array]:
        axes, combine = tuple(range(x.ndim - 1)), jnp.max if self.order == math.inf else jnp.mean
        mean = reference + jnp.mean(x - reference, axes, keepdims=True)
        reduced = combine(x**2 if self.order == 2 else jnp.abs(x), axes, keepdims=True)
        if self.axis_name is not None:
            means, parts = _statistics.gather(self.axis_name, mean, reduced)
            mean, reduced = jnp.mean(means, 0), combine(parts, 0)
        if self.order != 2:
            return mean, reduced
        return mean, _statistics.root(reduced)
