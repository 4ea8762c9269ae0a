"""Units removed for good: smaller arrays, and what the compiler counts of them."""

import dataclasses
import functools
import itertools
import math
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from jax.extend.core import Jaxpr, Literal

from regjax import _checks, _tree
from regjax._adapters import Model, ModelFunction, model_function
from regjax._base import ModelFn, Params, PRNGKey, State, Tree, applied, as_partial
from regjax._runners import ApplyFn, NnxRunner
from regjax.pruning._channels import shape_of
from regjax.pruning._gates import Units, check_units
from regjax.pruning._rules import inner_jaxpr
from regjax.pruning._structure import Slice, Structure


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

    Its outputs are those of the model with `apply_gates` of the masks, in evaluation as in train
    mode, as far as no random numbers are drawn for each unit. It can be trained, with a new state
    of the optimiser, and pruned again with a structure of its own.

    The code of the model runs on the smaller arrays, and sizes that its layers remember
    (`nnx.Linear.out_features`, linen's `features`) stay the old ones: flax does not use them here.
    Code that does is refused, as are constants that depend on the number of units.

    Args:
      structure: from `find_structure` of this model.
      model: from one of the adapters.
      unit_masks: concrete bool array (num_units,) for each group, False for units to be removed.

    Returns:
      A `Model` with smaller parameters and state, which runs the same code.

    Raises:
      ValueError: a group or an array would lose all of its units, `model` or `unit_masks` are of
        another structure, or the model's own code depends on the number of units.
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
    apply = model.apply
    # nnx compares no shapes; linen does, perhaps in a function of the user's.
    is_nnx = isinstance(getattr(apply, "run", None), NnxRunner)
    if not is_nnx and not isinstance(apply, _AnyShape):
        apply = _AnyShape(apply)
    pruned = model._replace(apply=apply, params=params, state=state)
    _check_same_program(model, pruned, structure.inputs)
    return pruned


def count_cost(model_fn: ModelFn, params: Params, inputs: Tree) -> CostResult:
    """Counts parameters and operations of the forward pass, these as the compiler does.

    A multiplication and an addition are two operations. The count is that of XLA's cost analysis of
    the program as it is compiled for this backend, optimisations included; nothing is run.

    Args:
      model_fn: (params, inputs) -> outputs, as from `regjax.model_function`.
      params: its parameters.
      inputs: a batch, or `jax.ShapeDtypeStruct`s; operations are those of all of its examples.

    Returns:
      A `CostResult`.

    Raises:
      TypeError: a parameter is not real floating point.
      ValueError: there are no parameters.
    """
    _checks.floating_tree("params", params)
    compiled = applied.lower(as_partial(model_fn), params, (inputs,)).compile()
    counted = compiled.cost_analysis() or {}
    return CostResult(_tree.size(params), float(counted.get("flops", math.nan)))


@dataclasses.dataclass(frozen=True)
class _AnyShape:
    """`apply` of a model whose parameters need not have the shapes that linen would give them."""

    apply: ApplyFn

    def __call__(
        self,
        params: Params,
        state: State,
        inputs: Tree,
        *,
        train: bool,
        key: PRNGKey | None = None,
    ) -> tuple[Tree, State]:
        with linen.intercept_methods(_accept_stored):
            return self.apply(params, state, inputs, train=train, key=key)


def _accept_stored(method: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    """Runs a method of a linen module; parameters that its scope holds are not compared."""
    scope = context.module.scope
    if scope is not None:
        scope.param = functools.partial(_stored_param, scope)
    return method(*args, **kwargs)


def _stored_param(
    scope: Any, name: str, init_fn: Any, *args: Any, unbox: bool = True, **kwargs: Any
) -> Any:
    if scope.has_variable("params", name):
        # Otherwise the scope compares the stored shape with what `init_fn` would make.
        init_fn = lambda *_, **__: scope.get_variable("params", name)
    return type(scope).param(scope, name, init_fn, *args, unbox=unbox, **kwargs)


def _checked_masks(structure: Structure, model: Model, unit_masks: Units) -> dict[str, np.ndarray]:
    _checks.same_tree("model.params", model.params, structure.params)
    found = [jnp.shape(leaf) for leaf in jax.tree.leaves(model.state)]
    # A key of dropout, if the structure was found with one, comes last.
    expected = [jnp.shape(leaf) for leaf in structure.state][: len(found)]
    if found != expected:
        raise ValueError(f"`model.state` must hold arrays of shapes {expected}, got {found}.")
    if any(_checks.on_host(leaf) is None for leaf in jax.tree.leaves(unit_masks)):
        raise TypeError("`unit_masks` must be concrete, as shapes depend on them, got tracers.")
    _checks.bool_tree("unit_masks", check_units("unit_masks", structure, unit_masks))
    masks = {name: np.asarray(mask) for name, mask in unit_masks.items()}
    for name, mask in masks.items():
        if not mask.any():
            raise ValueError(f"`unit_masks[{name!r}]` must keep at least one unit, got none.")
    return masks


def _smaller(tree: Tree, parts: Sequence[tuple[Slice, np.ndarray]]) -> Tree:
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


def _check_same_program(model: Model, pruned: Model, inputs: Tree) -> None:
    """Checks that the model's code does the same with smaller arrays, but for their sizes."""
    try:
        after = _program(model_function(pruned), pruned.params, inputs)
    except Exception as error:
        raise ValueError(
            f"`model` must run with fewer units, got {type(error).__name__}: {error}"
        ) from error
    before = _program(model_function(model), model.params, inputs)
    for one, other in itertools.zip_longest(before, after):
        if one != other:
            raise ValueError(
                "`model` must do the same whatever the number of units, got a step that changes "
                f"from {one} to {other}."
            )


def _program(model_fn: ModelFunction, params: Params, inputs: Tree) -> list[str]:
    traced = jax.make_jaxpr(lambda function, *arguments: function(*arguments))(
        model_fn, params, inputs
    )
    return _steps(traced.jaxpr, traced.consts)


def _digest(array: jax.Array | np.ndarray) -> str:
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    plain = np.asarray(jax.random.key_data(array) if is_key else array)
    return f"{plain.dtype}{list(plain.shape)} {zlib.crc32(plain.tobytes()):08x}"


_LAYOUT = {"broadcast_in_dim", "reshape", "squeeze"}


def _steps(jaxpr: Jaxpr, constants: Sequence[jax.Array | np.ndarray]) -> list[str]:
    """Lists the primitives with their numbers: literals, and how many values a reduction takes."""
    steps = [f"constant {_digest(array)}" for array in constants]
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        numbers = [str(atom.val) for atom in equation.invars if isinstance(atom, Literal)]
        if name.startswith("reduce_") and "axes" in equation.params:
            shape = shape_of(equation.invars[0])
            numbers += [f"axis of {shape[axis]}" for axis in equation.params["axes"]]
        # A single unit needs no broadcast.
        if numbers or name not in _LAYOUT:
            steps.append(f"`{name}` of {numbers or 'arrays'}")
        inner, inner_constants = inner_jaxpr(equation)
        if inner is not None:
            steps += _steps(inner, inner_constants)
    return steps
