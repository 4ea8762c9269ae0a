"""Linen modules with kernels made of those that they store: weight norm, standardization."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from flax import linen
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from regjax._base import Tree
from regjax.normalization import _arguments, _weight_norm


class WeightNorm(linen.Module):
    """Runs a module with weight-normalized kernels.

        kernel = scale * v / sqrt(|v|^2 + epsilon)

    Here v is the module's own kernel, and `scale` is a new parameter, g in the paper. The
    parameters have the names of `flax.linen.WeightNorm`, such as "Dense_0/kernel/scale". g starts
    at |v|, so that wrapping a module does not change what it computes; flax's starts at one.

    Example:
      >>> layer = normalization.linen.WeightNorm(linen.Dense(1))
      >>> params = layer.init(jax.random.key(0), jnp.eye(2))["params"]
      >>> params["layer_instance/kernel/scale"] = jnp.array([10.0])  # the length of the kernel
      >>> print(f"{jnp.linalg.norm(layer.apply({'params': params}, jnp.eye(2))):.3f}")
      10.000

    Attributes:
      layer_instance: the module.
      epsilon: at least 0, in units of the kernel squared.
      dtype: type of the normalized kernels; None: the common one of v and g.
      param_dtype: type of g; None: that of v.
      use_scale: whether there is a g; else it is one.
      scale_init: function (key, shape, dtype) -> initial g; None: |v|.
      feature_axes: axes of a kernel with a norm and a scale for each of their indices; None: one
        norm and one scale for the whole kernel.
      variable_filter: words that the path of a parameter must contain one of to be normalized;
        None: all parameters are.

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
    """Is flax's Dense with a weight-normalized kernel.

        kernel used = scale * v / sqrt(|v|^2 + epsilon)

    The parameters are `kernel`, which is v, and `scale`, which starts at |v|, so that the layer
    starts as `kernel_init` makes it. `initializers.data_dependent` finds a better start. The paper
    draws v from N(0, 0.05^2).

    Example:
      >>> layer = normalization.linen.WeightNormDense(1)
      >>> variables = layer.init(jax.random.key(0), jnp.eye(2))
      >>> variables["params"]["scale"] = jnp.array([10.0])  # the length of the kernel
      >>> print(f"{jnp.linalg.norm(layer.apply(variables, jnp.eye(2))):.3f}")
      10.000

    Attributes:
      use_scale: whether there is a scale; else it is one.
      scale_init: function (key, shape, dtype) -> initial scale; None: |v|.
      epsilon: at least 0, in units of the kernel squared.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868.
    """


class WeightNormConv(_WeightNorm, linen.Conv):
    """Is flax's Conv with a weight-normalized kernel, like `WeightNormDense`.

    Example:
      >>> layer = normalization.linen.WeightNormConv(4, (3, 3))
      >>> variables = jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> print(variables["params"]["kernel"].shape, variables["params"]["scale"].shape)
      (3, 3, 2, 4) (4,)
    """


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
    """Is flax's Dense with a standardized kernel (`regjax.normalization.standardize_weight`).

    Example:
      >>> layer = normalization.linen.WeightStandardizedDense(1, use_bias=False)
      >>> kernel, variables = layer.init_with_output(jax.random.key(0), jnp.eye(3))
      >>> print(f"{abs(kernel.mean()):.3f} {kernel.std(ddof=1):.2f}")  # of the kernel that it uses
      0.000 1.00

    Attributes:
      epsilon: at least 0, in units of the kernel, or of its square with "variance".
      degrees_of_freedom: subtracted from the number of weights in the variance.
      epsilon_added_to: "deviation" or "variance", what `epsilon` is added to.
    """


class WeightStandardizedConv(_WeightStandardized, linen.Conv):
    """Is flax's Conv with a standardized kernel, like `WeightStandardizedDense`.

    Example:
      >>> layer = normalization.linen.WeightStandardizedConv(4, (3, 3), use_bias=False)
      >>> variables = layer.init(jax.random.key(0), jnp.ones((1, 8, 8, 2)))
      >>> outputs = layer.apply(variables, jnp.ones((1, 8, 8, 2)))
      >>> print(f"{abs(outputs[0, 4, 4]).max():.3f}")  # filters of mean zero see no constant
      0.000
    """
