"""Structures, trees and counts of another kind are refused by their names."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import diagnostics, pruning
from tests.calls import DIAGNOSTICS, PARAMS, PRUNING, SCORES, STRUCTURE, UNITS

OF_STRUCTURES = {
    "gated_loss": "params", "apply_gates": "params", "gate_gradients": "params",
    "parameter_masks": "params", "unit_gates": "params", "incoming_norm": "params",
    "outgoing_norm": "params", "remove_units": "model",
}  # fmt: skip


@pytest.mark.parametrize("name", OF_STRUCTURES)
def test_structures_and_their_parameters(name):
    call = PRUNING[name]
    for other in (None, {}, UNITS):
        with pytest.raises(TypeError, match="`structure` must come from `find_structure`"):
            call.func(other, *call.args[1:])
    place = 2 if name == "gated_loss" else 1
    if name == "remove_units":
        return
    with_params = lambda params: call.func(
        *(params if i == place else given for i, given in enumerate(call.args))
    )
    wider = jax.tree.map(lambda leaf: leaf[None], PARAMS)
    for other in (
        wider,
        PARAMS[:1],
        {"layers": PARAMS},
        [{**layer, "b": None} for layer in PARAMS],
    ):
        with pytest.raises(ValueError, match=r"`params.*` must have (shape|the tree structure)"):
            with_params(other)
    for dtype in (jnp.int32, jnp.complex64, bool):
        with pytest.raises(TypeError, match=r"`params.*` must be real floating point"):
            with_params(jax.tree.map(lambda leaf, to=dtype: jnp.ones(leaf.shape, to), PARAMS))


def test_gates_and_gradients():
    for dtype in (jnp.int32, bool, jnp.complex64):
        with pytest.raises(TypeError, match=r"`gates\['0/w'\]` must be real floating point"):
            pruning.apply_gates(STRUCTURE, PARAMS, {"0/w": jnp.ones(4, dtype)})
        with pytest.raises(TypeError, match=r"`grads.*` must be real floating point"):
            pruning.gate_gradients(
                STRUCTURE, PARAMS, jax.tree.map(lambda x, to=dtype: jnp.ones(x.shape, to), PARAMS)
            )
    with pytest.raises(ValueError, match=r"`gates\['0/w'\]` must have shape \(4,\), got \(\)"):
        pruning.apply_gates(STRUCTURE, PARAMS, {"0/w": None})


@pytest.mark.parametrize("bad", [-1, jnp.int32(-1), np.int32(-1)])
def test_negative_counts_as_numbers_and_as_arrays(bad):
    with pytest.raises(ValueError, match=r"`num_removed` must be .*, got -1"):
        pruning.num_missing({"a": jnp.ones(3, bool)}, bad)
    with pytest.raises(ValueError, match=r"`step` must be .*, got -1"):
        pruning.linear_removal(bad, every=1, num_each=1, total=3)


@pytest.mark.parametrize("bad", [1.5, jnp.float32(1), True, "1", jnp.ones(2, jnp.int32)])
def test_counts_are_single_integers(bad):
    with pytest.raises(TypeError, match="`num_removed` must be"):
        pruning.num_missing({"a": jnp.ones(3, bool)}, bad)


def test_groups_of_weights():
    importance = functools.partial(pruning.group_importance, SCORES, SCORES, num_groups=3)
    labels = {"a": jnp.arange(3), "b": jnp.arange(2)}
    with pytest.raises(ValueError, match="`groups` must hold numbers from -1 to 2, got 1 to 3"):
        importance(groups={**labels, "a": jnp.arange(1, 4)})
    for other in (jnp.zeros((1, 3), int), jnp.zeros(0, int), jnp.zeros(2, int)):
        with pytest.raises(ValueError, match=r"`groups` must broadcast to the shapes.* for \(3,\)"):
            importance(groups={**labels, "a": other})


def test_plans_are_dicts_of_known_numbers():
    results = PRUNING["hierarchical_plan"].args[0]
    plan = functools.partial(pruning.hierarchical_plan, budget=2.0)
    with pytest.raises(TypeError, match="`costs` must be a dict of groups, got a list"):
        plan(results, [1.0])
    with pytest.raises(TypeError, match="`results` must be a dict of groups, got a NoneType"):
        plan(None, {"a": 1.0})
    with pytest.raises(TypeError, match=r"`results\['a'\]` must come from `gradient_redundancy`"):
        plan({"a": 3}, {"a": 1.0})
    with pytest.raises(ValueError, match=r"`costs\['a'\]` must be a single number"):
        plan(results, {"a": jnp.ones(2)})
    with pytest.raises(TypeError, match=r"`costs\['a'\]` must be concrete"):
        jax.jit(lambda cost: plan(results, {"a": cost}))(1.0)
    with pytest.raises(TypeError, match="`plan` must be a dict of groups, got a list"):
        pruning.mask_planned([1], SCORES, SCORES)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("recovery_baselines", "targets"), ("sparse_recovery", "u"), ("condensation", "kernel"),
        ("least_squares_offset", "kernel"), ("frozen_component", "kernel"),
        ("transversal_complexity", "basis"), ("subspace_from_data", "inputs"),
        ("region_count", "center"), ("batch_norm_regularization", "kernel"),
    ],
)  # fmt: skip
def test_single_arrays(name, argument):
    call = DIAGNOSTICS[name]
    place = {"targets": 1, "basis": 3, "center": 2}.get(argument, 0)
    for other in (None, [jnp.ones(3)], {"a": jnp.ones(3)}, "array"):
        args = [other if i == place else given for i, given in enumerate(call.args)]
        with pytest.raises(TypeError, match=f"`{argument}` must be one array, got "):
            call.func(*args, **call.keywords)
    for dtype in (jnp.complex64, jnp.int32, bool):
        given = jnp.ones(call.args[place].shape, dtype)
        args = [given if i == place else argument for i, argument in enumerate(call.args)]
        with pytest.raises(TypeError, match=f"`{argument}` must be real floating point"):
            call.func(*args, **call.keywords)


def test_targets_and_positions():
    call = DIAGNOSTICS["decision_margin"]
    for other in (None, "abc", {"a": 1}):
        with pytest.raises(TypeError, match="`targets` must be an array of integers, got"):
            diagnostics.decision_margin(*call.args[:3], other)
    call = DIAGNOSTICS["interpolate"]
    for other in (None, "abc", {"a": 1}, jnp.ones(2, bool), jnp.ones(2, jnp.complex64)):
        with pytest.raises(
            TypeError, match=r"`positions` must be (a|one array|real floating point)"
        ):
            diagnostics.interpolate(*call.args, positions=other)
    with pytest.raises(ValueError, match="`positions` must be finite, got NaN"):
        diagnostics.interpolate(*call.args, positions=[0.0, np.nan])
