"""The normalization layers as flax nnx modules: they hold the arrays and the mode.

`normalization.nnx.BatchNorm(64, momentum=0.9)`: the options are those of the layer of the same name
in `regjax.normalization`, and `module.train()` and `module.eval()` set the mode.
"""

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import jax
from flax import nnx
from jax.nn.initializers import Initializer

from regjax import _checks
from regjax._base import Tree
from regjax._nnx_module import Module
from regjax.normalization import _batch_norm, _group_norm, _lp_norm
from regjax.normalization._layer import Layer
from regjax.normalization._reparametrized import Reparametrized as Reparametrized
from regjax.normalization._reparametrized import WeightNorm as WeightNorm
from regjax.normalization._reparametrized import WeightStandardized as WeightStandardized

__all__ = [
    *("Normalization", "BatchNorm", "GhostBatchNorm", "NoisyBatchNorm", "MeanOnlyBatchNorm"),
    *("LpNorm", "GroupNormPlus", "BatchNormGroupNorm", "ParallelGroupBatchNorm"),
    *("WeightNorm", "WeightStandardized"),
]

_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class Normalization(Module):
    """Holds the arrays of a layer of `regjax.normalization`; the base class of all here.

    Make a module of a layer of your own with `layer_type`:

    Example:
      >>> class L1Norm(normalization.nnx.Normalization):
      ...     layer_type = normalization.LpNorm
      >>> layer = L1Norm(1, order=1)
      >>> print(layer(jnp.array([[1.0], [3.0]])).ravel())
      [-0.5  0.5]

    Args:
      num_features: number of channels, or a tuple of numbers for several axes of channels.
      use_running_average: whether to start in evaluation mode; None: each call says it.
      bias_init: function (key, shape, dtype) -> initial bias; None: zeros.
      scale_init: function (key, shape, dtype) -> initial scale; None: ones.
      bias_metadata: metadata of the bias as an `nnx.Param`, such as its sharding.
      scale_metadata: metadata of the scale.
      promote_dtype: function that gives ((inputs, *statistics, scale, bias), dtype=dtype) a common
        type, like flax's, which rounds running statistics to half precision; None: types stay.
      rng_collection: stream of `rngs` for layers that draw random numbers in training.
      rngs: generators of random numbers, needed by those layers, `bias_init` and `scale_init`
        alone. flax's layers always draw two keys.
      **options: options of the layer.

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
        num_features: int | tuple[int, ...],
        *,
        use_running_average: bool | None = False,
        bias_init: Initializer | None = None,
        scale_init: Initializer | None = None,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        promote_dtype: Callable[..., Tree] | None = None,
        rng_collection: str = "dropout",
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ):
        sizes = num_features if isinstance(num_features, tuple) else (num_features,)
        shape = tuple(_checks.integer("num_features", size) for size in sizes)
        self.layer = self.layer_type(**options)
        self.num_features, self.promote_dtype = num_features, promote_dtype
        inits = {"scale": scale_init, "bias": bias_init}
        metadata = {"scale": scale_metadata, "bias": bias_metadata}
        params, state = self.layer.init_params(shape), self.layer.init_state(shape)
        # "scale" and "bias" are None where there is no such.
        self.param_names = tuple(dict.fromkeys(["scale", "bias", *params]))
        self.state_names = tuple(state)
        for name in self.param_names:
            value, init = params.get(name), inits.get(name)
            if value is not None and init is not None:
                if rngs is None:
                    raise ValueError(f"`rngs` must be given with `{name}_init`, got None.")
                value = init(rngs.params(), value.shape, value.dtype)
            boxed = nnx.data(None) if value is None else nnx.Param(value, **metadata.get(name, {}))
            setattr(self, name, boxed)
        for name, array in state.items():
            setattr(self, name, nnx.BatchStat(array))
        self.use_running_average = use_running_average
        self.rngs = nnx.data(None)
        if self.layer.needs_key:
            if rngs is None:
                raise ValueError("`rngs` must be given to a layer that draws random numbers.")
            self.rngs = rngs[rng_collection].fork()

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
          use_running_average: whether the mode is evaluation; None: as the module is set.
          mask: bool, broadcastable to the inputs, which of their values the statistics are of.
        """
        evaluates = nnx.module.first_from(
            use_running_average,
            self.use_running_average,
            error_msg="`use_running_average` must be given to the module or in the call.",
        )
        names = (*self.state_names, *self.param_names)
        own = {name: self._value(name) for name in names}
        used = own
        if self.promote_dtype is not None:
            inputs, *arrays = self.promote_dtype((inputs, *own.values()), dtype=self.layer.dtype)
            used = dict(zip(names, arrays, strict=True))
        outputs, new = self.layer.apply(
            {name: used[name] for name in self.param_names if used[name] is not None},
            # In training they are what is ticked, and nothing else.
            {name: (used if evaluates else own)[name] for name in self.state_names},
            inputs,
            train=not evaluates,
            mask=mask,
            key=None if self.rngs is None or evaluates else self.rngs(),
        )
        if not evaluates:
            for name, value in new.items():
                # Not [...], which writes into the array where it is one of NumPy. As flax's they
                # have no derivative, which a mutable reference could not hold.
                getattr(self, name).set_value(jax.lax.stop_gradient(value))
        return outputs

    def _value(self, name: str) -> Any:  # None where there is no such parameter
        variable = getattr(self, name)
        return None if variable is None else variable[...]

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the mode of a view, for `nnx.view`.

        Args:
          use_running_average: whether it is evaluation; None leaves it.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


class BatchNorm(Normalization):
    """Normalizes by mean and variance of the batch.

    The options are those of `regjax.normalization.BatchNorm`.

    Example:
      >>> layer = normalization.nnx.BatchNorm(1, momentum=0.9)
      >>> outputs = layer(jnp.array([[1.0], [3.0]]))
      >>> print(outputs.ravel(), layer.mean[...], layer.var[...])
      [-1.  1.] [0.2] [1.1]
      >>> layer.eval()
      >>> print(layer(jnp.array([[0.2]])).ravel())
      [0.]
    """

    layer_type = _batch_norm.BatchNorm


class GhostBatchNorm(Normalization):
    """Applies batch norm to small groups of examples.

    The options are those of `regjax.normalization.GhostBatchNorm`.

    Example:
      >>> layer = normalization.nnx.GhostBatchNorm(1, ghost_size=2)
      >>> print(layer(jnp.array([[1.0], [3.0], [10.0], [50.0]])).ravel())
      [-1.  1. -1.  1.]
    """

    layer_type = _batch_norm.GhostBatchNorm


class NoisyBatchNorm(Normalization):
    """Adds noise to the outputs of batch norm.

    The options are those of `regjax.normalization.NoisyBatchNorm`.

    Example:
      >>> layer = normalization.nnx.NoisyBatchNorm(1, scale_jitter=0.5, rngs=nnx.Rngs(0))
      >>> inputs = jnp.array([[1.0], [3.0]])
      >>> print(jnp.array_equal(layer(inputs), layer(inputs)))  # each call draws its own noise
      False
    """

    layer_type = _batch_norm.NoisyBatchNorm


class MeanOnlyBatchNorm(Normalization):
    """Subtracts the mean over the batch alone.

    The options are those of `regjax.normalization.MeanOnlyBatchNorm`.

    Example:
      >>> layer = normalization.nnx.MeanOnlyBatchNorm(1)
      >>> print(layer(jnp.array([[1.0], [3.0]])).ravel())
      [-1.  1.]
    """

    layer_type = _batch_norm.MeanOnlyBatchNorm


class LpNorm(Normalization):
    """Normalizes by another norm than the deviation.

    The options are those of `regjax.normalization.LpNorm`.

    Example:
      >>> layer = normalization.nnx.LpNorm(1, order=1)
      >>> print(layer(jnp.array([[1.0], [3.0]])).ravel())
      [-0.5  0.5]
    """

    layer_type = _lp_norm.LpNorm


class GroupNormPlus(Normalization):
    """Mixes group norm with a batch norm of it.

    The options are those of `regjax.normalization.GroupNormPlus`.

    Example:
      >>> layer = normalization.nnx.GroupNormPlus(
      ...     2, num_groups=1, batch_axes=None, track_running=True
      ... )
      >>> outputs = layer(jnp.array([[1.0, 3.0], [30.0, 10.0]]))
      >>> print(f"{jax.nn.sigmoid(layer.mix_logit[...]):.3f}")  # the share of group normalization
      0.731
    """

    layer_type = _group_norm.GroupNormPlus


class BatchNormGroupNorm(Normalization):
    """Mixes batch norm with a group norm of it.

    The options are those of `regjax.normalization.GroupNormPlus`.

    Example:
      >>> layer = normalization.nnx.BatchNormGroupNorm(2, num_groups=1, degrees_of_freedom=0)
      >>> print(layer(jnp.array([[1.0, 3.0], [5.0, 1.0]])))
      [[-1.  1.]
       [ 1. -1.]]
    """

    layer_type = _group_norm.BatchNormGroupNorm


class ParallelGroupBatchNorm(Normalization):
    """Mixes group norm and batch norm.

    The options are those of `regjax.normalization.GroupNormPlus`.

    Example:
      >>> layer = normalization.nnx.ParallelGroupBatchNorm(2, num_groups=1, degrees_of_freedom=0)
      >>> print(layer(jnp.array([[1.0, 3.0], [30.0, 10.0]])))
      [[-1.     0.462]
       [ 1.    -0.462]]
    """

    layer_type = _group_norm.ParallelGroupBatchNorm
