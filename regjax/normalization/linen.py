"""The normalization layers as flax linen modules: they hold the arrays.

`normalization.linen.BatchNorm(momentum=0.9)(inputs, use_running_average=not train)`: the fields are
the options of the layer of the same name in `regjax.normalization`. Parameters are "scale" and
"bias", running statistics are in the collection "batch_stats", as flax has them.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import linen
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from regjax.normalization import _batch_norm, _group_norm, _lp_norm
from regjax.normalization._layer import Arrays, Layer
from regjax.normalization._reparametrized_linen import WeightNorm as WeightNorm
from regjax.normalization._reparametrized_linen import WeightNormConv as WeightNormConv
from regjax.normalization._reparametrized_linen import WeightNormDense as WeightNormDense
from regjax.normalization._reparametrized_linen import (
    WeightStandardizedConv as WeightStandardizedConv,
)
from regjax.normalization._reparametrized_linen import (
    WeightStandardizedDense as WeightStandardizedDense,
)
from regjax.normalization._statistics import Groups

__all__ = [
    *("Normalization", "BatchNorm", "GhostBatchNorm", "NoisyBatchNorm", "MeanOnlyBatchNorm"),
    *("LpNorm", "GroupNormPlus", "BatchNormGroupNorm", "ParallelGroupBatchNorm"),
    *("WeightNorm", "WeightNormDense", "WeightNormConv"),
    *("WeightStandardizedDense", "WeightStandardizedConv"),
]


class Normalization(linen.Module):
    """Holds the arrays of a layer of `regjax.normalization`; the base class of all here.

    Make a module of a layer of your own with `layer_type` and the fields of the layer:

    Example:
      >>> class L1Norm(normalization.linen.Normalization):
      ...     layer_type = normalization.LpNorm
      ...     order: float = 1
      ...     momentum: float = 0.99
      ...     epsilon: float = 1e-5
      >>> layer, inputs = L1Norm(use_running_average=False), jnp.array([[1.0], [3.0]])
      >>> outputs, variables = layer.init_with_output(jax.random.key(0), inputs)
      >>> print(outputs.ravel())
      [-0.5  0.5]

    Attributes:
      use_running_average: whether the mode is evaluation; say it here or in the call.
      axis: axis of the channels. With several axes, each of their indices has its scale and bias.
      dtype: type of the outputs; None: the common one of the inputs and the parameters.
      param_dtype: type of the parameters.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      bias_init: function (key, shape, dtype) -> initial bias, with partitions if you like.
      scale_init: function (key, shape, dtype) -> initial scale.
      axis_name: name of the mapped axis over which the batch is spread; `init` needs no such axis.
      axis_index_groups: groups of indices of that axis, which share statistics; None: all do.
      force_float32_reductions: whether statistics are in float32 at least.
      rng_collection: stream of the random numbers, for layers that draw some in training.
    """

    layer_type: ClassVar[type[Layer]]
    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    use_scale: bool = True
    use_bias: bool = True
    bias_init: Initializer = initializers.zeros
    scale_init: Initializer = initializers.ones
    axis_name: str | None = None
    axis_index_groups: Groups | None = None
    force_float32_reductions: bool = True
    rng_collection: str = "dropout"

    @linen.compact
    def __call__(
        self,
        inputs: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the normalized inputs; in training the statistics tick.

        Args:
          inputs: (batch, ..., channels), or with the channels along `axis`.
          use_running_average: whether the mode is evaluation, where the field does not say it.
          mask: bool, broadcastable to the inputs, which of their values the statistics are of.
        """
        evaluates = linen.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        starts, layer = self.is_initializing(), self._layer()
        shape = tuple(jnp.shape(inputs)[axis] for axis in layer.channel_axes(jnp.ndim(inputs)))
        params = self._params(layer, shape)
        stored = {
            name: self.variable("batch_stats", name, lambda value=value: value)
            for name, value in layer.init_state(shape).items()
        }
        train = not evaluates
        if starts:
            # There may be no mapped axis yet, nor a stream of random numbers.
            train = train and not layer.needs_key and jnp.ndim(inputs) > 1
            layer = layer.at_start(inputs) if jnp.ndim(inputs) else layer
        outputs, state = layer.apply(
            params,
            {name: variable.value for name, variable in stored.items()},
            inputs,
            train=train,
            mask=mask,
            key=self.make_rng(self.rng_collection) if train and layer.needs_key else None,
        )
        if train and not starts:
            for name, value in state.items():
                stored[name].value = value
        return outputs

    def _layer(self) -> Layer:
        names = [field.name for field in dataclasses.fields(self.layer_type)]
        return self.layer_type(**{name: getattr(self, name) for name in names})

    def _params(self, layer: Layer, shape: tuple[int, ...]) -> Arrays:
        inits = {"scale": self.scale_init, "bias": self.bias_init}
        return {
            name: self.param(
                name, inits.get(name, lambda *_, value=value: value), value.shape, value.dtype
            )
            for name, value in layer.init_params(shape).items()
        }


class BatchNorm(Normalization):
    """Normalizes by mean and variance of the batch.

    The fields are those of `regjax.normalization.BatchNorm`.

    Example:
      >>> layer = normalization.linen.BatchNorm(momentum=0.9, use_running_average=False)
      >>> inputs = jnp.array([[1.0], [3.0]])
      >>> variables = layer.init(jax.random.key(0), inputs)
      >>> outputs, new = layer.apply(variables, inputs, mutable=["batch_stats"])
      >>> print(outputs.ravel(), new["batch_stats"]["mean"], new["batch_stats"]["var"])
      [-1.  1.] [0.2] [1.1]
    """

    layer_type = _batch_norm.BatchNorm
    momentum: float = 0.99
    epsilon: float = 1e-5
    unbiased_running_variance: bool = True
    use_fast_variance: bool = True


class GhostBatchNorm(BatchNorm):
    """Applies batch norm to small groups of examples.

    The fields are those of `regjax.normalization.GhostBatchNorm`.

    Example:
      >>> layer = normalization.linen.GhostBatchNorm(ghost_size=2, use_running_average=False)
      >>> inputs = jnp.array([[1.0], [3.0], [10.0], [50.0]])
      >>> outputs, variables = layer.init_with_output(jax.random.key(0), inputs)
      >>> print(outputs.ravel())
      [-1.  1. -1.  1.]
    """

    layer_type = _batch_norm.GhostBatchNorm
    ghost_size: int = 32
    tick_per_ghost: bool = True


class NoisyBatchNorm(BatchNorm):
    """Adds noise to the outputs of batch norm.

    The fields are those of `regjax.normalization.NoisyBatchNorm`.

    Example:
      >>> layer = normalization.linen.NoisyBatchNorm(use_running_average=False)
      >>> inputs, keys = jnp.array([[1.0], [3.0]]), jax.random.split(jax.random.key(0))
      >>> variables = layer.init(jax.random.key(0), inputs)
      >>> one, two = (
      ...     layer.apply(variables, inputs, rngs={"dropout": key}, mutable=["batch_stats"])[0]
      ...     for key in keys
      ... )
      >>> print(jnp.array_equal(one, two))  # each key draws its own noise
      False
    """

    layer_type = _batch_norm.NoisyBatchNorm
    mean_range: float = 0.5
    scale_range: float = 1.25
    mean_jitter: float = 0.1
    scale_jitter: float = 0.1


class MeanOnlyBatchNorm(Normalization):
    """Subtracts the mean over the batch alone.

    The fields are those of `regjax.normalization.MeanOnlyBatchNorm`.

    Example:
      >>> layer = normalization.linen.MeanOnlyBatchNorm(use_running_average=False)
      >>> inputs = jnp.array([[1.0], [3.0]])
      >>> outputs, variables = layer.init_with_output(jax.random.key(0), inputs)
      >>> print(outputs.ravel())
      [-1.  1.]
    """

    layer_type = _batch_norm.MeanOnlyBatchNorm
    momentum: float = 0.9
    use_scale: bool = False


class LpNorm(Normalization):
    """Normalizes by another norm than the deviation.

    The fields are those of `regjax.normalization.LpNorm`.

    Example:
      >>> layer = normalization.linen.LpNorm(order=1, use_running_average=False)
      >>> inputs = jnp.array([[1.0], [3.0]])
      >>> outputs, variables = layer.init_with_output(jax.random.key(0), inputs)
      >>> print(outputs.ravel())
      [-0.5  0.5]
    """

    layer_type = _lp_norm.LpNorm
    order: float = 2
    momentum: float = 0.99
    epsilon: float = 1e-5


class GroupNormPlus(Normalization):
    """Mixes group norm with a batch norm of it.

    The fields are those of `regjax.normalization.GroupNormPlus`.

    Example:
      >>> layer = normalization.linen.GroupNormPlus(
      ...     num_groups=1, batch_axes=None, track_running=True, use_running_average=False
      ... )
      >>> variables = layer.init(jax.random.key(0), jnp.array([[1.0, 3.0], [30.0, 10.0]]))
      >>> share = jax.nn.sigmoid(variables["params"]["mix_logit"])  # of group normalization
      >>> print(f"{share:.3f}", sorted(variables["batch_stats"]))
      0.731 ['mean', 'var']
    """

    layer_type = _group_norm.GroupNormPlus
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


class BatchNormGroupNorm(GroupNormPlus):
    """Mixes batch norm with a group norm of it.

    The fields are those of `regjax.normalization.GroupNormPlus`.

    Example:
      >>> layer = normalization.linen.BatchNormGroupNorm(
      ...     num_groups=1, degrees_of_freedom=0, use_running_average=False
      ... )
      >>> inputs = jnp.array([[1.0, 3.0], [5.0, 1.0]])
      >>> outputs, variables = layer.init_with_output(jax.random.key(0), inputs)
      >>> print(outputs)
      [[-1.  1.]
       [ 1. -1.]]
    """

    layer_type = _group_norm.BatchNormGroupNorm


class ParallelGroupBatchNorm(GroupNormPlus):
    """Mixes group norm and batch norm.

    The fields are those of `regjax.normalization.GroupNormPlus`.

    Example:
      >>> layer = normalization.linen.ParallelGroupBatchNorm(
      ...     num_groups=1, degrees_of_freedom=0, use_running_average=False
      ... )
      >>> inputs = jnp.array([[1.0, 3.0], [30.0, 10.0]])
      >>> outputs, variables = layer.init_with_output(jax.random.key(0), inputs)
      >>> print(outputs)
      [[-1.     0.462]
       [ 1.    -0.462]]
    """

    layer_type = _group_norm.ParallelGroupBatchNorm
