"""Units removed for good: smaller arrays, and what the compiler counts of them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from regjax import _checks, _tree
from regjax._adapters import Model, model_function
from regjax._arguments import checked
from regjax._base import ModelFn, Params, Tree
from regjax._printing import legible
from regjax.pruning._gates import Units, check_units
from regjax.pruning._smaller import Parts, SmallerApply
from regjax.pruning._structure import Structure


@legible
class CostResult(NamedTuple):
    """What a forward pass costs.

    Attributes:
      num_params: number of parameters.
      flops: floating point operations that the compiler counts for the batch; NaN if it counts
        none.
    """

    num_params: int
    flops: float


def remove_units(structure: Structure, model: Model, unit_masks: Units) -> Model:
    """Removes the units whose mask is False from a model.

    The outputs of the smaller model are those of the model with masked units (`apply_gates`), in
    evaluation and in train mode, including random numbers that are drawn for each unit. It can be
    trained with a new state of the optimiser, and pruned again with a `Structure` of its own.

    The code of the model is traced with the old sizes and then run with the new ones. So it may
    contain its sizes (heads, groups, `features`). Constants that depend on the number of units stay
    as they were, as they do with masked units.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
      >>> model = regjax.from_callable(lambda p, x: jax.nn.relu(x @ p["in"]) @ p["out"], params)
      >>> model_fn = regjax.model_function(model)
      >>> structure = pruning.find_structure(model_fn, params, jnp.ones((2, 1)))
      >>> unit_masks = {name: jnp.array([True, False, True]) for name in structure.groups}
      >>> smaller = pruning.remove_units(structure, model, unit_masks)
      >>> print(smaller.params["in"].shape, smaller.params["out"].shape)
      (1, 2) (2, 1)

    Args:
      structure: the `Structure` of this model, from `find_structure`.
      model: a `Model` from one of the adapters.
      unit_masks: bool array (num_units,) for each group, False for units to be removed. Not traced.

    Returns:
      A `Model` with smaller parameters and state, which runs the same code.

    Raises:
      ValueError: a group or an array would lose all of its units, or `model` or `unit_masks` have
        another structure.
      TypeError: a mask is not boolean, or is traced.
    """
    masks = _checked_masks(structure, model, unit_masks)
    groups = [(group, masks[name]) for name, group in structure.groups.items()]
    of_params = [
        (part, mask)
        for group, mask in groups
        for part in (*group.producers, *group.scales, *group.biases, *group.consumers)
    ]
    of_state = [(part, mask) for group, mask in groups for part in group.statistics]
    params, state = _smaller(model.params, of_params), _smaller(model.state, of_state)
    apply = SmallerApply.of(model).without(of_params, of_state)
    pruned = model._replace(apply=apply, params=params, state=state)
    # What the model does beyond its structure is found out here and not in the first step.
    jax.eval_shape(model_function(pruned), params, structure.inputs)
    return pruned


@checked
def count_cost(model_fn: ModelFn, params: Params, inputs: Tree) -> CostResult:
    """Counts the parameters and the floating-point operations of a forward pass.

    A multiplication and an addition are two operations. The operations are counted by XLA's cost
    analysis of the program that it compiles for this backend, after optimisation. Nothing is run.

    Example:
      >>> params = {"in": jnp.ones((1, 3)), "out": jnp.ones((3, 1))}
      >>> model_fn = lambda params, x: x @ params["in"] @ params["out"]
      >>> print(pruning.count_cost(model_fn, params, jnp.ones((2, 1))).num_params)
      6

    Args:
      model_fn: (params, inputs) -> outputs, such as `regjax.model_function(model)`.
      params: its parameters.
      inputs: a batch, or `jax.ShapeDtypeStruct`s. Operations are counted for all of its examples.

    Returns:
      A `CostResult`.

    Raises:
      TypeError: a parameter is not real floating point.
      ValueError: there are no parameters.
    """
    _checks.floating_tree("params", params)
    # A new function, since JAX remembers what it compiled, and a bound method may have changed.
    apply = lambda params, inputs: model_fn(params, inputs)
    compiled = jax.jit(apply).lower(params, inputs).compile()
    counted = compiled.cost_analysis() or {}
    return CostResult(_tree.size(params), float(counted.get("flops", math.nan)))


def _checked_masks(structure: Structure, model: Model, unit_masks: Units) -> dict[str, np.ndarray]:
    if not isinstance(structure, Structure):
        raise TypeError(
            f"`structure` must come from `find_structure`, got a {type(structure).__name__}."
        )
    if not isinstance(model, Model):
        raise TypeError(f"`model` must be a `regjax.Model`, got a {type(model).__name__}.")
    _checks.same_tree("model.params", model.params, structure.params)
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(model.state)]
    # A key of dropout, if the structure was found with one, comes last.
    expected = [jnp.shape(leaf) for leaf in structure.state][: len(found)]
    if found != expected:
        raise ValueError(f"`model.state` must hold arrays of shapes {expected}, got {found}.")
    if any(_checks.host_value(leaf) is None for leaf in jax.tree.leaves(unit_masks)):
        raise TypeError("`unit_masks` must be concrete, as shapes depend on them, got tracers.")
    _checks.bool_tree("unit_masks", check_units("unit_masks", structure, unit_masks))
    masks = {name: np.asarray(mask) for name, mask in unit_masks.items()}
    for name, mask in masks.items():
        if not mask.any():
            raise ValueError(f"`unit_masks[{name!r}]` must keep at least one unit, got none.")
    return masks


def _smaller(tree: Tree, parts: Parts) -> Tree:
    """Drops the positions of removed units from the tree."""
    kept: dict[tuple[int, int], np.ndarray] = {}
    for part, mask in parts:
        # Several groups may lie along one axis, behind a concatenation.
        remains = (part.units < 0) | mask[part.units]
        place = part.leaf, part.axis
        kept[place] = kept.get(place, True) & remains
        if not kept[place].any():
            raise ValueError(f"`unit_masks` must leave a unit of `{part.path}`, got none.")
    leaves, treedef = jax.tree.flatten(tree)
    for (leaf, axis), remains in kept.items():
        leaves[leaf] = jnp.take(leaves[leaf], np.flatnonzero(remains), axis)
    return jax.tree.unflatten(treedef, leaves)
