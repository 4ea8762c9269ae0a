"""The normalization layers as flax linen modules: they hold the arrays.

`normalization.linen.BatchNorm(momentum=0.9)(inputs, use_running_average=not train)`: the fields are
the options of the layer of the same name in `regjax.normalization`. Parameters are "scale" and
"bias", running statistics are in the collection "batch_stats", as flax has them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen
from jax.nn import initializers
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from regjax._base import Tree
from regjax.normalization import _arguments, _batch_norm, _group_norm, _lp_norm, _weight_norm
from regjax.normalization._layer import Arrays, Layer
from regjax.normalization._statistics import Groups


class Normalization(linen.Module):
    """A layer of `regjax.normalization` with its arrays.

    Attributes:
      use_running_average: whether the mode is evaluation, here or in the call.
      axis: of the channels; of several, each index has its scale and bias.
      dtype: of the outputs; None: that of the inputs and the parameters together.
      param_dtype: of the parameters.
      use_scale: whether there is a scale.
      use_bias: whether there is a bias.
      bias_init: makes the bias, (key, shape, dtype) -> array, with partitions perhaps.
      scale_init: makes the scale.
      axis_name: of the mapped axis over which the batch is spread; `init` needs no such axis.
      axis_index_groups: groups of indices of that axis, which share statistics; None: all do.
      force_float32_reductions: whether statistics are float32 at least.
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
    """Batch norm; fields as in `regjax.normalization.BatchNorm`."""

    layer_type = _batch_norm.BatchNorm
    momentum: float = 0.99
    epsilon: float = 1e-5
    unbiased_running_variance: bool = True
    use_fast_variance: bool = True


class GhostBatchNorm(BatchNorm):
    """Batch norm of small groups; fields as in `regjax.normalization.GhostBatchNorm`."""

    layer_type = _batch_norm.GhostBatchNorm
    ghost_size: int = 32
    tick_per_ghost: bool = True


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
    use_scale: bool = False


class LpNorm(Normalization):
    """Another norm; fields as in `regjax.normalization.LpNorm`."""

    layer_type = _lp_norm.LpNorm
    order: float = 2
    momentum: float = 0.99
    epsilon: float = 1e-5


class GroupNormPlus(Normalization):
    """GroupNorm+; fields as in `regjax.normalization.GroupNormPlus`."""

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
    """GroupNorm+, batch first; fields as in `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.BatchNormGroupNorm


class ParallelGroupBatchNorm(GroupNormPlus):
    """GroupNorm+, parallel; fields as in `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.ParallelGroupBatchNorm


class WeightNorm(linen.Module):
    """A module with the kernels g v / |v|, v its own and g parameters beside it.

        kernel = scale * v / sqrt(|v|^2 + epsilon)

    The parameters have the names of `flax.linen.WeightNorm`, "Dense_0/kernel/scale". g starts at
    |v|, so that wrapping changes no function, where flax's starts at one.

    Attributes:
      layer_instance: the module.
      epsilon: at least 0, in units of the kernel squared.
      dtype: of the kernels that are made; None: that of v and g together.
      param_dtype: of g; None: that of v.
      use_scale: whether there is a g; else it is one.
      scale_init: makes g, (key, shape, dtype) -> array; None: |v|.
      feature_axes: of a kernel, those that the norm leaves: a norm and a scale for each of their
        indices; None: one for the whole kernel.
      variable_filter: parts of the paths of the parameters that are normalized; None: all.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868.
    """

    layer_instance: linen.Module
    epsilon: float = 0.0
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike | None = None
    use_scale: bool = True
    scale_init: Initializer | None = None
    feature_axes: int | Sequence[int] | None = -1
    variable_filter: Iterable[str] | None = frozenset({"kernel"})

    @linen.compact
    def __call__(self, *args: Tree, **kwargs: Tree) -> Tree:
        """Returns the outputs of the module with the kernels that are made of its own."""
        axes = self.feature_axes
        axes = None if axes is None else _arguments.axes("feature_axes", axes)
        matched = False

        def made(path: tuple[Any, ...], stored: jax.Array) -> jax.Array:
            nonlocal matched
            keys = jax.tree_util.keystr(path[1:], simple=True, separator="/")
            name = f"{self.layer_instance.name}/{keys}"
            words = self.variable_filter
            if words is not None and not any(word in name for word in words):
                return stored
            matched = True
            scale = self._scale(f"{name}/scale", stored, axes)
            kernel = _weight_norm.normalized(stored, scale, axes, self.epsilon)
            return kernel if self.dtype is None else kernel.astype(self.dtype)

        outputs = linen.map_variables(
            lambda module: module(*args, **kwargs),
            "params",  # flax's maps all collections, and batch statistics are immutable there
            trans_in_fn=lambda variables: jax.tree_util.tree_map_with_path(made, variables),
            init=self.is_initializing(),
        )(self.layer_instance)
        if not matched:
            raise ValueError(
                f"`variable_filter` must match a parameter of {self.layer_instance.name}, got "
                f"{self.variable_filter!r}."
            )
        return outputs

    def _scale(
        self, name: str, kernel: jax.Array, axes: tuple[int, ...] | None
    ) -> jax.Array | None:
        if not self.use_scale:
            return None
        length = _weight_norm.lengths(kernel, axes)
        dtype = length.dtype if self.param_dtype is None else self.param_dtype
        if self.scale_init is None:
            return self.param(name, lambda key: length.astype(dtype))
        return self.param(name, self.scale_init, length.shape, dtype)


class _WeightNorm(linen.Module):
    """Hands a layer the kernel g v / |v| where it asks for its own."""

    use_scale: bool = True
    scale_init: Initializer | None = None
    epsilon: float = 0.0

    def param(
        self, name: str, init_fn: Callable[..., Tree], *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Returns the layer's parameter; its kernel is made of `kernel` (v) and `scale` (g)."""
        value = super().param(name, init_fn, *args, **kwargs)
        if name != "kernel":
            return value
        scale = None
        if self.use_scale and self.scale_init is not None:
            scale = super().param("scale", self.scale_init, value.shape[-1:], value.dtype)
        elif self.use_scale:
            scale = super().param("scale", lambda key: _weight_norm.split_weight(value).g)
        return _weight_norm.normalized(value, scale, (-1,), self.epsilon)


class WeightNormDense(_WeightNorm, linen.Dense):
    """flax's Dense with the kernel g v / |v|, v the parameter `kernel` and g `scale`.

    g starts at |v|: the layer is that of `kernel_init`, until `initializers.data_dependent` sets
    it. The paper draws v from N(0, 0.05^2).

    Attributes:
      use_scale: as in `WeightNorm`.
      scale_init: as there.
      epsilon: as there.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868.
    """


class WeightNormConv(_WeightNorm, linen.Conv):
    """flax's Conv with the kernel g v / |v|, as `WeightNormDense`."""


class _WeightStandardized(linen.Module):
    """Hands a layer the standardized kernel where it asks for its own."""

    epsilon: float = 1e-5
    degrees_of_freedom: int = 1
    epsilon_added_to: str = "deviation"

    def param(
        self, name: str, init_fn: Callable[..., Tree], *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Returns the parameter of the layer, the kernel standardized."""
        value = super().param(name, init_fn, *args, **kwargs)
        if name != "kernel":
            return value
        return _weight_norm.standardize_weight(
            value,
            epsilon=self.epsilon,
            degrees_of_freedom=self.degrees_of_freedom,
            epsilon_added_to=self.epsilon_added_to,
        )


class WeightStandardizedDense(_WeightStandardized, linen.Dense):
    """flax's Dense with a standardized kernel, `regjax.normalization.standardize_weight`.

    Attributes:
      epsilon: as there.
      degrees_of_freedom: as there.
      epsilon_added_to: as there.
    """


class WeightStandardizedConv(_WeightStandardized, linen.Conv):
    """flax's Conv with a standardized kernel, as `WeightStandardizedDense`."""
