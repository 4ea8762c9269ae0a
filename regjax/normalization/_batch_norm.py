"""Batch normalization, and what it becomes with fewer examples, more noise, or the mean alone."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _checks
from regjax._base import PRNGKey
from regjax.normalization import _statistics
from regjax.normalization._layer import (
    Arrays,
    Layer,
    Standardized,
    check_options,
    running_average,
)
from regjax.normalization._statistics import Moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm(Layer):
    """Normalizes each channel by its mean and variance over the batch.

        outputs = (x - mean) / sqrt(variance + epsilon) * scale + bias

    Mean and biased variance go over all axes but the last one, and over the devices of `axis_name`;
    in evaluation they are running averages. A batch of one value for each channel has variance zero
    and gives the bias. A NaN in the batch gives NaN outputs and leaves the running averages.

    Differs from flax in that running variances are unbiased (`unbiased_running_variance=False` is
    flax's), and in that the variance does not cancel where the mean is large.

    Attributes:
      momentum: weight of the old running average, flax's default (torch's 0.1 is 0.9 here).
      epsilon: added to the variance, in units of the inputs squared.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      unbiased_running_variance: whether the running variance takes m / (m - 1) times that of the
        batch, m values for each channel.
      axis_name: of the mapped axis over which the batch is spread; None under plain `jit`.

    Raises:
      ValueError: an option is out of its range.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithms 1 and 2.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    unbiased_running_variance: bool = True
    axis_name: str | None = None
    initial_state: ClassVar = {"mean": 0.0, "var": 1.0}

    def __post_init__(self) -> None:
        check_options(self.momentum, self.epsilon)

    def init_params(self, num_features: int) -> dict[str, jax.Array]:
        """Returns scale one and bias zero, (channels,), as far as they are used."""
        used = {"scale": self.use_scale, "bias": self.use_bias}
        params = super().init_params(num_features)
        return {name: value for name, value in params.items() if used[name]}

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool
    ) -> tuple[Standardized, Arrays]:
        if not train:
            mean, variance = (state[name].astype(x.dtype) for name in ("mean", "var"))
            return Standardized(x, mean, self._factor(variance)), state
        found = _statistics.moments(x, range(x.ndim - 1), axis_name=self.axis_name)
        factor = self._factor(found.variance)
        standardized = Standardized(x, found.reference, factor, -found.shift * factor)
        return standardized, self._ticked(state, found)

    def _factor(self, variance: jax.Array) -> jax.Array:
        return lax.rsqrt(variance + self.epsilon)

    def _ticked(self, state: Arrays, found: Moments) -> Arrays:
        variance = found.variance
        if self.unbiased_running_variance:
            variance = _statistics.unbiased(variance, found.num_values)
        return {
            "mean": running_average(self.momentum, state["mean"], found.mean),
            "var": running_average(self.momentum, state["var"], variance),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostBatchNorm(BatchNorm):
    """Applies batch norm to each group of `ghost_size` consecutive examples by itself.

    Keeps the noise of small batches in large ones. The running averages take the mean over the
    groups, of the variances within them. Devices of `axis_name` share the running averages only.

    Attributes:
      ghost_size: examples of a group; it divides the batch on each device.

    Raises:
      ValueError: an option is out of its range, or `ghost_size` does not divide the batch.

    References:
      E. Hoffer, I. Hubara, D. Soudry (2017), arXiv:1705.08741, which was not read: that the running
      averages take the mean over the groups is our choice.
    """

    ghost_size: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.integer("ghost_size", self.ghost_size)

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool
    ) -> tuple[Standardized, Arrays]:
        if not train:
            return super()._normalize(x, params, state, train)
        if x.shape[0] % self.ghost_size:
            raise ValueError(
                f"`ghost_size` must divide the batch, {x.shape[0]}, got {self.ghost_size}."
            )
        ghosts = x.reshape(-1, self.ghost_size, *x.shape[1:])
        found = _statistics.moments(ghosts, range(1, ghosts.ndim - 1))
        factor = self._factor(found.variance)
        means = jnp.stack([jnp.mean(found.mean, 0), jnp.mean(found.variance, 0)])
        if self.axis_name is not None:
            means = lax.pmean(means, self.axis_name)
        state = self._ticked(state, found._replace(mean=means[0], variance=means[1]))
        normalized = Standardized(ghosts, found.reference, factor, -found.shift * factor)
        # The parameters have the rank of the inputs.
        return Standardized(normalized.apply().reshape(x.shape)), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyBatchNorm(BatchNorm):
    """Adds noise to the outputs of batch norm in training: unstable on purpose.

        s * outputs + m
        mu ~ U(-mean_range, mean_range),  sigma ~ U(1, scale_range)      for each channel and step
        m ~ U(mu - mean_jitter, mu + mean_jitter),  s ~ N(sigma, scale_jitter^2)      for each value

    Attributes:
      mean_range: bound of |mu|, 0.5 in the paper.
      scale_range: upper end of sigma, 1.25 in the paper.
      mean_jitter: half-width of m about mu, 0.1 in the paper.
      scale_jitter: standard deviation of s about sigma, 0.1 in the paper.

    Raises:
      ValueError: an option is out of its range, or `key` is missing in training.

    References:
      S. Santurkar, D. Tsipras, A. Ilyas, A. Madry (2018), arXiv:1805.11604, algorithm 1; that the
      noise follows scale and bias is our reading of it.
    """

    mean_range: float = 0.5
    scale_range: float = 1.25
    mean_jitter: float = 0.1
    scale_jitter: float = 0.1
    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean_range", "mean_jitter", "scale_jitter"):
            _checks.non_negative(name, getattr(self, name))
        if not self.scale_range >= 1:
            raise ValueError(f"`scale_range` must be at least 1, got {self.scale_range}.")

    def _disturb(self, outputs: jax.Array, key: PRNGKey) -> jax.Array:
        keys, shape, dtype = jax.random.split(key, 4), outputs.shape, outputs.dtype
        channels = (1,) * (len(shape) - 1) + shape[-1:]
        mu = jax.random.uniform(keys[0], channels, dtype, -self.mean_range, self.mean_range)
        sigma = jax.random.uniform(keys[1], channels, dtype, 1, self.scale_range)
        uniform = jax.random.uniform(keys[2], shape, dtype, -1, 1)
        # Or each use of the noise would compute it again.
        drawn = lax.optimization_barrier((uniform, jax.random.normal(keys[3], shape, dtype)))
        m, s = mu + self.mean_jitter * drawn[0], sigma + self.scale_jitter * drawn[1]
        return s * outputs + m


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanOnlyBatchNorm(Layer):
    """Subtracts the mean alone: batch norm without the variance, for weight-normalized layers.

        outputs = x - mean + bias

    Attributes:
      momentum: weight of the old running mean, 0.9 in the official code.
      axis_name: of the mapped axis over which the batch is spread.

    Raises:
      ValueError: an option is out of its range.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868, section 4.
    """

    momentum: float = 0.9
    axis_name: str | None = None
    initial_params: ClassVar = {"bias": 0.0}
    initial_state: ClassVar = {"mean": 0.0}

    def __post_init__(self) -> None:
        check_options(self.momentum, 0)

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool
    ) -> tuple[Standardized, Arrays]:
        if not train:
            return Standardized(x, state["mean"].astype(x.dtype)), state
        axes = tuple(range(x.ndim - 1))
        reference = _statistics.first(x, axes)
        mean = reference + jnp.mean(x - reference, axes, keepdims=True)
        if self.axis_name is not None:
            mean = lax.pmean(mean, self.axis_name)
        state = {"mean": running_average(self.momentum, state["mean"], mean)}
        return Standardized(x, reference, offset=reference - mean), state
