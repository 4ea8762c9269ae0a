"""Batch normalization, and what it becomes with fewer examples, more noise, or the mean alone."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from regjax import _checks, _draws
from regjax._base import PRNGKey
from regjax.normalization import _statistics
from regjax.normalization._layer import (
    Arrays,
    Layer,
    Standardized,
    check_options,
    running_average,
    stored,
)
from regjax.normalization._statistics import Moments

# Ticks of running averages in one turn of a loop: on accelerators each turn is a launch.
_UNROLL = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNorm(Layer):
    """Normalizes each channel by its mean and variance over the batch.

        outputs = (x - mean) / sqrt(variance + epsilon) * scale + bias

    Mean and biased variance go over all axes but that of the channels, and over the devices of
    `axis_name`. In evaluation they are running averages. A batch with a single value per channel
    has variance zero and gives the bias. A NaN in the batch, or a variance that overflows, gives
    NaN outputs and does not change the running averages.

    Three things differ from flax. Running variances are unbiased
    (`unbiased_running_variance=False` gives flax's). The variance does not cancel where the mean is
    large. Devices count by the number of values that the mask leaves them.

    Example:
      >>> layer = normalization.BatchNorm(momentum=0.9)
      >>> params, state = layer.init_params((1,)), layer.init_state((1,))
      >>> outputs, state = layer.apply(params, state, jnp.array([[1.0], [3.0]]), train=True)
      >>> print(outputs.ravel(), state["mean"], state["var"])  # 0.9 * 1 + 0.1 * 2
      [-1.  1.] [0.2] [1.1]

    Attributes:
      momentum: weight of the old running average; flax's default. torch's 0.1 is 0.9 here.
      epsilon: added to the variance, in units of the inputs squared.
      unbiased_running_variance: whether the batch's variance over m values is multiplied by
        m / (m - 1) in the running average.
      use_fast_variance: whether variances take one pass. A second pass costs time, but does not
        cancel even where the first value is an outlier.

    Raises:
      ValueError: an option is out of its range.

    References:
      S. Ioffe, C. Szegedy (2015), arXiv:1502.03167, algorithms 1 and 2.
    """

    momentum: float = 0.99
    epsilon: float = 1e-5
    unbiased_running_variance: bool = True
    use_fast_variance: bool = True
    initial_state: ClassVar = {"mean": 0.0, "var": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.momentum, self.epsilon)

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        if not train:
            mean, variance = stored(x, state["mean"], state["var"])
            return Standardized(x, mean, self._factor(variance)), state
        found = _statistics.moments(
            x, range(x.ndim - 1),
            devices=self.devices, mask=mask, use_fast_variance=self.use_fast_variance,
        )  # fmt: skip
        factor = self._factor(found.variance)
        standardized = Standardized(x, found.reference, factor, -found.shift * factor)
        return standardized, {
            "mean": running_average(self.momentum, state["mean"], found.mean),
            "var": running_average(self.momentum, state["var"], self._running_variance(found)),
        }

    def _factor(self, variance: jax.Array) -> jax.Array:
        square = variance + self.epsilon
        # Without epsilon a channel that does not vary gives the bias too.
        return jnp.where(square == 0, 0, lax.rsqrt(jnp.where(square == 0, 1, square)))

    def _running_variance(self, found: Moments) -> jax.Array:
        if not self.unbiased_running_variance:
            return found.variance
        return _statistics.unbiased(found.variance, found.num_values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostBatchNorm(BatchNorm):
    """Applies batch norm to each group of `ghost_size` consecutive examples by itself.

    This keeps the noise of small batches in large ones. The running averages are updated once for
    each of the n groups, one after the other, as if the groups were batches:

        running' = momentum^n running + (1 - momentum) sum_i momentum^(n - i) statistic_i

    Devices of `axis_name` share the running averages only, as if their groups were those of one
    batch. A group in which a mask leaves nothing gives the bias.

    Example:
      >>> layer = normalization.GhostBatchNorm(ghost_size=2)
      >>> params, state = layer.init_params((1,)), layer.init_state((1,))
      >>> inputs = jnp.array([[1.0], [3.0], [10.0], [50.0]])  # two groups of two examples
      >>> outputs, state = layer.apply(params, state, inputs, train=True)
      >>> print(outputs.ravel())
      [-1.  1. -1.  1.]

    Attributes:
      ghost_size: number of examples in a group. It must divide the batch on each device.
      tick_per_ghost: True: running averages are updated for each group. False: once per batch, by
        the mean over the groups.

    Raises:
      ValueError: an option is out of its range, or `ghost_size` does not divide the batch.

    References:
      E. Hoffer, I. Hubara, D. Soudry (2017), arXiv:1705.08741, algorithm 1.
    """

    ghost_size: int = 32
    tick_per_ghost: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.integer("ghost_size", self.ghost_size)

    def at_start(self, inputs: jax.Array) -> "GhostBatchNorm":
        """Returns the layer with groups which divide the inputs, often one example."""
        size = math.gcd(self.ghost_size, inputs.shape[0])
        return dataclasses.replace(super().at_start(inputs), ghost_size=size)

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        if not train:
            return super()._normalize(x, params, state, train, mask)
        if x.ndim < 2 or x.shape[0] % self.ghost_size:
            raise ValueError(
                f"`ghost_size` must divide the batch, got {self.ghost_size} for inputs of shape "
                f"{x.shape}."
            )
        ghosts = x.reshape(-1, self.ghost_size, *x.shape[1:])
        if mask is not None:
            mask = jnp.broadcast_to(mask, (x.shape[0], *mask.shape[1:]))
            mask = mask.reshape(*ghosts.shape[:2], *mask.shape[1:])
        found = _statistics.moments(
            ghosts, range(1, ghosts.ndim - 1),
            mask=mask, use_fast_variance=self.use_fast_variance,
        )  # fmt: skip
        everywhere = self.devices.gather(found.mean, self._running_variance(found))
        rows = [array.reshape(-1, x.shape[-1]) for array in everywhere]
        state = {
            name: self._ticked(state[name], row)
            for name, row in zip(("mean", "var"), rows, strict=True)
        }
        factor, offset = self._factor(found.variance), -found.shift * self._factor(found.variance)
        if mask is not None:
            # A ghost of padding has no statistics, and no NaN whose derivative spreads.
            exists = jnp.asarray(found.num_values) > 0
            factor, offset = jnp.where(exists, factor, 0), jnp.where(exists, offset, 0)
        return Standardized(ghosts, found.reference, factor, offset), state

    def _ticked(self, old: jax.Array, rows: jax.Array) -> jax.Array:
        """Ticks by the statistics (groups, channels), leaving out those that are not finite."""
        if not self.tick_per_ghost:
            exists = jnp.isfinite(rows)
            num_each = jnp.sum(exists, 0, dtype=old.dtype)
            mean = jnp.sum(jnp.where(exists, rows, 0), 0) / jnp.maximum(num_each, 1)
            return running_average(self.momentum, old, jnp.where(num_each > 0, mean, jnp.nan))
        tick = functools.partial(running_average, self.momentum)
        # One after the other takes a tenth of the time that all powers of the momentum do. The
        # first tick settles the type, which a loop keeps: that of complex inputs is another one.
        turn = lambda old, row: (tick(old, row), None)
        return lax.scan(turn, tick(old, rows[0]), rows[1:], unroll=_UNROLL)[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyBatchNorm(BatchNorm):
    """Adds noise to the outputs of batch norm in training, which makes them unstable on purpose.

        s * outputs + m

        mu ~ U(-mean_range, mean_range),  sigma ~ U(1, scale_range)      for each channel and step
        m ~ U(mu - mean_jitter, mu + mean_jitter),  s ~ N(sigma, scale_jitter^2)      for each value

    Example:
      >>> layer = normalization.NoisyBatchNorm(mean_range=0.0, scale_range=1.0, scale_jitter=0.0)
      >>> params, state = layer.init_params((1,)), layer.init_state((1,))
      >>> inputs = jnp.linspace(-1.0, 1.0, 1000)[:, None]
      >>> noisy, _ = layer.apply(params, state, inputs, train=True, key=jax.random.key(0))
      >>> clean, _ = normalization.BatchNorm().apply(params, state, inputs, train=True)
      >>> print(f"{jnp.abs(noisy - clean).max():.2f}")  # mean_jitter is 0.1
      0.10

    Attributes:
      mean_range: bound of |mu|, 0.5 in the paper.
      scale_range: upper end of sigma, 1.25 in the paper.
      mean_jitter: half-width of m about mu, 0.1 in the paper.
      scale_jitter: standard deviation of s about sigma, 0.1 in the paper.

    Raises:
      ValueError: an option is out of its range, or `key` is missing in training.

    References:
      S. Santurkar, D. Tsipras, A. Ilyas, A. Madry (2018), arXiv:1805.11604, algorithm 1. We read it
      so that the noise comes after scale and bias.
    """

    mean_range: float = 0.5
    scale_range: float = 1.25
    mean_jitter: float = 0.1
    scale_jitter: float = 0.1
    needs_key: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mean_range", "scale_range", "mean_jitter", "scale_jitter"):
            _checks.number(name, getattr(self, name))
        if not self.scale_range >= 1:
            raise ValueError(f"`scale_range` must be at least 1, got {self.scale_range}.")

    def _disturb(self, outputs: jax.Array, key: PRNGKey) -> jax.Array:
        keys, shape = jax.random.split(key, 3), outputs.shape
        dtype = jnp.finfo(outputs.dtype).dtype
        channels = (1,) * (len(shape) - 1) + shape[-1:]
        mu = jax.random.uniform(keys[0], channels, dtype, -self.mean_range, self.mean_range)
        sigma = jax.random.uniform(keys[1], channels, dtype, 1, self.scale_range)
        uniform, normal = _draws.uniform_and_normal(keys[2], shape, dtype)
        m, s = mu + self.mean_jitter * uniform, sigma + self.scale_jitter * normal
        return s * outputs + m


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeanOnlyBatchNorm(Layer):
    """Subtracts the mean over the batch alone, for weight-normalized layers.

        outputs = x - mean + bias

    Example:
      >>> layer = normalization.MeanOnlyBatchNorm(momentum=0.9)
      >>> params, state = layer.init_params((1,)), layer.init_state((1,))
      >>> outputs, state = layer.apply(params, state, jnp.array([[1.0], [3.0]]), train=True)
      >>> print(outputs.ravel(), state["mean"])
      [-1.  1.] [0.2]

    Attributes:
      momentum: weight of the old running mean, 0.9 in the official code.
      use_scale: whether the outputs are multiplied by a learned scale.

    Raises:
      ValueError: an option is out of its range.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868, section 4.
    """

    momentum: float = 0.9
    use_scale: bool = False
    initial_state: ClassVar = {"mean": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self.momentum, 0)

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        if not train:
            return Standardized(x, state["mean"].astype(x.dtype)), state
        found = _statistics.moments(x, range(x.ndim - 1), devices=self.devices, mask=mask)
        state = {"mean": running_average(self.momentum, state["mean"], found.mean)}
        return Standardized(x, found.reference, offset=-found.shift), state
