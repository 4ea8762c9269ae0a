"""GroupNorm+: a learned mix of group normalization and a batch normalization of it."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

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
    """Mixes group normalization G with a batch normalization B of its result, by a learned share.

        outputs = (s G(x) + (1 - s) B(G(x))) * scale + bias,   s = sigmoid(mix_logit)

        G: (x - mean) / (std + epsilon) for each example and group, over positions and its channels
        B: (x - mean) / (std + epsilon) over `batch_axes`

    With the defaults, those of the authors' code, B has statistics for each position, and in
    evaluation those of its own batch, so that an output depends on the other examples. For most
    uses take `batch_axes=None, track_running=True`: then B has statistics for each channel, and
    running ones in evaluation. Where B has a single value, G(x) alone is returned. A group in which
    a mask leaves no more than `degrees_of_freedom` values, such as an example of padding, gives the
    bias.

    flax's `GroupNorm` is G alone, with its epsilon in the root. Its `axis_name` is an axis over
    which an example is spread; here it is one over which the batch is spread.

    Example:
      >>> layer = normalization.GroupNormPlus(num_groups=1, degrees_of_freedom=0)
      >>> params, state = layer.init_params((2,)), layer.init_state((2,))
      >>> inputs = jnp.array([[1.0, 3.0], [30.0, 10.0]])  # two examples, one group of two channels
      >>> outputs, state = layer.apply(params, state, inputs, train=True)
      >>> print(outputs)
      [[-1.  1.]
       [ 1. -1.]]

    Attributes:
      num_groups: number of groups of channels. A group must have more than one value.
      group_size: number of channels in a group, with `num_groups=None`.
      reduction_axes: axes of G, including the channels; None: all but the examples.
      use_fast_variance: whether variances take one pass. A second pass costs time, but does not
        cancel even where the first value is an outlier.
      epsilon: added to the standard deviations, in units of the inputs.
      mix_init: initial value of mix_logit; 1 gives G the share 0.731.
      degrees_of_freedom: subtracted from the number of values in both variances.
      batch_axes: axes of B; None: all but the channels.
      track_running: whether B has running statistics for evaluation. Needs `batch_axes=None`, or
        all axes but the channels.
      momentum: weight of the old running statistics.

    Raises:
      ValueError: an option is out of its range, `num_groups` does not divide the channels, or a
        group holds one value.

    References:
      A. Gunawan, X. Yin, K. Zhang (2022), arXiv:2207.01972, in the form of the official code.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    reduction_axes: int | tuple[int, ...] | None = None
    use_fast_variance: bool = True
    epsilon: float = 1e-5
    mix_init: float = 1.0
    degrees_of_freedom: int = 1
    batch_axes: tuple[int, ...] | None = (0,)
    track_running: bool = False
    momentum: float = 0.9
    initial_state: ClassVar = {"mean": 0.0, "var": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.num_groups is None) == (self.group_size is None):
            raise ValueError(
                f"`num_groups` must be None with `group_size`, and only then, got num_groups="
                f"{self.num_groups} and group_size={self.group_size}."
            )
        for name in ("num_groups", "group_size"):
            if getattr(self, name) is not None:
                _checks.integer(name, getattr(self, name))
        if self.reduction_axes is not None:
            axes = _arguments.axes("reduction_axes", self.reduction_axes)
            object.__setattr__(self, "reduction_axes", axes)
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
        self._num_groups(math.prod(sizes))
        mix_logit = jnp.full((), self.mix_init, self.param_dtype)
        return {**super().init_params(num_features), "mix_logit": mix_logit}

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        group = self._group(x, mask)
        batch, exists, state = self._batch(group, state, train, mask)
        if batch is None:
            return Standardized(group), state
        return _blend(group, batch, exists, jax.nn.sigmoid(params["mix_logit"])), state

    def _num_groups(self, num_channels: int) -> int:
        if self.num_groups is None:
            size = int(self.group_size or 0)
            return _divided("group_size", num_channels, size)
        _divided("num_groups", num_channels, self.num_groups)
        return self.num_groups

    def _group(self, x: jax.Array, mask: jax.Array | None) -> jax.Array:
        axes = None
        if self.reduction_axes is not None:
            axes = _arguments.axes("reduction_axes", self.reduction_axes)
            axes = _arguments.axes_of("reduction_axes", axes, x.ndim)
            if axes[-1] != x.ndim - 1:
                raise ValueError(
                    f"`reduction_axes` must include the channels, got {self.reduction_axes} for "
                    f"inputs of shape {x.shape}."
                )
        return _group_part(
            x,
            self._num_groups(x.shape[-1]),
            self.epsilon,
            self.degrees_of_freedom,
            axes=axes,
            mask=mask,
            use_fast_variance=self.use_fast_variance,
        )

    def _batch(
        self, x: jax.Array, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized | None, ArrayLike, Arrays]:
        """Returns B of x, or None; where a mask leaves values enough for it; and the new state."""
        if self.track_running and not train:
            mean, variance = stored(x, state["mean"], state["var"])
            return Standardized(x, mean, _inverse(variance, self.epsilon)), True, state
        axes = tuple(range(x.ndim - 1)) if self.batch_axes is None else self.batch_axes
        if x.ndim - 1 in _arguments.axes_of("batch_axes", axes, x.ndim):
            raise ValueError(f"`batch_axes` must leave out the channels, got {axes}.")
        found = _statistics.moments(
            x, axes,
            devices=self.devices, mask=mask, use_fast_variance=self.use_fast_variance,
        )  # fmt: skip
        if isinstance(found.num_values, int) and found.num_values <= self.degrees_of_freedom:
            return None, False, state
        found, exists = _corrected(found, self.degrees_of_freedom)
        if self.track_running:
            if found.mean.size != x.shape[-1]:
                raise ValueError(
                    f"`batch_axes` must be all axes but the channels with `track_running`, "
                    f"got {self.batch_axes} for inputs of shape {x.shape}."
                )
            # What is not finite does not move them.
            mean, variance = (
                jnp.where(exists, array, jnp.nan) for array in (found.mean, found.variance)
            )
            state = {
                "mean": running_average(self.momentum, state["mean"], mean),
                "var": running_average(self.momentum, state["var"], variance),
            }
        return _standardize(x, found, exists, self.epsilon), exists, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchNormGroupNorm(GroupNormPlus):
    """Mixes batch normalization B with a group normalization G of its result.

        outputs = (s G(B(x)) + (1 - s) B(x)) * scale + bias

    References:
      A. Gunawan, X. Yin, K. Zhang (2022), arXiv:2207.01972.
    """

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        batch, exists, state = self._batch(x, state, train, mask)
        if batch is None:
            return Standardized(self._group(x, mask)), state
        normalized = jnp.where(exists, batch.apply(), x)
        group = self._group(normalized, mask)
        return Standardized(mix(group, normalized, params["mix_logit"], exists)), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelGroupBatchNorm(GroupNormPlus):
    """Mixes group normalization G and batch normalization B of the inputs themselves.

        outputs = (s G(x) + (1 - s) B(x)) * scale + bias

    References:
      A. Gunawan, X. Yin, K. Zhang (2022), arXiv:2207.01972.
    """

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple[Standardized, Arrays]:
        group = self._group(x, mask)
        batch, exists, state = self._batch(x, state, train, mask)
        other = None if batch is None else batch.apply()
        return Standardized(mix(group, other, params["mix_logit"], exists)), state


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
    _divided("num_groups", x.shape[-1], num_groups)
    return _group_part(x, num_groups, epsilon, degrees_of_freedom)


def mix(a: jax.Array, b: jax.Array | None, logit: jax.Array, exists: ArrayLike = True) -> jax.Array:
    """Mixes two arrays by a learned share.

        s a + (1 - s) b,   s = sigmoid(logit)

    Args:
      a: array.
      b: array like it, or None: then a.
      logit: ().
      exists: bool, broadcastable to `a`, where there is such a `b`; elsewhere a.

    Returns:
      An array like `a`.
    """
    if b is None:
        return a
    share = jax.nn.sigmoid(logit.astype(a.dtype))
    return jnp.where(exists, share * a + (1 - share) * b, a)


def _group_part(
    x: jax.Array,
    num_groups: int,
    epsilon: float,
    degrees_of_freedom: int,
    *,
    axes: tuple[int, ...] | None = None,
    mask: jax.Array | None = None,
    use_fast_variance: bool = True,
) -> jax.Array:
    """Normalizes groups of channels, over `axes` too, of which the last is the channels'."""
    if x.ndim < 2:
        raise ValueError(f"`inputs` must have shape (batch, ..., channels), got {x.shape}.")
    found = _statistics.moments(
        x, range(1, x.ndim - 1) if axes is None else axes[:-1],
        mask=mask, use_fast_variance=use_fast_variance, num_groups=num_groups,
    )  # fmt: skip
    if isinstance(found.num_values, int) and found.num_values <= degrees_of_freedom:
        raise ValueError(
            f"`num_groups` must leave more than {degrees_of_freedom} values to a group, got "
            f"{num_groups} for inputs of shape {x.shape}."
        )
    of_channels = functools.partial(_statistics.of_channels, num_channels=x.shape[-1])
    # What is small beside x is quicker to read for channels than for groups.
    found = jax.tree.map(of_channels, found) if x.ndim > 2 else found
    _, *small = _standardize(x, *_corrected(found, degrees_of_freedom), epsilon)
    return Standardized(x, *map(of_channels, small)).apply()


def _corrected(found: Moments, degrees_of_freedom: int) -> tuple[Moments, ArrayLike]:
    """Returns moments with the corrected variance, and where there are values enough for it."""
    count = found.num_values
    if isinstance(count, int):  # which the caller has looked at
        return found._replace(
            variance=found.variance * (count / (count - degrees_of_freedom))
        ), True
    exists = count > degrees_of_freedom
    factor = count / jnp.where(exists, count - degrees_of_freedom, 1)
    return found._replace(variance=found.variance * factor), exists


def _standardize(x: jax.Array, found: Moments, exists: ArrayLike, epsilon: float) -> Standardized:
    """Normalizes by the standard deviation, (x - mean) / (std + epsilon), or gives zero."""
    factor = _inverse(found.variance, epsilon)
    offset = -found.shift * factor
    if exists is not True:
        # No statistics, and no NaN whose derivative spreads.
        factor, offset = jnp.where(exists, factor, 0), jnp.where(exists, offset, 0)
    return Standardized(x, found.reference, factor, offset)


def _inverse(variance: jax.Array, epsilon: float) -> jax.Array:
    deviation = _statistics.root(variance) + epsilon
    return 1 / deviation if epsilon > 0 else _numerics.divide(1, deviation)


def _blend(x: jax.Array, inner: Standardized, exists: ArrayLike, share: jax.Array) -> Standardized:
    """Mixes x with what `inner` makes of it: one product and one sum again."""
    share = jnp.where(exists, share, 1)
    factor = share + (1 - share) * inner.factor
    offset = share * inner.reference + (1 - share) * inner.offset
    return Standardized(x, inner.reference, factor, offset)


def _divided(name: str, num_channels: int, value: int) -> int:
    if num_channels % value:
        raise ValueError(
            f"`{name}` must divide the number of channels, {num_channels}, got {value}."
        )
    return num_channels // value
