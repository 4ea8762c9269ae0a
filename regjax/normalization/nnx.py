"""The normalization layers as flax nnx modules: they hold the arrays and the mode.

`normalization.nnx.BatchNorm(64, momentum=0.9)`: the options are those of the layer of the same name
in `regjax.normalization`, and `module.train()` and `module.eval()` set the mode.
"""

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
from flax import nnx

from regjax import _checks
from regjax.normalization import _batch_norm, _group_norm, _lp_norm, _weight_norm
from regjax.normalization._layer import Layer


class Normalization(nnx.Module):
    """A layer of `regjax.normalization` with its arrays, channels last.

    Args:
      num_features: number of channels.
      use_running_average: whether to start in evaluation mode.
      rng_collection: stream of `rngs` for layers that draw random numbers in training.
      rngs: needed by those layers only.
      **options: of the layer.

    Raises:
      ValueError: an option is out of its range, or `rngs` is missing.
      TypeError: an option is unknown.
    """

    layer_type: ClassVar[type[Layer]]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        # The options by name, for whoever asks for the signature.
        own = list(inspect.signature(Normalization.__init__).parameters.values())[1:-1]
        options = inspect.signature(cls.layer_type).parameters.values()
        cls.__signature__ = inspect.Signature([*own, *options])

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ):
        _checks.integer("num_features", num_features)
        self.layer = self.layer_type(**options)
        params, state = self.layer.init_params(num_features), self.layer.init_state(num_features)
        self.param_names, self.state_names = tuple(params), tuple(state)
        for name, value in params.items():
            setattr(self, name, nnx.Param(value))
        for name, value in state.items():
            setattr(self, name, nnx.BatchStat(value))
        self.use_running_average = use_running_average
        self.rngs = nnx.data(None)
        if self.layer.needs_key:
            if rngs is None:
                raise ValueError("`rngs` must be given to a layer that draws random numbers.")
            self.rngs = rngs[rng_collection].fork()

    def __call__(self, inputs: jax.Array, *, use_running_average: bool | None = None) -> jax.Array:
        """Returns the normalized inputs (batch, ..., channels); in training the statistics tick."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        key = None
        if self.rngs is not None and not use_running_average:
            key = self.rngs()
        outputs, state = self.layer.apply(
            {name: getattr(self, name)[...] for name in self.param_names},
            {name: getattr(self, name)[...] for name in self.state_names},
            inputs,
            train=not use_running_average,
            key=key,
        )
        if not use_running_average:
            for name, value in state.items():
                getattr(self, name)[...] = value
        return outputs


class BatchNorm(Normalization):
    """Batch norm; options of `regjax.normalization.BatchNorm`."""

    layer_type = _batch_norm.BatchNorm


class GhostBatchNorm(Normalization):
    """Batch norm of small groups; options of `regjax.normalization.GhostBatchNorm`."""

    layer_type = _batch_norm.GhostBatchNorm


class NoisyBatchNorm(Normalization):
    """Batch norm with noise; options of `regjax.normalization.NoisyBatchNorm`."""

    layer_type = _batch_norm.NoisyBatchNorm


class MeanOnlyBatchNorm(Normalization):
    """Batch norm of the mean; options of `regjax.normalization.MeanOnlyBatchNorm`."""

    layer_type = _batch_norm.MeanOnlyBatchNorm


class LpNorm(Normalization):
    """Another norm; options of `regjax.normalization.LpNorm`."""

    layer_type = _lp_norm.LpNorm


class GroupNormPlus(Normalization):
    """GroupNorm+; options of `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.GroupNormPlus


class BatchNormGroupNorm(Normalization):
    """GroupNorm+, batch first; options of `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.BatchNormGroupNorm


class ParallelGroupBatchNorm(Normalization):
    """GroupNorm+, parallel; options of `regjax.normalization.GroupNormPlus`."""

    layer_type = _group_norm.ParallelGroupBatchNorm


class Reparametrized(nnx.Module):
    """A layer that runs with another kernel than the one that it stores, which is left alone."""

    def __init__(self, layer: Callable[[jax.Array], jax.Array], axis: int):
        kernel = getattr(layer, "kernel", None)
        if not isinstance(layer, nnx.Module) or not isinstance(kernel, nnx.Param):
            raise TypeError(
                f"`layer` must be an nnx module with a kernel, got {type(layer).__name__}."
            )
        if jax.tree.leaves(nnx.state(layer, nnx.Not(nnx.Param))):
            raise TypeError("`layer` must hold parameters only, got one with other state.")
        self.layer = layer
        self.axis = axis

    def _kernel(self, stored: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Returns the outputs of the layer with the kernel that is made of the stored one."""
        graph, params = nnx.split(self.layer)
        layer = nnx.merge(graph, params)  # another object: the stored kernel is never written
        layer.kernel = nnx.Param(self._kernel(self.layer.kernel[...]))
        return layer(inputs)


class WeightNorm(Reparametrized):
    """A layer with the kernel g v / |v|; v is the layer's own kernel, g the parameter `scale`.

    g starts at |v|, so that wrapping changes no function, until
    `initializers.data_dependent` sets it. Unlike `flax.nnx.WeightNorm`, it trains g and never
    writes v. The paper draws v from N(0, 0.05^2).

    Args:
      layer: nnx.Linear, nnx.Conv or another module with a `kernel` and no state.
      axis: of the kernel's output channels; -2 for a transposed convolution with
        `transpose_kernel`.

    Raises:
      TypeError: `layer` is not such a module.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868.
    """

    def __init__(self, layer: Callable[[jax.Array], jax.Array], *, axis: int = -1):
        super().__init__(layer, axis)
        self.scale = nnx.Param(_weight_norm.split_weight(self.layer.kernel[...], axis=axis).g)

    def _kernel(self, stored: jax.Array) -> jax.Array:
        return _weight_norm.weight_normalize(stored, self.scale[...], axis=self.axis)


class WeightStandardized(Reparametrized):
    """A layer with standardized kernel, `regjax.normalization.standardize_weight`.

    Args:
      layer: nnx.Linear, nnx.Conv or another module with a `kernel` and no state.
      epsilon: added to the variance.

    Raises:
      TypeError: `layer` is not such a module.
    """

    def __init__(self, layer: Callable[[jax.Array], jax.Array], *, epsilon: float = 1e-5):
        super().__init__(layer, -1)
        self.epsilon = epsilon

    def _kernel(self, stored: jax.Array) -> jax.Array:
        return _weight_norm.standardize_weight(stored, epsilon=self.epsilon)
