"""nnx modules that run with kernels made of those that they store: weight norm, standardization."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from regjax import _checks
from regjax._base import Tree
from regjax._nnx_module import Module
from regjax.normalization import _arguments, _weight_norm

_Path: TypeAlias = tuple[str | int, ...]
_KERNELS = nnx.PathContains("kernel")


class Reparametrized(Module):
    """A module that runs with other kernels than those that it stores, which are left alone."""

    def __init__(
        self,
        layer: Callable[..., Tree],
        *,
        feature_axes: int | Sequence[int] | None,
        variable_filter: nnx.filterlib.Filter,
    ):
        kind = type(layer).__name__
        if not isinstance(layer, nnx.Module):
            raise TypeError(f"`layer` must be an nnx module with a kernel, got {kind}.")
        self.layer = layer
        self.feature_axes = (
            None if feature_axes is None else _arguments.axes("feature_axes", feature_axes)
        )
        self.variable_filter = nnx.filterlib.to_predicate(variable_filter)
        if not self._kernels():
            if variable_filter == _KERNELS:
                raise TypeError(f"`layer` must be an nnx module with a kernel, got {kind}.")
            names = ["/".join(map(str, path)) for path, _ in self._params(self.layer)]
            raise ValueError(
                f"`variable_filter` must match a parameter of `layer`, got {variable_filter!r} for "
                f"{', '.join(names) or 'none'}."
            )

    def _params(self, layer: nnx.Module) -> list[tuple[_Path, nnx.Param]]:
        return list(nnx.to_flat_state(nnx.state(layer, nnx.Param)))

    def _kernels(self) -> dict[_Path, jax.Array]:
        """Returns the stored kernels by path."""
        params = self._params(self.layer)
        return {path: param[...] for path, param in params if self.variable_filter(path, param)}

    def _kernel(self, path: _Path, stored: jax.Array) -> jax.Array:
        raise NotImplementedError

    def __call__(self, *args: Tree, **kwargs: Tree) -> Tree:
        """Returns the outputs of the layer with the kernels that are made of the stored ones."""
        made = {path: self._kernel(path, kernel) for path, kernel in self._kernels().items()}
        # Another object: the stored kernels are never written.
        graph, params, rest = nnx.split(self.layer, nnx.Param, ...)
        flat = dict(nnx.to_flat_state(params))
        flat.update({path: flat[path].replace(kernel) for path, kernel in made.items()})
        layer = nnx.merge(graph, nnx.from_flat_state(flat), rest)
        outputs = layer(*args, **kwargs)
        # Running statistics, counts of keys, what is sown.
        nnx.update(self.layer, nnx.state(layer, nnx.Not(nnx.Param)))
        return outputs


class WeightNorm(Reparametrized):
    """Runs a layer with a weight-normalized kernel.

        kernel = scale * v / sqrt(|v|^2 + epsilon)

    Here v is the layer's own kernel, and `scale` is a new parameter, g in the paper. It starts at
    |v|, so that wrapping a layer does not change what it computes. `initializers.data_dependent`
    finds a better start. Unlike `flax.nnx.WeightNorm`, this class trains g and never writes v. The
    paper draws v from N(0, 0.05^2).

    Example:
      >>> layer = normalization.nnx.WeightNorm(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
      >>> layer.scale[...] = jnp.array([10.0])  # the length of the kernel
      >>> inputs = jnp.eye(2)
      >>> print(f"{jnp.linalg.norm(layer(inputs)):.3f}")
      10.000

    Args:
      layer: nnx.Linear, nnx.Conv or any other module. Its running statistics and keys are updated
        as usual.
      feature_axes: axes of a kernel with a norm and a scale for each of their indices; None: one
        norm and one scale for the whole kernel; -2 for a transposed convolution with
        `transpose_kernel`.
      use_scale: whether there is a g; else it is one.
      scale_init: function (key, shape, dtype) -> initial g; None: |v|. flax's starts at one.
      epsilon: at least 0, in units of the kernel squared.
      dtype: type of the normalized kernel; None: the common one of v and g.
      param_dtype: type of g; None: that of v.
      variable_filter: an nnx filter for the parameters that are normalized.
      promote_dtype: function that gives ((v, g), dtype=dtype) a common type; None: g gets that of
        v.
      rngs: generators of random numbers, needed by `scale_init` alone.

    Attributes:
      scale: g, if the layer's own `kernel` alone is normalized; with several kernels, nested dicts
        like the module's.

    Raises:
      TypeError: `layer` is not a module, or an option is of another type.
      ValueError: the filter matches nothing, a kernel lacks an axis or has no other, or an option
        is out of its range.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868.
    """

    def __init__(
        self,
        layer: Callable[..., Tree],
        *,
        feature_axes: int | Sequence[int] | None = -1,
        use_scale: bool = True,
        scale_init: Initializer | None = None,
        epsilon: float = 0.0,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        variable_filter: nnx.filterlib.Filter = _KERNELS,
        promote_dtype: Callable[..., Tree] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        super().__init__(layer, feature_axes=feature_axes, variable_filter=variable_filter)
        self.use_scale = _checks.boolean("use_scale", use_scale)
        self.epsilon = _checks.number("epsilon", epsilon)
        self.dtype, self.promote_dtype = dtype, promote_dtype
        for name, value in (("dtype", dtype), ("param_dtype", param_dtype)):
            if value is not None:
                _checks.inexact_dtype(name, value)
        if scale_init is not None and use_scale and rngs is None:
            raise ValueError("`rngs` must be given with `scale_init`, got None.")
        scales = {}
        for path, kernel in self._kernels().items():
            length = _weight_norm.lengths(kernel, self.feature_axes)
            own = length.dtype if param_dtype is None else param_dtype
            if scale_init is not None and rngs is not None:
                length = scale_init(rngs.params(), length.shape, own)
            scales[path] = nnx.Param(length.astype(own))
        is_plain = list(scales) == [("kernel",)]
        tree = scales[("kernel",)] if is_plain else nnx.traversals.unflatten_mapping(scales)
        self.scale = nnx.data(tree if use_scale else None)

    def _kernel(self, path: _Path, stored: jax.Array) -> jax.Array:
        scale = None
        if self.use_scale:
            found = self.scale
            for name in () if isinstance(found, nnx.Variable) else path:
                found = found[name]
            scale = found[...]
        if self.promote_dtype is not None:
            stored, scale = self.promote_dtype((stored, scale), dtype=self.dtype)
        made = _weight_norm.normalized(stored, scale, self.feature_axes, self.epsilon)
        return made if self.dtype is None else made.astype(self.dtype)


class WeightStandardized(Reparametrized):
    """Runs a layer with a standardized kernel.

        kernel = (k - mean(k)) / (std(k) + epsilon)

    Here k is the layer's own kernel; see `regjax.normalization.standardize_weight`.

    Example:
      >>> layer = nnx.Linear(3, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> layer = normalization.nnx.WeightStandardized(layer)
      >>> kernel = layer(jnp.eye(3))  # the one that it uses
      >>> print(f"{abs(kernel.mean()):.3f} {kernel.std(ddof=1):.2f}")
      0.000 1.00

    Args:
      layer: nnx.Linear, nnx.Conv or any other module.
      feature_axes: axes of a kernel with a mean and a deviation for each of their indices, at least
        one.
      epsilon: at least 0, in units of the kernel, or of its square with "variance".
      degrees_of_freedom: subtracted from the number of weights in the variance.
      epsilon_added_to: "deviation" or "variance", what `epsilon` is added to.
      variable_filter: an nnx filter for the parameters that are standardized.

    Raises:
      TypeError: `layer` is not a module.
      ValueError: the filter matches nothing, or an option is out of its range.
    """

    def __init__(
        self,
        layer: Callable[..., Tree],
        *,
        feature_axes: int | Sequence[int] = -1,
        epsilon: float = 1e-5,
        degrees_of_freedom: int = 1,
        epsilon_added_to: str = "deviation",
        variable_filter: nnx.filterlib.Filter = _KERNELS,
    ):
        super().__init__(layer, feature_axes=feature_axes, variable_filter=variable_filter)
        self.epsilon, self.degrees_of_freedom = epsilon, degrees_of_freedom
        self.epsilon_added_to = epsilon_added_to
        for path, kernel in self._kernels().items():
            self._kernel(path, kernel)  # raises where an option is wrong

    def _kernel(self, path: _Path, stored: jax.Array) -> jax.Array:
        matrix, restored = _weight_norm.as_matrix(stored, self.feature_axes)
        return restored(
            _weight_norm.standardize_weight(
                matrix,
                epsilon=self.epsilon,
                degrees_of_freedom=self.degrees_of_freedom,
                epsilon_added_to=self.epsilon_added_to,
            )
        )
