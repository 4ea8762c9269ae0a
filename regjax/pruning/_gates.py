"""Gates of units, applied to the kernels that the units go into: the model stays as it is.

Multiplying a consumer's slice by z is multiplying the unit by z right in front of it: behind its
normalization, activation and pooling. No optimiser sees the gates, as they are no parameters.
"""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from regjax import _checks, _tree
from regjax._arguments import checked
from regjax._base import Params, Tree
from regjax.pruning._structure import Slice, Structure, check_structure

Units: TypeAlias = dict[str, jax.Array]
"""An array (num_units,) for each group of a `Structure`, by its name."""


@checked
def unit_gates(structure: Structure, params: Params) -> Units:
    """Makes gates of one, which change nothing.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> print(*pruning.unit_gates(structure, params).values())
      [1. 1. 1.]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      params: parameters like those it was found with.

    Returns:
      Ones (num_units,) for each group, in float32 at least.

    Raises:
      ValueError: `params` are another tree.
      TypeError: a parameter is not real floating point, or `structure` is not a `Structure`.
    """
    check_structure(structure, params)
    dtype = _tree.vector_dtype(params)
    return {name: jnp.ones(group.num_units, dtype) for name, group in structure.groups.items()}


@checked
def apply_gates(structure: Structure, params: Params, gates: Units) -> Params:
    """Multiplies the weights that read each unit by the unit's gate.

    With the new parameters the model computes what it would with gates at its units, so that
    `loss_fn(apply_gates(structure, params, gates), *batch)` is a loss of the gates.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> gates = {name: jnp.array([1.0, 0.0, 0.5]) for name in structure.groups}
      >>> print(pruning.apply_gates(structure, params, gates)["out"].ravel())
      [1.  0.  0.5]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      params: parameters like those it was found with.
      gates: floating point array (num_units,) for each group; 0 removes a unit.

    Returns:
      A tree like `params`, with the same dtypes.

    Raises:
      ValueError: `params` or `gates` are another tree.
      TypeError: a parameter or a gate is not real floating point, or `structure` is not a
        `Structure`.
    """
    check_structure(structure, params)
    _checks.floating_leaves("gates", check_units("gates", structure, gates))
    leaves, treedef = jax.tree.flatten(params)
    for name, group in structure.groups.items():
        for part in group.consumers:
            factor = _of_positions(part, gates[name], 1).astype(leaves[part.leaf].dtype)
            leaves[part.leaf] = leaves[part.leaf] * _lifted(part, factor, leaves[part.leaf].ndim)
    return jax.tree.unflatten(treedef, leaves)


@checked
def gate_gradients(structure: Structure, params: Params, grads: Params) -> Units:
    """Computes the derivative of the loss with respect to each gate from the parameters' gradient.

        d loss / dz = sum w dw    at z = 1

    The sum goes over the weights w that read the unit, with the loss's gradient dw. If only
    homogeneous functions such as ReLU and pooling stand between a normalization and these weights,
    this is gamma dgamma + beta dbeta of its scale and bias, the gate of the paper.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.array([[1.0], [2.0], [0.0]])}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> grads = jax.grad(lambda params: model_fn(params, jnp.ones((2, 1))).mean())(params)
      >>> print(*pruning.gate_gradients(structure, params, grads).values())
      [1. 2. 0.]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      params: parameters like those it was found with.
      grads: gradient of the loss, a tree like `params`.

    Returns:
      Derivatives (num_units,) for each group, in float32 at least, in units of the loss.

    Raises:
      ValueError: `params` or `grads` are another tree.
      TypeError: a leaf is not real floating point, or `structure` is not a `Structure`.

    References:
      P. Molchanov et al. (2019), arXiv:1906.10771.
    """
    check_structure(structure, params)
    _checks.same_tree("grads", _checks.floating_tree("grads", grads), structure.params)
    weights, slopes = jax.tree.leaves(params), jax.tree.leaves(grads)
    found = {}
    for name, group in structure.groups.items():
        total = jnp.zeros(group.num_units, _tree.vector_dtype(params))
        for part in group.consumers:
            kernel, others = weights[part.leaf], _others(part, weights[part.leaf])
            products = jnp.sum(_tree.wide(kernel) * _tree.wide(slopes[part.leaf]), others)
            owned = np.flatnonzero(part.units >= 0)
            total = total.at[part.units[owned]].add(products[owned].astype(total.dtype))
        found[name] = total
    return found


@checked
def parameter_masks(structure: Structure, params: Params, unit_masks: Units) -> Tree:
    """Marks the weights that remain when units are removed, for `transforms.hold_masks`.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> unit_masks = {name: jnp.array([True, False, True]) for name in structure.groups}
      >>> masks = pruning.parameter_masks(structure, params, unit_masks)
      >>> print(masks["in"].ravel(), masks["out"].ravel())
      [ True False  True] [ True False  True]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      params: parameters like those it was found with.
      unit_masks: bool array (num_units,) for each group, False for units to be removed.

    Returns:
      A tree like `params` of bool arrays: False in the producers, scales, biases and consumers of
      a removed unit.

    Raises:
      ValueError: `params` or `unit_masks` are another tree.
      TypeError: a mask is not boolean.
    """
    check_structure(structure, params)
    _checks.bool_tree("unit_masks", check_units("unit_masks", structure, unit_masks))
    leaves, treedef = jax.tree.flatten(params)
    masks = [jnp.ones(jnp.shape(leaf), bool) for leaf in leaves]
    for name, group in structure.groups.items():
        for part in (*group.producers, *group.scales, *group.biases, *group.consumers):
            kept = _of_positions(part, unit_masks[name], True)
            masks[part.leaf] &= _lifted(part, kept, masks[part.leaf].ndim)
    return jax.tree.unflatten(treedef, masks)


def check_units(name: str, structure: Structure, units: Units) -> Units:
    """Returns `units` if they hold an array (num_units,) for each group, and nothing else."""
    if not isinstance(units, dict) or set(units) != set(structure.groups):
        found = sorted(units) if isinstance(units, dict) else type(units).__name__
        raise ValueError(
            f"`{name}` must be a dict of the groups of the structure, {sorted(structure.groups)}, "
            f"got {found}."
        )
    for group, values in units.items():
        expected = (structure.groups[group].num_units,)
        if np.shape(values) != expected:
            raise ValueError(
                f"`{name}[{group!r}]` must have shape {expected}, got {np.shape(values)}."
            )
    return units


def _of_positions(part: Slice, values: jax.Array, other: ArrayLike) -> jax.Array:
    """Takes the value of the unit at each position along the axis, `other` where there is none."""
    values = jnp.asarray(values)
    return jnp.where(part.units >= 0, values[part.units], jnp.asarray(other, values.dtype))


def _lifted(part: Slice, vector: jax.Array, ndim: int) -> jax.Array:
    """Lays the vector along the axis of the slice, all other axes of length one."""
    return jnp.expand_dims(vector, [i for i in range(ndim) if i != part.axis])


def _others(part: Slice, leaf: jax.Array) -> tuple[int, ...]:
    return tuple(i for i in range(jnp.ndim(leaf)) if i != part.axis)
