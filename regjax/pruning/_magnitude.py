"""Scores without data: the size of weights, and chance. What other scores have to beat."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from regjax import _checks, _tree
from regjax._arguments import checked
from regjax._base import Params, PRNGKey, Tree
from regjax._space import Space
from regjax.pruning._gates import Units
from regjax.pruning._structure import Group, Slice, Structure, check_structure


@checked
def incoming_norm(structure: Structure, params: Params) -> Units:
    """Computes the norm of the weights that compute each unit, without biases.

    Example:
      >>> params = {"in": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "out": jnp.ones((2, 1))}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 2)))
      >>> print(*pruning.incoming_norm(structure, params).values())
      [5. 1.]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      params: tree of parameters.

    Returns:
      {group: (num_units,)}, over all kernels that compute a unit together.

    Raises:
      ValueError: `params` are another tree.
      TypeError: a parameter is not real floating point.
    """
    return _norms(structure, params, lambda group: group.producers)


@checked
def outgoing_norm(structure: Structure, params: Params) -> Units:
    """Computes the norm of the weights that read each unit.

    Example:
      >>> params = {"in": jnp.ones((1, 2)), "out": jnp.array([[3.0, 4.0], [0.0, 1.0]])}
      >>> model_fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> print(*pruning.outgoing_norm(structure, params).values())
      [5. 1.]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      params: tree of parameters.

    Returns:
      {group: (num_units,)}, over all kernels that read a unit together.

    Raises:
      ValueError: `params` are another tree.
      TypeError: a parameter is not real floating point.
    """
    return _norms(structure, params, lambda group: group.consumers)


@checked
def scale_magnitude(structure: Structure, params: Params) -> Units:
    """Returns the size of each unit's scale in the normalization after it.

        |gamma|

    Example:
      >>> params = {"in": jnp.ones((1, 2)), "scale": jnp.array([-2.0, 0.1])}
      >>> params["out"] = jnp.ones((2, 1))
      >>> def model_fn(params, x):
      ...     return jax.nn.relu(x @ params["in"] * params["scale"]) @ params["out"]
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> print(*pruning.scale_magnitude(structure, params).values())
      [2.  0.1]

    Args:
      structure: the `Structure` of the model, from `find_structure`.
      params: tree of parameters.

    Returns:
      {group: (num_units,)}; if a unit has several scales, their norm.

    Raises:
      ValueError: a group has no scale, or `params` are another tree.
      TypeError: a parameter is not real floating point.
    """
    check_structure(structure, params)
    without = [name for name, group in structure.groups.items() if not group.scales]
    if without:
        raise ValueError(f"`structure` must have a scale in each group, got none in {without}.")
    return _norms(structure, params, lambda group: group.scales)


@checked
def weight_magnitude(params: Params) -> Params:
    """Returns the size |w| of each single weight, for unstructured pruning with `mask_lowest`.

    Example:
      >>> print(pruning.weight_magnitude({"kernel": jnp.array([[-2.0, 0.5]])})["kernel"])
      [[2.  0.5]]

    Args:
      params: tree of parameters.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: a parameter is not real floating point.
    """
    return jax.tree.map(jnp.abs, _checks.floating_tree("params", params))


@checked
def random_scores(gates: Tree, *, key: PRNGKey) -> Tree:
    """Draws random scores, uniform in [0, 1), which other scores have to beat.

    Example:
      >>> scores = pruning.random_scores({"a": jnp.ones(3)}, key=jax.random.key(0))
      >>> print(scores["a"].shape, bool((scores["a"] >= 0).all() and (scores["a"] < 1).all()))
      (3,) True

    Args:
      gates: tree of gates, or of scores.
      key: typed key.

    Returns:
      A tree like `gates`.

    Raises:
      TypeError: a leaf is not real floating point, or `key` is not a typed key.
    """
    _checks.floating_tree("gates", gates)
    space = Space.of(gates)
    return space.unravel(jax.random.uniform(_checks.key("key", key), (space.size,), space.dtype))


def _norms(
    structure: Structure, params: Params, slices: Callable[[Group], tuple[Slice, ...]]
) -> Units:
    check_structure(structure, params)
    return {
        name: _norm(slices(group), params, group.num_units)
        for name, group in structure.groups.items()
    }


def _norm(slices: tuple[Slice, ...], params: Params, num_units: int) -> jax.Array:
    leaves = jax.tree.leaves(params)
    total = jnp.zeros(num_units, _tree.vector_dtype(params))
    for found in slices:
        leaf = _tree.wide(leaves[found.leaf])
        others = tuple(axis for axis in range(leaf.ndim) if axis != found.axis)
        squares = jnp.sum(leaf**2, others).astype(total.dtype)
        # Positions of no unit have the number -1, which is dropped.
        total = total + jax.ops.segment_sum(squares, jnp.asarray(found.units), num_units)
    return jnp.sqrt(total)
