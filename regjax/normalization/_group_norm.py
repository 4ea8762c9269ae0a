"""GroupNorm+: a learned mix of group normalization and a batch normalization of it."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from regjax import _checks, _numerics, _tree
from regjax.normalization import _arguments, _statistics
from regjax.normalization._layer import (
    Arrays,
    Layer,
    Shape,
    Standardized,
    check_options,
    running_average,
    stored,
)
from regjax.normalization._statistics import Moments


@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupNormPlus(Layer):
    """Mixes group normalization G with a batch normalization B of its outcome, by a learned share.

        outputs = (s G(x) + (1 - s) B(G(x))) * scale + bias,   s = sigmoid(mix_logit)

        G: (x - mean) / (std + epsilon) for each example and group, over positions and its channels
        B: (x - mean) / (std + epsilon) over `batch_axes`

    The defaults are the authors' code: B keeps the positions, and evaluation takes the statistics
    of its own batch, so that an output depends on the other examples. The usable variant is
    `batch_axes=None, track_running=True`: statistics of each channel, running ones in evaluation.
    Where B has a single value to go by, G(x) alone is returned.

    Attributes:
      num_groups: groups of channels, 32 in the code; a group of one value is refused.
      epsilon: added to the standard deviations, in units of the inputs.
      mix_init: initial mix_logit; 1 gives the group part a weight of 0.731.
      degrees_of_freedom: subtracted from the number of values in both variances.
      batch_axes: axes of B; None is all but the channels.
      track_running: whether B has running statistics for evaluation; needs `batch_axes=None`, or
        all axes but the channels.
      momentum: weight of the old running statistics.

    Raises:
      ValueError: an option is out of its range, `num_groups` does not divide the channels, or a
        group holds one value.

    References:
      A. Gunawan, X. Yin, K. Zhang (2022), arXiv:2207.01972. The text was not available: this is the
      layer of the official code.
    """

    num_groups: int = 32
    epsilon: float = 1e-5
    mix_init: float = 1.0
    degrees_of_freedom: int = 1
    batch_axes: tuple[int, ...] | None = (0,)
    track_running: bool = False
    momentum: float = 0.9
    initial_state: ClassVar = {"mean": 0.0, "var": 1.0}
    takes_mask: ClassVar[bool] = False  # which values are left of a group has no definition

    def __post_init__(self) -> None:
        super().__post_init__()
        _checks.integer("num_groups", self.num_groups)
        _checks.integer("degrees_of_freedom", self.degrees_of_freedom, minimum=0)
        check_options(self.momentum, self.epsilon)
        if self.track_running and self.batch_axes == (0,):
            raise ValueError("`batch_axes` must be None with `track_running`, got (0,).")
        _checks.number("mix_init", abs(_checks.real("mix_init", self.mix_init)))
        if self.batch_axes is not None:
            object.__setattr__(self, "batch_axes", _arguments.axes("batch_axes", self.batch_axes))

    @property
    def param_names(self) -> tuple[str, ...]:
        """The parameters that are used, and the logit of the share."""
        return (*super().param_names, "mix_logit")

    @property
    def state_names(self) -> tuple[str, ...]:
        """The running statistics of B, if it has such."""
        return super().state_names if self.track_running else ()

    def init_params(self, num_features: Shape) -> dict[str, jax.Array]:
        """Returns scale one, bias zero, (channels,), and mix_logit ()."""
        sizes = (num_features,) if isinstance(num_features, int) else num_features
        _group_size(math.prod(sizes), self.num_groups)
        mix_logit = jnp.full((), self.mix_init, self.param_dtype)
        return {**super().init_params(num_features), "mix_logit": mix_logit}

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        share = jax.nn.sigmoid(params["mix_logit"])
        group = self._group(x).apply().reshape(x.shape)
        batch, state = self._batch(group, state, train)
        return Standardized(group) if batch is None else _blend(group, batch, share), state

    def _group(self, x: jax.Array) -> Standardized:
        return _group_part(x, self.num_groups, self.epsilon, self.degrees_of_freedom)

    def _batch(
        self, x: jax.Array, state: Arrays, train: bool
    ) -> tuple[Standardized | None, Arrays]:
        if self.track_running and not train:
            mean, variance = stored(x, state["mean"], state["var"])
            return Standardized(x, mean, _inverse(variance, self.epsilon)), state
        axes = tuple(range(x.ndim - 1)) if self.batch_axes is None else self.batch_axes
        if x.ndim - 1 in _arguments.axes_of("batch_axes", axes, x.ndim):
            raise ValueError(f"`batch_axes` must leave out the channels, got {axes}.")
        found = _statistics.moments(x, axes, devices=self.devices)
        found = _corrected(found, self.degrees_of_freedom)
        if int(found.num_values) <= self.degrees_of_freedom:
            return None, state
        if self.track_running:
            if found.mean.size != x.shape[-1]:
                raise ValueError(
                    f"`batch_axes` must be all axes but the channels with `track_running`, "
                    f"got {self.batch_axes} for inputs of shape {x.shape}."
                )
            state = {
                "mean": running_average(self.momentum, state["mean"], found.mean),
                "var": running_average(self.momentum, state["var"], found.variance),
            }
        return _standardize(x, found, self.epsilon), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNormGroupNorm(GroupNormPlus):
    """Mixes in the other order, for the ablation.

        outputs = (s G(B(x)) + (1 - s) B(x)) * scale + bias

    References:
      A. Gunawan, X. Yin, K. Zhang (2022), arXiv:2207.01972.
    """

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        batch, state = self._batch(x, state, train)
        if batch is None:
            return Standardized(self._group(x).apply().reshape(x.shape)), state
        normalized = batch.apply()
        group = self._group(normalized).apply().reshape(x.shape)
        return Standardized(mix(group, normalized, params["mix_logit"])), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelGroupBatchNorm(GroupNormPlus):
    """Mixes both of the inputs, for the ablation.

        outputs = (s G(x) + (1 - s) B(x)) * scale + bias

    References:
      A. Gunawan, X. Yin, K. Zhang (2022), arXiv:2207.01972.
    """

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        group = self._group(x).apply().reshape(x.shape)
        batch, state = self._batch(x, state, train)
        other = None if batch is None else batch.apply()
        return Standardized(mix(group, other, params["mix_logit"])), state


def group_normalize(
    x: jax.Array, *, num_groups: int, epsilon: float, degrees_of_freedom: int = 1
) -> jax.Array:
    """Normalizes each example and group of channels by itself.

        (x - mean) / (std + epsilon)

    Args:
      x: (batch, ..., channels); mean and std go over the axes between and the group's channels.
      num_groups: it divides the channels.
      epsilon: added to the standard deviation, in units of the inputs.
      degrees_of_freedom: subtracted from the number of values in the variance.

    Returns:
      An array like `x`, in float32 at least.

    Raises:
      ValueError: `num_groups` does not divide the channels, or a group holds one value.
    """
    x = _tree.wide(x)
    return _group_part(x, num_groups, epsilon, degrees_of_freedom).apply().reshape(x.shape)


def mix(a: jax.Array, b: jax.Array | None, logit: jax.Array) -> jax.Array:
    """Mixes two arrays by a learned share.

        s a + (1 - s) b,   s = sigmoid(logit)

    Args:
      a: array.
      b: array like it, or None: then a.
      logit: ().

    Returns:
      An array like `a`.
    """
    if b is None:
        return a
    share = jax.nn.sigmoid(logit.astype(a.dtype))
    return share * a + (1 - share) * b


def _group_part(
    x: jax.Array, num_groups: int, epsilon: float, degrees_of_freedom: int
) -> Standardized:
    """Normalizes groups; without positions in a view (batch, groups, channels of a group)."""
    size = _group_size(x.shape[-1], num_groups)
    if x.ndim < 2:
        raise ValueError(f"`inputs` must have shape (batch, ..., channels), got {x.shape}.")
    if x.ndim == 2:
        x = x.reshape(-1, num_groups, size)
        found = _statistics.moments(x, (-1,))
    else:
        found = _group_moments(x, num_groups, size)
    found = _corrected(found, degrees_of_freedom)
    if int(found.num_values) <= degrees_of_freedom:
        raise ValueError(
            f"`num_groups` must leave more than {degrees_of_freedom} values to a group, got "
            f"{num_groups} for inputs of shape {x.shape}."
        )
    return _standardize(x, found, epsilon)


def _group_moments(x: jax.Array, num_groups: int, size: int) -> Moments:
    """Computes the moments of each example and group, (batch, 1, ..., 1, channels).

    The channels of a group have the same. First over the positions, which is most of the work, then
    over the channels of each group.
    """
    positions = tuple(range(1, x.ndim - 1))

    def over_group(values: jax.Array) -> jax.Array:
        grouped = values.reshape(*values.shape[:-1], num_groups, size)
        mean = jnp.mean(grouped, -1, keepdims=True)
        return jnp.broadcast_to(mean, grouped.shape).reshape(values.shape)

    reference = over_group(_statistics.first(x, positions))
    difference = x - reference
    shift = over_group(jnp.mean(difference, positions, keepdims=True))
    square = over_group(jnp.mean(_statistics.squared(difference), positions, keepdims=True))
    num_values = x.size // x.shape[0] // num_groups if x.size else 0
    return _statistics.from_shifted(reference, shift, square, num_values)


def _corrected(found: Moments, degrees_of_freedom: int) -> Moments:
    count = int(found.num_values)  # there is no mask
    freedom = max(count - degrees_of_freedom, 1)  # the caller refuses fewer values
    return found._replace(variance=found.variance * (count / freedom))


def _standardize(x: jax.Array, found: Moments, epsilon: float) -> Standardized:
    """Normalizes by the standard deviation: (x - mean) / (std + epsilon)."""
    factor = _inverse(found.variance, epsilon)
    return Standardized(x, found.reference, factor, -found.shift * factor)


def _inverse(variance: jax.Array, epsilon: float) -> jax.Array:
    return _numerics.divide(1, _statistics.root(variance) + epsilon)


def _blend(x: jax.Array, inner: Standardized, share: jax.Array) -> Standardized:
    """Mixes x with what `inner` makes of it: one product and one sum again."""
    factor = share + (1 - share) * inner.factor
    offset = share * inner.reference + (1 - share) * inner.offset
    return Standardized(x, inner.reference, factor, offset)


def _group_size(num_features: int, num_groups: int) -> int:
    if num_features % num_groups:
        raise ValueError(
            f"`num_groups` must divide the number of channels, {num_features}, got {num_groups}."
        )
    return num_features // num_groups
