"""Every unit that is listed can be removed, alone and with others; what is not listed has a reason.

Outputs and gradients of the smaller network are those of the masked one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import pruning
from tests.pruning.architectures import TOKENS, UNITS

pytestmark = pytest.mark.usefixtures("default_promotion")


def some_masks(structure):
    """The first unit of each group alone, the last alone, all but one, and about half of them."""
    random = np.random.default_rng(0)
    for kept in (
        lambda n: np.arange(n) > 0,
        lambda n: np.arange(n) < n - 1,
        lambda n: np.arange(n) == n // 2,
        lambda n: random.permutation(n) >= n // 2,
    ):
        yield {name: kept(group.num_units) for name, group in structure.groups.items()}


@pytest.mark.parametrize("name", UNITS)
def test_what_is_listed_can_be_removed_and_what_is_not_says_why(name):
    (make, inputs), units = UNITS[name]
    model = make()
    function = regjax.model_function(model)
    structure = pruning.find_structure(function, model.params, inputs)
    assert [group.num_units for group in structure.groups.values()] == units
    listed = {p.path for g in structure.groups.values() for parts in g[1:] for p in parts}
    fixed = {path.split("[")[0] for path in structure.fixed}
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.params):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert path in listed | fixed or leaf.ndim < 2
    whole = jax.jit(function)(model.params, inputs)
    for masks in some_masks(structure):
        pruned = pruning.remove_units(structure, model, masks)
        gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
        gated = pruning.apply_gates(structure, model.params, gates)
        smaller = jax.jit(regjax.model_function(pruned))(pruned.params, inputs)
        masked = jax.jit(function)(gated, inputs)
        np.testing.assert_allclose(smaller, masked, rtol=2e-5, atol=2e-6)
        assert not units or float(jnp.max(jnp.abs(masked - whole))) > 1e-5


DIFFERENTIATED = ["nnx attention", "grouped", "linen scan", "its own derivative", "rematerialized"]


@pytest.mark.parametrize("name", DIFFERENTIATED)
def test_derivatives_are_those_of_the_masked_network(name):
    """Also where the model's code gives them: its own rules, and their own derivatives."""
    (make, inputs), _ = UNITS[name]
    model = make()
    structure = pruning.find_structure(regjax.model_function(model), model.params, inputs)
    *_, masks = some_masks(structure)
    gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
    gated = model._replace(params=pruning.apply_gates(structure, model.params, gates))
    pruned = pruning.remove_units(structure, gated, masks)
    loss = lambda model: lambda p: jnp.sum(jnp.sin(regjax.model_function(model)(p, inputs)))
    gradient = jax.jit(jax.grad(loss(gated)))(gated.params)
    # The masked network's gradient without the removed units.
    expected = pruning.remove_units(structure, gated._replace(params=gradient), masks).params
    found = jax.jit(jax.grad(loss(pruned)))(pruned.params)
    close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, found, expected)
    if name == "its own derivative":  # no forward mode through a reverse-mode rule
        return
    direction = jax.tree.map(jnp.ones_like, pruned.params)
    along = lambda model, params, tangent: jax.jvp(jax.grad(loss(model)), (params,), (tangent,))[1]
    curved = jax.jit(lambda: along(pruned, pruned.params, direction))()
    kept = pruning.parameter_masks(structure, model.params, masks)
    spread = jax.tree.map(lambda mask: mask.astype(jnp.float32), kept)
    dense = jax.jit(lambda: along(gated, gated.params, spread))()
    expected = pruning.remove_units(structure, gated._replace(params=dense), masks).params
    jax.tree.map(close, curved, expected)


def test_dropout_of_the_smaller_network_draws_what_the_masked_one_does():
    (make, inputs), _ = UNITS["nnx attention"]
    model, key = make(), jax.random.key(4)
    structure = pruning.find_structure(regjax.model_function(model), model.params, inputs)
    *_, masks = some_masks(structure)
    gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
    pruned = pruning.remove_units(structure, model, masks)
    one, other = (
        regjax.model_function(m, mode="train", key=key)(params, inputs)
        for m, params in (
            (pruned, pruned.params),
            (model, pruning.apply_gates(structure, model.params, gates)),
        )
    )
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_other_numbers_of_examples_and_of_tokens():
    """What is traced is traced for the inputs of the call."""
    model = UNITS["GPT"][0][0]()
    structure = pruning.find_structure(regjax.model_function(model), model.params, TOKENS)
    *_, masks = some_masks(structure)
    gates = {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}
    pruned = pruning.remove_units(structure, model, masks)
    gated = pruning.apply_gates(structure, model.params, gates)
    for tokens in (TOKENS[:1], TOKENS[:, :3]):
        one = regjax.model_function(pruned)(pruned.params, tokens)
        np.testing.assert_allclose(one, regjax.model_function(model)(gated, tokens), atol=1e-6)


def test_heads_are_pruned_twice():
    model, inputs = UNITS["linen attention"][0][0](), UNITS["linen attention"][0][1]
    for left in (3, 2):
        structure = pruning.find_structure(regjax.model_function(model), model.params, inputs)
        name = next(name for name in structure.groups if "query" in name)
        masks = {n: np.ones(g.num_units, bool) for n, g in structure.groups.items()}
        masks[name] = np.arange(left + 1) > 0
        gates = {n: jnp.asarray(mask, jnp.float32) for n, mask in masks.items()}
        gated = pruning.apply_gates(structure, model.params, gates)
        expected = regjax.model_function(model)(gated, inputs)
        model = pruning.remove_units(structure, model, masks)
        np.testing.assert_allclose(
            regjax.model_function(model)(model.params, inputs), expected, rtol=1e-5, atol=1e-6
        )
    again = pruning.find_structure(regjax.model_function(model), model.params, inputs)
    assert again.groups[name].num_units == 2
