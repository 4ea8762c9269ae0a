"""The normalization layers as flax linen modules: they hold the arrays.

`normalization.linen.BatchNorm(momentum=0.9)(inputs, use_running_average=not train)`: the fields are
the options of the layer of the same name in `regjax.normalization`. Parameters are "scale" and
"bias", running statistics are in the collection "batch_stats", as flax has them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen
from jax.typing import DTypeLike

from regjax._base import Tree
from regjax.normalization import _batch_norm, _group_norm, _lp_norm, _weight_norm
from regjax.normalization._layer import Layer


class Normalization(linen.Module):
    """A layer of `regjax.normalization` with its arrays, channels last.

    Attributes:
      use_running_average: whether the mode is evaluation, here or in the call.
      rng_collection: stream of the random numbers, for layers that draw some in training.
      dtype: of the outputs; None: that of the inputs and the parameters together.
      param_dtype: of the parameters.
    """

    layer_type: ClassVar[type[Layer]]
    use_running_average: bool | None = None
    rng_collection: str = "dropout"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @linen.compact
    def __call__(self, inputs: jax.Array, use_running_average: bool | None = None) -> jax.Array:
        """Returns the normalized inputs (batch, ..., channels); in training the statistics tick."""
        evaluates = linen.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        names = [field.name for field in dataclasses.fields(self.layer_type)]
        layer = self.layer_type(**{name: getattr(self, name) for name in names})
        channels = inputs.shape[-1]
        params = {
            name: self.param(name, lambda key, value=value: value)
            for name, value in layer.init_params(channels).items()
        }
        stored = {
            name: self.variable("batch_stats", name, lambda value=value: value)
            for name, value in layer.init_state(channels).items()
        }
        needs_key = layer.needs_key and not evaluates and not self.is_initializing()
        outputs, state = layer.apply(
            params,
            {name: variable.value for name, variable in stored.items()},
            inputs,
            train=not evaluates and (needs_key or not layer.needs_key),
            key=self.make_rng(self.rng_collection) if needs_key else None,
        )
        if not evaluates and not self.is_initializing():
            for name, value in state.items():
                stored[name].value = value
        return outputs


class BatchNorm(Normalization):
    """Batch norm; fields as in `regjax.normalization.BatchNorm`."""

    layer_type = _batch_norm.BatchNorm
    momentum: float = 0.99
    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    unbiased_running_variance: bool = True
    axis_name: str | None = None


class GhostBatchNorm(BatchNorm):
    """Batch norm of small groups; fields as in `regjax.normalization.GhostBatchNorm`."""

    layer_type = _batch_norm.GhostBatchNorm
    ghost_size: int = 32


class NoisyBatchNorm(BatchNorm):
    """Batch norm with noise; fields as in `regjax.normalization.NoisyBatchNorm`."""

    layer_type = _batch_norm.NoisyBatchNorm
    mean_range: float = 0.5
    scale_range: float = 1.25
    mean_jitter: float = 0.1
    scale_jitter: float = 0.1


class MeanOnlyBatchNorm(Normalization):
    """Batch norm of the mean; fields as in `regjax.normalization.MeanOnlyBatchNorm`."""

    layer_type = _batch_norm.MeanOnlyBatchNorm
    momentum: float = 0.9
    axis_name: str | None = None


class LpNorm(Normalization):
    """Another norm; fields as in `regjax.normalization.LpNorm`."""

    layer_type = _lp_norm.LpNorm
    order: float = 2
    momentum: float = 0.99
    epsilon: float = 1e-5
    axis_name: str | None = None


class GroupNormPlus(Normalization):
    """GroupNorm+; fields as in `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.GroupNormPlus
    num_groups: int = 32
    epsilon: float = 1e-5
    mix_init: float = 1.0
    degrees_of_freedom: int = 1
    batch_axes: tuple[int, ...] | None = (0,)
    track_running: bool = False
    momentum: float = 0.9


class BatchNormGroupNorm(GroupNormPlus):
    """GroupNorm+, batch first; fields as in `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.BatchNormGroupNorm


class ParallelGroupBatchNorm(GroupNormPlus):
    """GroupNorm+, parallel; fields as in `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.ParallelGroupBatchNorm


class _WeightNorm(linen.Module):
    """Hands a layer the kernel g v / |v| where it asks for its own."""

    def param(
        self, name: str, init_fn: Callable[..., Tree], *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Returns the layer's parameter; its kernel is made of `kernel` (v) and `scale` (g)."""
        value = super().param(name, init_fn, *args, **kwargs)
        if name != "kernel":
            return value
        length = super().param("scale", lambda key: _weight_norm.split_weight(value).g)
        return _weight_norm.weight_normalize(value, length)


class WeightNormDense(_WeightNorm, linen.Dense):
    """flax's Dense with the kernel g v / |v|, v the parameter `kernel` and g `scale`.

    g starts at |v|: the layer is that of `kernel_init`, until `initializers.data_dependent` sets
    it. The paper draws v from N(0, 0.05^2).

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868.
    """


class WeightNormConv(_WeightNorm, linen.Conv):
    """flax's Conv with the kernel g v / |v|, as `WeightNormDense`."""


class _WeightStandardized(linen.Module):
    """Hands a layer the standardized kernel where it asks for its own."""

    def param(
        self, name: str, init_fn: Callable[..., Tree], *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Returns the parameter of the layer, the kernel standardized."""
        value = super().param(name, init_fn, *args, **kwargs)
        return _weight_norm.standardize_weight(value) if name == "kernel" else value


class WeightStandardizedDense(_WeightStandardized, linen.Dense):
    """flax's Dense with a standardized kernel, `regjax.normalization.standardize_weight`."""


class WeightStandardizedConv(_WeightStandardized, linen.Conv):
    """flax's Conv with a standardized kernel, `regjax.normalization.standardize_weight`."""
