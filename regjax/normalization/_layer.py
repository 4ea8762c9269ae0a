"""What all normalization layers share: they are pure functions; a Flax module holds the arrays."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from regjax import _checks, _tree
from regjax._base import PRNGKey

Arrays: TypeAlias = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """Normalizes inputs (batch, ..., channels), without arrays of its own.

    `regjax.normalization.nnx` and `regjax.normalization.linen` hold the arrays and call `apply`.

    Attributes:
      dtype: of the outputs; None: that of the inputs and the parameters together.
      param_dtype: of the parameters.
      initial_params: value of each parameter (channels,) at the start.
      initial_state: value of each running statistic (channels,) at the start.
      needs_key: whether `apply` draws random numbers in training.
    """

    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    initial_params: ClassVar[Mapping[str, float]] = {"scale": 1.0, "bias": 0.0}
    initial_state: ClassVar[Mapping[str, float]] = {}
    needs_key: ClassVar[bool] = False

    def init_params(self, num_features: int) -> dict[str, jax.Array]:
        """Returns the initial parameters, (channels,) each, by name."""
        values = self.initial_params
        return {name: jnp.full(num_features, v, self.param_dtype) for name, v in values.items()}

    def init_state(self, num_features: int) -> dict[str, jax.Array]:
        """Returns the initial running statistics, (channels,) in float32 each, by name."""
        values = self.initial_state
        return {name: jnp.full(num_features, v, jnp.float32) for name, v in values.items()}

    def apply(
        self,
        params: Arrays,
        state: Arrays,
        inputs: jax.Array,
        *,
        train: bool,
        key: PRNGKey | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the outputs and the new running statistics.

        Args:
          params: as from `init_params`.
          state: as from `init_state`.
          inputs: (batch, ..., channels), floating point. Statistics are float32 at least.
          train: whether the statistics are those of the batch.
          key: typed key, for layers with `needs_key` in training.

        Returns:
          The outputs, of the shape of the inputs, and the state.

        Raises:
          ValueError: the inputs have another shape, or `key` is needed and missing.
        """
        if jnp.ndim(inputs) < 2:
            raise ValueError(
                f"`inputs` must have shape (batch, ..., channels), got {jnp.shape(inputs)}."
            )
        x = _tree.wide(inputs)
        # Arrays of channels get the rank of the inputs, so that nothing is broadcast by accident.
        lift = lambda array: array.reshape((1,) * (x.ndim - array.ndim) + array.shape)
        lifted = {name: lift(value).astype(x.dtype) for name, value in params.items()}
        standardized, new = self._normalize(x, lifted, jax.tree.map(lift, dict(state)), train)
        outputs = standardized.apply(lifted.get("scale", 1), lifted.get("bias", 0)).reshape(x.shape)
        if train and self.needs_key:
            if key is None:
                raise ValueError("`key` must be given in training, got None.")
            outputs = self._disturb(outputs, _checks.key("key", key))
        dtype = jnp.result_type(inputs, *params.values()) if self.dtype is None else self.dtype
        return outputs.astype(dtype), {name: new[name].reshape(state[name].shape) for name in state}

    def _normalize(
        self, x: jax.Array, params: Arrays, state: Arrays, train: bool
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
    new = new.reshape(old.shape).astype(old.dtype)
    return jnp.where(jnp.isfinite(new), momentum * old + (1 - momentum) * new, old)


def check_options(momentum: float, epsilon: float) -> None:
    """Checks what several layers have."""
    if not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` must be between 0 and 1, got {momentum}.")
    _checks.non_negative("epsilon", epsilon)
