"""What all normalization layers share: they are pure functions; a Flax module holds the arrays."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from regjax import _checks
from regjax._base import PRNGKey
from regjax.normalization._statistics import Devices, Groups

Arrays: TypeAlias = Mapping[str, jax.Array]
Shape: TypeAlias = int | tuple[int, ...]

_MAX_AXES = 32  # NumPy's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Normalizes inputs, without arrays of its own.

    `regjax.normalization.nnx` and `regjax.normalization.linen` hold the arrays and call `apply`.

    Attributes:
      axis: of the channels; of several, each index has its scale and bias.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      axis_name: of the mapped axis over which the batch is spread; None under plain `jit`.
      axis_index_groups: groups of one size of indices of that axis, which share statistics; None:
        all do.
      force_float32_reductions: whether statistics are float32 at least; else they have the type of
        the inputs, or `dtype`, and the running ones `param_dtype`.
      dtype: of the outputs; None: that of the inputs and the parameters together.
      param_dtype: of the parameters.
      initial_params: value of each parameter (channels,) at the start.
      initial_state: value of each running statistic (channels,) at the start.
      needs_key: whether `apply` draws random numbers in training.
      takes_mask: whether a mask may say which values count.
    """

    axis: int | Sequence[int] = -1
    use_scale: bool = True
    use_bias: bool = True
    axis_name: str | None = None
    axis_index_groups: Groups | None = None
    force_float32_reductions: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    initial_params: ClassVar[Mapping[str, float]] = {"scale": 1.0, "bias": 0.0}
    initial_state: ClassVar[Mapping[str, float]] = {}
    needs_key: ClassVar[bool] = False
    takes_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        axes = tuple(self.axis) if isinstance(self.axis, Sequence) else (self.axis,)
        axes = tuple(_checks.integer("axis", axis, minimum=-_MAX_AXES) for axis in axes)
        if not axes:
            raise ValueError("`axis` must name at least one axis, got ().")
        if self.axis_index_groups is not None:
            # Lists do not hash, and flax compares layers.
            groups = tuple(map(tuple, self.axis_index_groups))
            if self.axis_name is None:
                raise ValueError("`axis_name` must be given with `axis_index_groups`, got None.")
            if not groups or len({len(group) for group in groups}) > 1:
                raise ValueError(f"`axis_index_groups` must be of one size, got {groups}.")
            object.__setattr__(self, "axis_index_groups", groups)
        object.__setattr__(self, "axis", axes if len(axes) > 1 else axes[0])

    @property
    def devices(self) -> Devices:
        """The devices that share their statistics."""
        return Devices(self.axis_name, self.axis_index_groups)

    def channel_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of the channels of inputs with `ndim` axes, from the first on."""
        axes = (self.axis,) if isinstance(self.axis, int) else self.axis
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise ValueError(f"`axis` must be one of the inputs' {ndim} axes, got {axis}.")
        return tuple(sorted({axis % ndim for axis in axes}))

    def init_params(self, num_features: Shape) -> dict[str, jax.Array]:
        """Returns the initial parameters, (channels,) each, by name, as far as they are used."""
        used = {"scale": self.use_scale, "bias": self.use_bias}
        return {
            name: jnp.full(num_features, value, self.param_dtype)
            for name, value in self.initial_params.items()
            if used[name]
        }

    def init_state(self, num_features: Shape) -> dict[str, jax.Array]:
        """Returns the initial running statistics, (channels,) each, by name."""
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        values = self.initial_state
        return {name: jnp.full(num_features, v, dtype) for name, v in values.items()}

    def apply(
        self,
        params: Arrays,
        state: Arrays,
        inputs: jax.Array,
        *,
        train: bool,
        mask: jax.Array | None = None,
        key: PRNGKey | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the outputs and the new running statistics.

        Args:
          params: as from `init_params`.
          state: as from `init_state`.
          inputs: (batch, ..., channels), or with the channels along `axis`; numbers of any type.
            Under a mapped axis an example may come alone, (..., channels).
          train: whether the statistics are those of the batch.
          mask: bool, broadcastable to the inputs, which of their values the statistics are of.
            Where it leaves none, the outputs are NaN.
          key: typed key, for layers with `needs_key` in training.

        Returns:
          The outputs, of the shape of the inputs, and the state.

        Raises:
          ValueError: the inputs have another shape, an axis without entries in training, or other
            channels than the parameters; the layer takes no mask, or it does not fit; `key` is
            needed and missing.
        """
        inputs = jnp.asarray(inputs)
        axes = self._check(inputs, {**params, **state}, train)
        x = _channels_last(inputs, axes).astype(self._reduction_dtype(inputs))
        # Arrays of channels get the rank of the inputs, so that nothing is broadcast by accident.
        lift = lambda array: array.reshape((1,) * (x.ndim - 1) + (-1,))
        lifted = {name: lift(value).astype(x.dtype) for name, value in params.items()}
        mask = self._mask(mask, inputs, axes)
        standardized, new = self._normalize(
            x, lifted, {name: lift(value) for name, value in state.items()}, train, mask
        )
        outputs = standardized.apply(lifted.get("scale", 1), lifted.get("bias", 0)).reshape(x.shape)
        if train and self.needs_key:
            if key is None:
                raise ValueError("`key` must be given in training, got None.")
            outputs = self._disturb(outputs, _checks.key("key", key))
        outputs = _channels_back(outputs, axes, inputs.shape)
        new = {name: new[name].reshape(jnp.shape(state[name])) for name in state}
        return outputs.astype(self._output_dtype(inputs, params)), new

    def _check(self, inputs: jax.Array, arrays: Arrays, train: bool) -> tuple[int, ...]:
        shape = inputs.shape
        if not shape or (train and len(shape) < 2 and self.axis_name is None):
            raise ValueError(f"`inputs` must have shape (batch, ..., channels), got {shape}.")
        if train and not inputs.size:
            raise ValueError(f"`inputs` must have no empty axis in training, got shape {shape}.")
        axes = self.channel_axes(inputs.ndim)
        channels = math.prod(shape[axis] for axis in axes)
        for name, array in arrays.items():
            if jnp.ndim(array) and jnp.size(array) != channels:
                raise ValueError(
                    f"`inputs` must have the channels of `{name}`, {jnp.shape(array)}, on axis "
                    f"{self.axis}, got shape {shape}."
                )
        return axes

    def _mask(
        self, mask: jax.Array | None, inputs: jax.Array, axes: tuple[int, ...]
    ) -> jax.Array | None:
        if mask is None:
            return None
        if not self.takes_mask:
            raise ValueError(f"`mask` must be None, {type(self).__name__} takes none.")
        mask = jnp.asarray(mask)
        if jnp.issubdtype(mask.dtype, jnp.inexact):
            raise TypeError(f"`mask` must be boolean, got {mask.dtype}.")
        lengths = (1,) * (inputs.ndim - mask.ndim) + mask.shape
        fits = [length in (1, size) for length, size in zip(lengths, inputs.shape, strict=False)]
        if len(lengths) != inputs.ndim or not all(fits):
            raise ValueError(
                f"`mask` must be broadcastable to the inputs' {inputs.shape}, got {mask.shape}."
            )
        mask = mask.astype(bool).reshape(lengths)
        if len(axes) > 1:
            mask = jnp.broadcast_to(mask, inputs.shape)
        return _channels_last(mask, axes)

    def _reduction_dtype(self, inputs: jax.Array) -> jnp.dtype:
        is_inexact = jnp.issubdtype(inputs.dtype, jnp.inexact)
        own = inputs.dtype if is_inexact else jnp.dtype(jnp.float32)
        if self.force_float32_reductions:
            return own if jnp.finfo(own).bits >= 32 else jnp.dtype(jnp.float32)
        return own if self.dtype is None else jnp.dtype(self.dtype)

    def _output_dtype(self, inputs: jax.Array, params: Arrays) -> DTypeLike:
        if self.dtype is not None:
            return self.dtype
        is_inexact = jnp.issubdtype(inputs.dtype, jnp.inexact)
        arrays = [inputs, *params.values()] if is_inexact else list(params.values())
        return jnp.result_type(*arrays) if arrays else jnp.float32

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool, mask: jax.Array | None
    ) -> tuple["Standardized", Arrays]:
        """Returns the normalized inputs and the new state; `_disturb` adds what is random."""
        raise NotImplementedError

    def _disturb(self, outputs: jax.Array, key: PRNGKey) -> jax.Array:
        raise NotImplementedError


class Standardized(NamedTuple):
    """A view of the inputs and the small arrays that normalize it.

        (x - reference) * factor + offset

    With scale and bias it stays one product and one sum for each value, so that the derivative
    reduces the incoming gradient twice, where flax's does three times.

    Attributes:
      x: the inputs, reshaped perhaps.
      reference: constant near the mean.
      factor: inverse of the deviation.
      offset: (reference - mean) * factor.
    """

    x: jax.Array
    reference: ArrayLike = 0
    factor: ArrayLike = 1
    offset: ArrayLike = 0

    def apply(self, scale: ArrayLike = 1, bias: ArrayLike = 0) -> jax.Array:
        """Returns the normalized values times `scale`, plus `bias`."""
        return (self.x - self.reference) * (self.factor * scale) + (self.offset * scale + bias)


def running_average(momentum: float, old: jax.Array, new: jax.Array) -> jax.Array:
    """Moves the old average towards the new value, but not to one that is not finite.

        momentum * old + (1 - momentum) * new

    A batch with a NaN spoils its own outputs, not the statistics of all later ones.
    """
    new = new.reshape(old.shape)
    # The mean of complex numbers is complex, from a real start.
    new = new if jnp.iscomplexobj(new) else new.astype(old.dtype)
    return jnp.where(jnp.isfinite(new), momentum * old + (1 - momentum) * new, old)


def stored(x: jax.Array, mean: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns running statistics in the types of x and of its magnitude."""
    return mean.astype(x.dtype), other.astype(jnp.finfo(x.dtype).dtype)


def check_options(momentum: float, epsilon: float) -> None:
    """Checks what several layers have."""
    _checks.non_negative("momentum", momentum)
    if not momentum <= 1:
        raise ValueError(f"`momentum` must be between 0 and 1, got {momentum}.")
    if not _checks.non_negative("epsilon", epsilon) < math.inf:
        raise ValueError(f"`epsilon` must be finite, got {epsilon}.")


def _channels_last(array: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    if axes == (array.ndim - 1,):
        return array
    moved = jnp.moveaxis(array, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: array.ndim - len(axes)], -1)


def _channels_back(array: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> jax.Array:
    if axes == (len(shape) - 1,):
        return array
    channels = [shape[axis] for axis in axes]
    return jnp.moveaxis(array.reshape(*array.shape[:-1], *channels), range(-len(axes), 0), axes)
