"""Kernels made of others: direction and length apart, or standardized, for each output unit."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import PyTreeDef

from regjax import _checks, _layouts, _numerics, _selection, _tree
from regjax._arguments import checked
from regjax._axes import Axes, Layout, Layouts
from regjax._base import Mask, Params, Tree
from regjax._one_program import one_program
from regjax._printing import legible
from regjax.normalization import _statistics


@legible
class SplitWeightResult(NamedTuple):
    """A kernel as direction and length.

        w = g v / |v|

    Attributes:
      v: like the kernel, its direction. The length of v does not change w.
      g: (channels,), the length of each output unit's weights; for stacked layers (layers,
        channels), in the order of the kernel's axes.
    """

    v: jax.Array
    g: jax.Array


@checked
def weight_normalize(v: jax.Array, g: jax.Array, *, layout: Layout | None = None) -> jax.Array:
    """Makes a kernel from a direction and a length for each output unit.

        w = g v / |v|

    The size of v does not matter. A column of zeros in v gives zeros and has gradient zero.

    Example:
      >>> v, g = jnp.array([[3.0], [4.0]]), jnp.array([10.0])
      >>> print(normalization.weight_normalize(v, g).ravel())
      [6. 8.]

    Args:
      v: directions, (inputs, channels) or as `layout` says.
      g: lengths, (channels,); for stacked layers (layers, channels), in the order of the axes of
        `v`.
      layout: which axes of `v` are inputs, over which the norm goes, which are channels, and which
        stack layers; None: the channels are last.

    Returns:
      An array like `v`.

    Raises:
      ValueError: `v` has no input axes or no entries, `layout` names axes that it has not, or `g`
        has another shape.
      TypeError: `v` or `g` is not real floating point.

    References:
      T. Salimans, D. Kingma (2016), arXiv:1602.07868, equation 2.
    """
    v, axes = _checked("v", v, layout)
    return _joined(v, _checks.floating_array("g", g), axes)


@checked
def split_weight(w: jax.Array, *, layout: Layout | None = None) -> SplitWeightResult:
    """Splits a kernel into direction v = w and length g = |w|: the same kernel.

    Args:
      w: kernel, (inputs, channels) or as `layout` says.
      layout: which axes of `w` are inputs, which are channels, and which stack layers; None: the
        channels are last.

    Returns:
      A `SplitWeightResult`.

    Raises:
      ValueError: `w` has no input axes or no entries, or `layout` names axes that it has not.
      TypeError: `w` is not real floating point.
    """
    return _split(*_checked("w", w, layout))


@checked
def split_weights(params: Params, *, mask: Mask, layout: Layouts = None) -> Tree:
    """Splits the masked kernels into direction and length, which gives weight norm for any model.

    `join_weights` is the inverse. Train the split parameters with the loss

        loss_fn(join_weights(params), *batch)

    Example:
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.zeros(1)}
      >>> split = normalization.split_weights(params, mask={"kernel": True, "bias": False})
      >>> print(split["kernel"].v.ravel(), split["kernel"].g)
      [3. 4.] [5.]

    Args:
      params: tree of parameters.
      mask: which kernels.
      layout: which axes of the kernels are inputs, channels and layers (`regjax.Layout`); None: a
        guess, which for plain kernels is that the channels are last.

    Returns:
      A tree like `params` with a `SplitWeightResult` instead of each masked kernel.

    Raises:
      ValueError: the mask is another tree, or a masked leaf has no input axes or axes that have
        to be told.
      TypeError: a leaf is not real floating point.
    """
    treedef: PyTreeDef = jax.tree.structure(params)
    chosen = _selection.mask_leaves(mask, params)
    rows = zip(
        jax.tree_util.tree_leaves_with_path(params),
        chosen,
        _layouts.of_leaves(layout, params, chosen),
        strict=True,
    )
    return jax.tree.unflatten(
        treedef,
        [
            _split(_kernel(f"params{jax.tree_util.keystr(path)}", leaf, axes), axes)
            if split
            else leaf
            for (path, leaf), split, axes in rows
        ],
    )


@checked
def join_weights(params: Tree, *, layout: Layouts = None) -> Params:
    """Joins the kernels that `split_weights` has split.

    Example:
      >>> mask = {"kernel": True, "bias": False}
      >>> params = {"kernel": jnp.array([[3.0], [4.0]]), "bias": jnp.zeros(1)}
      >>> split = normalization.split_weights(params, mask=mask)
      >>> split["kernel"] = split["kernel"]._replace(g=jnp.array([10.0]))  # twice the length
      >>> print(normalization.join_weights(split)["kernel"].ravel())
      [6. 8.]

    Args:
      params: tree of parameters with `SplitWeightResult`s.
      layout: the one that was passed to `split_weights`.

    Returns:
      The tree that the model knows.

    Raises:
      ValueError: the lengths of a kernel do not have the shape that `layout` gives them.
    """
    is_split = lambda leaf: isinstance(leaf, SplitWeightResult)
    kernels = jax.tree.map(
        lambda leaf: leaf.v if is_split(leaf) else leaf, params, is_leaf=is_split
    )
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_split)
    axes = _layouts.of_leaves(layout, kernels, [is_split(leaf) for leaf in leaves])
    pairs = zip(leaves, axes, strict=True)
    return jax.tree.unflatten(
        treedef, [_joined(leaf.v, leaf.g, own) if is_split(leaf) else leaf for leaf, own in pairs]
    )


@checked
def standardize_weight(
    kernel: jax.Array,
    *,
    layout: Layout | None = None,
    epsilon: float = 1e-5,
    degrees_of_freedom: int = 1,
    epsilon_added_to: str = "deviation",
) -> jax.Array:
    """Standardizes the weights of each output unit: weight standardization.

        w = (k - mean(k)) / (std(k) + epsilon)

    Mean and standard deviation go over the inputs of each output unit. The defaults are those of
    the authors' code. timm's layers have `epsilon=1e-6, degrees_of_freedom=0,
    epsilon_added_to="variance"`, which is (k - mean) / sqrt(var + epsilon). Weights whose standard
    deviation is not far above `epsilon` keep a part of their size. With `epsilon=0` the size of a
    kernel does not matter at all. A constant filter gives zeros.

    Example:
      >>> kernel = jnp.array([[1.0], [2.0], [3.0]])
      >>> print(normalization.standardize_weight(kernel).ravel())
      [-1.  0.  1.]

    Args:
      kernel: (inputs, channels) or as `layout` says.
      layout: which axes of the kernel are inputs, which are channels, and which stack layers; None:
        the channels are last.
      epsilon: at least 0, in units of the kernel, or of its square with "variance".
      degrees_of_freedom: subtracted from the number of weights in the variance.
      epsilon_added_to: "deviation" or "variance", what `epsilon` is added to.

    Returns:
      An array like `kernel`.

    Raises:
      ValueError: `kernel` has no input axes or no more weights to a unit than
        `degrees_of_freedom`, `layout` names axes that it has not, or an option is out of its range.
      TypeError: `kernel` is not real floating point.

    References:
      S. Qiao et al. (2019), arXiv:1903.10520, by default in the form of the authors' code.
    """
    _checks.number("epsilon", epsilon)
    _checks.integer("degrees_of_freedom", degrees_of_freedom, minimum=0)
    _checks.choice("epsilon_added_to", epsilon_added_to, ("deviation", "variance"))
    kernel, axes = _checked("kernel", kernel, layout)
    others, in_root = axes.inputs, epsilon_added_to == "variance"
    freedom = math.prod(kernel.shape[axis] for axis in others) - degrees_of_freedom
    if freedom < 1:
        raise ValueError(
            f"`kernel` must have more than {degrees_of_freedom} weights to a unit, got shape "
            f"{kernel.shape}."
        )
    added = math.sqrt(epsilon) if in_root else epsilon
    scaled, power = _numerics.near_one(_tree.wide(kernel), others, at_least=added)
    centred = scaled - jnp.mean(scaled, others, keepdims=True)
    # What rounding leaves of a constant filter is no direction.
    size = jnp.max(jnp.abs(scaled), others, keepdims=True)
    rounding = 8 * jnp.finfo(scaled.dtype).eps * size
    varies = jnp.max(jnp.abs(centred), others, keepdims=True) > rounding
    centred = jnp.where(jnp.isnan(size) | varies, centred, 0)
    variance = jnp.sum(centred**2, others, keepdims=True) / freedom
    beside = added * power
    if in_root:
        deviation = _statistics.root(variance + beside**2)
    else:
        deviation = _statistics.root(variance) + beside
    return _numerics.divide(centred, deviation).astype(kernel.dtype)


def lengths(kernel: jax.Array, feature_axes: tuple[int, ...] | None) -> jax.Array:
    """Returns |v| of a kernel for each index of some axes, (sizes of these axes)."""
    matrix, _ = as_matrix(kernel, feature_axes)
    axes = _feature_axes(kernel, feature_axes)
    return split_weight(matrix).g.reshape([kernel.shape[axis] for axis in axes])


def normalized(
    kernel: jax.Array, scale: jax.Array | None, feature_axes: tuple[int, ...] | None, epsilon: float
) -> jax.Array:
    """Computes scale v / sqrt(|v|^2 + epsilon) for each index of some axes of a kernel v."""
    matrix, restored = as_matrix(kernel, feature_axes)
    g = jnp.ones(matrix.shape[1], kernel.dtype) if scale is None else scale.reshape(-1)
    g = g.astype(jnp.promote_types(g.dtype, kernel.dtype))
    wide = matrix.astype(g.dtype)
    if epsilon:
        # One weight more has the square epsilon, at any size of the others.
        wide = jnp.concatenate([wide, jnp.full_like(wide[:1], math.sqrt(epsilon))])
    return restored(weight_normalize(wide, g)[: len(matrix)])


def as_matrix(
    kernel: jax.Array, feature_axes: tuple[int, ...] | None
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Returns a kernel as a matrix (all other axes, these axes), and the way back."""
    axes = _feature_axes(kernel, feature_axes)
    last = range(kernel.ndim - len(axes), kernel.ndim)
    moved = jnp.moveaxis(kernel, axes, last)
    features = math.prod(kernel.shape[axis] for axis in axes)
    back = lambda matrix: jnp.moveaxis(matrix.reshape(moved.shape), last, axes)
    return moved.reshape(-1, features), back


def _feature_axes(kernel: jax.Array, feature_axes: tuple[int, ...] | None) -> tuple[int, ...]:
    axes = feature_axes or ()
    if not kernel.size or any(not -kernel.ndim <= axis < kernel.ndim for axis in axes):
        raise ValueError(
            f"`feature_axes` must be axes of each kernel, got {feature_axes} for one of shape "
            f"{kernel.shape}."
        )
    found = tuple(sorted({axis % kernel.ndim for axis in axes}))
    if len(found) == kernel.ndim:
        raise ValueError(
            f"`feature_axes` must leave an axis to the norm, got {feature_axes} for a kernel of "
            f"shape {kernel.shape}."
        )
    return found


def _joined(v: jax.Array, g: jax.Array, axes: Axes) -> jax.Array:
    shape = tuple(v.shape[axis] for axis in axes.units)
    if jnp.shape(g) != shape:
        raise ValueError(f"`g` must have shape {shape}, got {jnp.shape(g)}.")
    return _of_length(v, g, axes)


@one_program(static="axes")
def _of_length(v: jax.Array, g: jax.Array, axes: Axes) -> jax.Array:
    scaled, _ = _numerics.near_one(_tree.wide(v), axes.inputs)
    norm = _statistics.root(jnp.sum(scaled**2, axes.inputs, keepdims=True))
    factor = _numerics.divide(jnp.expand_dims(jnp.asarray(g, norm.dtype), axes.inputs), norm)
    return (scaled * jnp.broadcast_to(factor, v.shape)).astype(v.dtype)


@one_program(static="axes")
def _length(w: jax.Array, axes: Axes) -> jax.Array:
    scaled, power = _numerics.near_one(_tree.wide(w), axes.inputs)
    norm = _statistics.root(jnp.sum(scaled**2, axes.inputs))
    return (norm / jnp.squeeze(power, axes.inputs)).astype(w.dtype)


def _split(w: jax.Array, axes: Axes) -> SplitWeightResult:
    return SplitWeightResult(w, _length(w, axes))


def _checked(name: str, kernel: jax.Array, layout: Layout | None) -> tuple[jax.Array, Axes]:
    kernel = _checks.floating_array(name, kernel)
    axes = _layouts.of_array(name, layout, kernel)
    return _kernel(name, kernel, axes), axes


def _kernel(name: str, kernel: jax.Array, axes: Axes) -> jax.Array:
    if not axes.is_kernel or not kernel.size:
        raise ValueError(
            f"`{name}` must have axes of inputs beside those of outputs and no empty one, got "
            f"shape {jnp.shape(kernel)}."
        )
    return kernel
