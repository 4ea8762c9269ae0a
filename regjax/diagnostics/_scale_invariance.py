"""Which weights have no scale: those that a normalization divides out again."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from regjax import _checks, _layouts, _numerics
from regjax._arguments import checked
from regjax._axes import Layouts
from regjax._base import Mask, ModelFn, Params, PRNGKey, Tree, as_partial
from regjax._printing import legible

# A gradient this small beside the largest one of any leaf is rounding (a bias before a batch norm).
_INSENSITIVE = 1e-5


@legible
class ScaleInvarianceResult(NamedTuple):
    """What was found of each leaf; trees like the parameters.

    Attributes:
      mask: Python bools: whether the outputs depend on the directions of the leaf's groups, but not
        on their scales.
      radial_fraction: (), |<w, g>| / (|w| |g|), the largest over the groups w and two gradients g.
      function_change: (), |f(rescaled) - f| / |f| with each group multiplied by its own factor.
      relative_gradient_norm: (), the smallest |g| of the groups, over the largest of any leaf. If
        it is zero, the outputs do not depend on a group at all.
    """

    mask: Mask
    radial_fraction: Tree
    function_change: Tree
    relative_gradient_norm: Tree


@checked
def scale_invariant_mask(
    model_fn: ModelFn,
    params: Params,
    inputs: Tree,
    *,
    key: PRNGKey,
    per_filter: bool = True,
    tol: ArrayLike = 1e-3,
    layout: Layouts = None,
) -> ScaleInvarianceResult:
    """Finds the weights whose scale does not change the outputs, as those before a batch norm.

    A leaf is scale-invariant if three conditions hold. The gradient of a random linear function of
    the outputs is orthogonal to each group of weights. The outputs do not change if each group is
    multiplied by its own factor between 1/2 and 2. And the outputs depend on each group. The test
    costs two gradients, and one forward pass per leaf.

    Example:
      >>> def model_fn(params, x):
      ...     hidden = x @ params["in"]
      ...     return hidden / jnp.linalg.norm(hidden, axis=0) @ params["out"]
      >>> params = {"in": jnp.array([[1.0], [2.0]]), "out": jnp.array([[3.0]])}
      >>> result = diagnostics.scale_invariant_mask(
      ...     model_fn, params, jnp.eye(2), key=jax.random.key(0)
      ... )
      >>> print(result.mask)
      {'in': True, 'out': False}

    Args:
      model_fn: (params, inputs) -> outputs in train mode, such as
        `regjax.model_function(model, mode="train")`. With stored statistics no weight is
        scale-invariant.
      params: tree of parameters.
      inputs: inputs of the model.
      key: typed key of the random functions and factors.
      per_filter: True: the groups are the output channels of kernels. False: each leaf is one
        group. Leaves that are no kernels are always one group, and stacked layers have their own
        groups.
      tol: tolerance of `radial_fraction` and `function_change`.
      layout: which axes of the leaves are channels, and which stack layers (`regjax.Layout`); None:
        a guess, which for plain kernels is that the channels are last.

    Returns:
      A `ScaleInvarianceResult`; its mask is what `transforms.rescale_weights` takes.

    Raises:
      ValueError: `tol` is negative, outputs or gradients are not finite, or `layout` must tell the
        axes of a leaf.
      TypeError: a parameter is not real floating point, `key` is not a typed key, or an argument is
        traced.
    """
    _checks.floating_tree("params", params)
    _checks.non_negative("tol", tol, finite=True)
    _checks.key("key", key)
    for name, tree in (("params", params), ("inputs", inputs), ("key", key), ("tol", tol)):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
            raise TypeError(
                f"`{name}` must be concrete, as the mask is of Python bools, got tracers."
            )
    with jax.ensure_compile_time_eval():
        groups = [axes.group(per_filter) for axes in _layouts.of_leaves(layout, params)]
        return _measured(model_fn, params, inputs, key, groups, tol)


def _measured(
    model_fn: ModelFn,
    params: Params,
    inputs: Tree,
    key: PRNGKey,
    groups: list[tuple[int, ...]],
    tol: ArrayLike,
) -> ScaleInvarianceResult:
    functional_key, factor_key = jax.random.split(key)
    outputs: Any = jax.eval_shape(as_partial(model_fn), params, inputs)
    _checks.floating_tree("model_fn", outputs)
    outputs, pull_back = jax.vjp(lambda p: model_fn(p, inputs), params)
    gradients = [
        jax.tree.leaves(pull_back(optax.tree.random_like(k, outputs))[0])
        for k in jax.random.split(functional_key)
    ]
    leaves, treedef = jax.tree.flatten(params)
    largest = jnp.max(jnp.stack([_numerics.scaled_norm(g) for g in gradients[0]]))
    fractions, changes, sizes, mask = [], [], [], []
    for i, leaf in enumerate(leaves):
        fraction, size = _radial([gradient[i] for gradient in gradients], leaf, groups[i])
        factors = _factors(jax.random.fold_in(factor_key, i), leaf, groups[i])
        moved = jax.tree.unflatten(treedef, [*leaves[:i], factors * leaf, *leaves[i + 1 :]])
        change = _distance(model_fn(moved, inputs), outputs)
        size = _numerics.divide(size, largest)
        if not jnp.all(jnp.isfinite(jnp.stack([fraction, change, size]))):
            raise ValueError(
                "`params` and `inputs` must give finite outputs and gradients, got NaN or infinity."
            )
        invariant = (fraction < tol) & (change < tol) & (size > _INSENSITIVE)
        fractions.append(fraction)
        changes.append(change)
        sizes.append(size)
        mask.append(bool(invariant))
    return ScaleInvarianceResult(
        *(jax.tree.unflatten(treedef, found) for found in (mask, fractions, changes, sizes))
    )


def _radial(
    gradients: list[jax.Array], leaf: jax.Array, axes: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """Finds the largest radial fraction, and the smallest gradient norm, over the groups."""
    radial, fractions, norms = _numerics.units_along(leaf, axes), [], []
    for gradient in gradients:
        along = jnp.sum(radial * _numerics.units_along(gradient, axes), axes)
        fractions.append(jnp.max(jnp.abs(along)))
        # Weights that are zero have no direction to depend on.
        has_direction = jnp.any(leaf != 0, axes, keepdims=True)
        norms.append(jnp.min(jnp.where(has_direction, _numerics.norms_along(gradient, axes), 0)))
    return jnp.maximum(*fractions), jnp.maximum(*norms)


def _factors(key: jax.Array, leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Draws a factor for each group, in [1/2, 2] and not near 1, of the shape of the leaf."""
    shape = jnp.sum(leaf, axes, keepdims=True).shape
    sign_key, size_key = jax.random.split(key)
    size = jax.random.uniform(size_key, shape, leaf.dtype, math.log(2) / 2, math.log(2))
    factors = jnp.exp(jax.random.rademacher(sign_key, shape, leaf.dtype) * size)
    return jnp.broadcast_to(factors, leaf.shape)


def _distance(one: Tree, other: Tree) -> jax.Array:
    difference = _numerics.scaled_norm(jax.tree.map(jnp.subtract, one, other))
    norm = _numerics.scaled_norm(other)
    return _numerics.divide(difference, norm, otherwise=difference)
