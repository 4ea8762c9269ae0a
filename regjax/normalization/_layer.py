"""What all normalization layers share: they are pure functions; a Flax module holds the arrays."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from regjax import _checks
from regjax._base import PRNGKey
from regjax._one_program import one_program
from regjax.normalization import _arguments
from regjax.normalization._statistics import Devices, Groups, spread

Arrays: TypeAlias = Mapping[str, jax.Array]
Shape: TypeAlias = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Normalizes inputs, without arrays of its own.

    `regjax.normalization.nnx` and `regjax.normalization.linen` hold the arrays and call `apply`.

    Attributes:
      axis: axis of the channels. With several axes, each of their indices has its scale and bias.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      axis_name: name of the mapped axis over which the batch is spread; None under plain `jit`.
      axis_index_groups: groups of equally many indices of that axis, which share statistics; None:
        all indices do.
      force_float32_reductions: True: statistics are in float32 at least. False: they have the type
        of the inputs, or `dtype`, and the running ones `param_dtype`.
      dtype: of the outputs; None: that of the inputs and the parameters together.
      param_dtype: of the parameters.
      initial_params: value of each parameter (channels,) at the start.
      initial_state: value of each running statistic (channels,) at the start.
      needs_key: whether `apply` draws random numbers in training.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                _checks.boolean(field.name, value)
            if isinstance(value, (jax.Array, np.ndarray)):  # which does not hash
                raise TypeError(f"`{field.name}` must be no array, got {value!r}.")
        if self.dtype is not None:
            _checks.inexact_dtype("dtype", self.dtype)
        _checks.inexact_dtype("param_dtype", self.param_dtype)
        _checks.axis_name("axis_name", self.axis_name)
        axes = _arguments.axes("axis", self.axis)
        object.__setattr__(self, "axis", axes if len(axes) > 1 else axes[0])
        if self.axis_index_groups is not None:
            groups = _arguments.groups(self.axis_index_groups, self.axis_name)
            object.__setattr__(self, "axis_index_groups", groups)

    @property
    def devices(self) -> Devices:
        """The devices that share their statistics."""
        return Devices(self.axis_name, self.axis_index_groups)

    @property
    def param_names(self) -> tuple[str, ...]:
        """The parameters that are used."""
        used = {"scale": self.use_scale, "bias": self.use_bias}
        return tuple(name for name in self.initial_params if used[name])

    @property
    def state_names(self) -> tuple[str, ...]:
        """The running statistics."""
        return tuple(self.initial_state)

    def channel_axes(self, ndim: int) -> tuple[int, ...]:
        """Returns the axes of the channels of inputs with `ndim` axes, from the first on."""
        return _arguments.axes_of("axis", _arguments.axes("axis", self.axis), ndim)

    def at_start(self, inputs: jax.Array) -> Self:
        """Returns the layer as it runs on the inputs that its arrays are made with.

        There is no mapped axis yet, and these inputs are often one example of zeros.
        """
        return dataclasses.replace(self, axis_name=None, axis_index_groups=None)

    def init_params(self, num_features: Shape) -> dict[str, jax.Array]:
        """Returns the initial parameters, (channels,) each, by name."""
        values, names = self.initial_params, self.param_names
        return {
            n: jnp.full(num_features, values[n], self.param_dtype) for n in names if n in values
        }

    def init_state(self, num_features: Shape) -> dict[str, jax.Array]:
        """Returns the initial running statistics, (channels,) each, by name."""
        dtype = jnp.float32 if self.force_float32_reductions else self.param_dtype
        values = self.initial_state
        return {name: jnp.full(num_features, values[name], dtype) for name in self.state_names}

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
            channels than the parameters; the mask does not fit; `key` is
            needed and missing; `params` or `state` are not those of the layer.
          TypeError: the inputs, or what else is an array, are none of numbers.
        """
        _checks.boolean("train", train)
        inputs = _arguments.numbers("inputs", inputs)
        axes = self._channels(inputs, train)
        channels = math.prod(inputs.shape[axis] for axis in axes)
        sizes = {n: channels if n in self.initial_params else 1 for n in self.param_names}
        _arguments.check_arrays("params", params, sizes)
        _arguments.check_arrays("state", state, dict.fromkeys(self.state_names, channels))
        if mask is not None:
            mask = _arguments.mask_of(mask, inputs.shape)
        if train and self.needs_key:
            if key is None:
                raise ValueError("`key` must be given in training, got None.")
            key = _checks.key("key", key)
        return self._applied(dict(params), dict(state), inputs, mask, key, train=train)

    @one_program(static=("self", "train"))
    def _applied(
        self,
        params: dict[str, jax.Array],
        state: dict[str, jax.Array],
        inputs: jax.Array,
        mask: jax.Array | None,
        key: PRNGKey | None,
        *,
        train: bool,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        axes = self._channels(inputs, train)
        x = _channels_last(inputs, axes).astype(self._reduction_dtype(inputs))
        # Arrays of channels get the rank of the inputs, so that nothing is broadcast by accident.
        lift = lambda array: array.reshape((1,) * (x.ndim - 1) + (-1,))
        lifted = {name: lift(value).astype(x.dtype) for name, value in params.items()}
        if mask is not None:
            mask = mask if len(axes) == 1 else jnp.broadcast_to(mask, inputs.shape)
            mask = _channels_last(mask, axes)
        standardized, new = self._normalize(
            x, lifted, {name: lift(value) for name, value in state.items()}, train, mask
        )
        outputs = standardized.apply(lifted.get("scale", 1), lifted.get("bias", 0)).reshape(x.shape)
        if key is not None and train and self.needs_key:
            outputs = self._disturb(outputs, key)
        outputs = _channels_back(outputs, axes, inputs.shape)
        new = {name: new[name].reshape(jnp.shape(state[name])) for name in state}
        return outputs.astype(self._output_dtype(inputs, params)), new

    def _channels(self, inputs: jax.Array, train: bool) -> tuple[int, ...]:
        shape = inputs.shape
        if not shape or (train and len(shape) < 2 and self.axis_name is None):
            raise ValueError(f"`inputs` must have shape (batch, ..., channels), got {shape}.")
        if train and not inputs.size:
            raise ValueError(f"`inputs` must have no empty axis in training, got shape {shape}.")
        return self.channel_axes(inputs.ndim)

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
        """Returns the normalized values times `scale`, plus `bias`: numbers, or channels last."""
        bias = jnp.reshape(bias, (1,) * (self.x.ndim - 1) + (-1,)) if jnp.ndim(bias) else bias
        factor, offset = _times(self.factor, scale), _times(self.offset, scale) + bias
        factor, offset = (spread(array, self.x.shape) for array in (factor, offset))
        return (self.x - self.reference) * factor + offset


def _times(array: ArrayLike, scale: ArrayLike) -> ArrayLike:
    """Multiplies (..., channels) by a scale for each channel.

    As matrices: for the derivative with axes of length one XLA on CPU takes four times as long.
    """
    if not jnp.ndim(array) or not jnp.ndim(scale):
        return array * scale
    shape = jnp.shape(array)
    return (jnp.reshape(array, (-1, shape[-1])) * jnp.reshape(scale, (1, -1))).reshape(shape)


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
    _checks.between("momentum", _checks.number("momentum", momentum), 0, 1)
    _checks.number("epsilon", epsilon)


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
