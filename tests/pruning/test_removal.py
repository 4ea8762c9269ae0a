"""Removed units against gates at 0, and costs against counting by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import regjax
from regjax import models, pruning
from tests.pruning import networks

pytestmark = pytest.mark.usefixtures("default_promotion")


def random_masks(structure, seed=1, share=0.4):
    """About `share` of each group goes, one unit at least, and one stays."""
    random, masks = np.random.default_rng(seed), {}
    for name, group in structure.groups.items():
        num_removed = min(max(1, round(share * group.num_units)), group.num_units - 1)
        masks[name] = random.permutation(group.num_units) >= num_removed
    return masks


def as_gates(masks):
    return {name: jnp.asarray(mask, jnp.float32) for name, mask in masks.items()}


def pruned_and_gated(model, inputs, share=0.4):
    function = regjax.model_function(model)
    structure = pruning.find_structure(function, model.params, inputs)
    masks = random_masks(structure, share=share)
    pruned = pruning.remove_units(structure, model, masks)
    gated = pruning.apply_gates(structure, model.params, as_gates(masks))
    return structure, masks, pruned, gated


@jax.jit
def run(function, params, inputs):
    return function(params, inputs)


def assert_same_function(model, gated, pruned, inputs, modes=("evaluation", "train")):
    for mode in modes:
        whole = run(regjax.model_function(model, mode=mode), model.params, inputs)
        masked = run(regjax.model_function(model, mode=mode), gated, inputs)
        smaller = run(regjax.model_function(pruned, mode=mode), pruned.params, inputs)
        np.testing.assert_allclose(smaller, masked, rtol=1e-5, atol=1e-5)
        assert float(jnp.max(jnp.abs(whole - masked))) > 1e-2  # what went was of use


@pytest.mark.parametrize("kind", ["plain", "residual", "joined"])
@pytest.mark.parametrize("face", ["nnx", "linen"])
def test_outputs_are_those_of_the_masked_model(face, kind):
    model = networks.MAKERS[face](kind)
    structure, masks, pruned, gated = pruned_and_gated(model, networks.IMAGES)
    modes = ("evaluation",) if face == "linen" else ("evaluation", "train")
    assert_same_function(model, gated, pruned, networks.IMAGES, modes)
    again = pruning.find_structure(regjax.model_function(pruned), pruned.params, networks.IMAGES)
    assert {name: group.num_units for name, group in again.groups.items()} == {
        name: int(masks[name].sum()) for name in structure.groups
    }


NETWORKS = [
    *((models.ConvNet, norm) for norm in ("none", "batch", "lpinf", "mean_only", "weight")),
    *((models.ResNet, norm) for norm in ("batch", "ghost")),
    *((models.MLP, norm) for norm in ("lp1", "weight_standardized")),
]


@pytest.mark.parametrize(("kind", "norm"), NETWORKS)
def test_networks_of_the_library(kind, norm):
    sizes = {"widths": (4, 6)} if kind is models.ResNet else {"width": 5}
    model = networks.randomized(networks.packaged_model(kind, norm, **sizes))
    inputs = np.tile(networks.IMAGES, (2, 1, 1, 1))  # ghost batches are of 16
    structure, _, pruned, gated = pruned_and_gated(model, inputs)
    assert structure.groups
    modes = ("evaluation",) if norm in ("none", "weight", "weight_standardized") else ("train",)
    assert_same_function(model, gated, pruned, inputs, modes)


def test_one_unit_of_each_group_is_enough():
    model = networks.linen_model("residual")
    _, masks, pruned, gated = pruned_and_gated(model, networks.IMAGES, share=1)
    assert all(mask.sum() == 1 for mask in masks.values())
    assert_same_function(model, gated, pruned, networks.IMAGES, ("evaluation",))
    assert pruned.params["c"]["kernel"].shape == (3, 3, 1, 1)
    assert jax.tree.leaves(pruned.state)[0].shape == (1,)


def test_what_is_kept_is_what_was_there():
    params = networks.tree_params(4, 6, 5, 3)
    model = regjax.from_callable(networks.perceptron, params)
    _, masks, pruned, _ = pruned_and_gated(model, np.ones((2, 4), np.float32))
    first, second = masks["0/w"], masks["1/w"]
    expected = [
        {"w": params[0]["w"][:, first], "b": params[0]["b"][first]},
        {"w": params[1]["w"][first][:, second], "b": params[1]["b"][second]},
        {"w": params[2]["w"][second], "b": params[2]["b"]},
    ]
    jax.tree.map(np.testing.assert_array_equal, pruned.params, expected)


@pytest.mark.parametrize("face", ["nnx", "linen"])
def test_training_goes_on_as_that_of_the_masked_model(face):
    """With momentum and in train mode: the same weights and statistics; and again smaller."""
    model = networks.MAKERS[face]("plain")
    structure, masks, pruned, gated = pruned_and_gated(model, networks.IMAGES)
    kept = pruning.parameter_masks(structure, model.params, masks)
    targets = jnp.asarray(np.arange(8) % 3)
    optimizer = optax.sgd(0.1, momentum=0.9)

    def trained(model, keep):
        @jax.jit
        def step(params, state, optimizer_state):
            def loss_fn(params):
                outputs, new_state = model.apply(params, state, networks.IMAGES, train=True)
                losses = optax.losses.softmax_cross_entropy_with_integer_labels(outputs, targets)
                return losses.mean(), new_state

            grads, state = jax.grad(loss_fn, has_aux=True)(params)
            updates, optimizer_state = optimizer.update(keep(grads), optimizer_state, params)
            return optax.apply_updates(params, updates), state, optimizer_state

        carry = model.params, model.state, optimizer.init(model.params)
        for _ in range(3):
            carry = step(*carry)
        return model._replace(params=carry[0], state=carry[1])

    masked = trained(
        model._replace(params=gated),
        lambda grads: jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, kept),
    )
    expected, smaller = pruning.remove_units(structure, masked, masks), trained(pruned, lambda g: g)
    close = lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    jax.tree.map(close, (smaller.params, smaller.state), (expected.params, expected.state))
    first = smaller.params["first"]["kernel"] - pruned.params["first"]["kernel"]
    assert float(jnp.max(jnp.abs(first))) > 1e-3
    _, _, again, gated = pruned_and_gated(smaller, networks.IMAGES)
    assert_same_function(smaller, gated, again, networks.IMAGES, ("evaluation",))
    assert again.apply.apply == model.apply  # nothing is wrapped twice


def test_costs_of_a_perceptron_are_those_counted_by_hand():
    """2 N i o operations of a product, N o additions of the bias; tanh is counted apart."""
    inputs = np.ones((8, 4), np.float32)
    model = regjax.from_callable(networks.perceptron, networks.tree_params(4, 10, 6, 3))
    structure = pruning.find_structure(regjax.model_function(model), model.params, inputs)
    masks = {"0/w": np.arange(10) < 7, "1/w": np.arange(6) % 2 == 0}
    pruned = pruning.remove_units(structure, model, masks)
    for one, sizes in ((model, (4, 10, 6, 3)), (pruned, (4, 7, 3, 3))):
        pairs = list(itertools.pairwise(sizes))
        cost = pruning.count_cost(regjax.model_function(one), one.params, inputs)
        assert cost.num_params == sum(i * o + o for i, o in pairs)
        assert cost.flops == sum(2 * 8 * i * o + 8 * o for i, o in pairs)
        abstract = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        assert cost == pruning.count_cost(regjax.model_function(one), one.params, abstract)


def test_costs_of_convolutions_are_those_counted_by_hand():
    """Without padding 2 N H' W' k k i o, and the mean over positions."""

    def forward(params, x):
        for kernel in params["convolutions"]:
            x = jax.lax.conv_general_dilated(
                x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return jnp.sum(x, (1, 2)) @ params["head"]

    draw = lambda *shape: jnp.ones(shape, jnp.float32)
    params = {"convolutions": [draw(3, 3, 2, 6), draw(3, 3, 6, 4)], "head": draw(4, 3)}
    model = regjax.from_callable(forward, params)
    structure = pruning.find_structure(forward, params, networks.IMAGES)
    masks = {"convolutions/0": np.arange(6) < 3, "convolutions/1": np.arange(4) < 2}
    pruned = pruning.remove_units(structure, model, masks)
    for one, (a, b) in ((model, (6, 4)), (pruned, (3, 2))):
        cost = pruning.count_cost(regjax.model_function(one), one.params, networks.IMAGES)
        products = 8 * 2 * (4 * 4 * 9 * 2 * a + 2 * 2 * 9 * a * b + b * 3)
        assert cost.num_params == 9 * 2 * a + 9 * a * b + 3 * b
        assert cost.flops == products + 8 * b * (2 * 2 - 1)


def test_code_that_depends_on_the_number_of_units_runs_as_it_was():
    """Constants are those of the masked model, and sizes that are written down do not matter."""

    def neural_tangent(params, x):
        return jnp.tanh(x @ params["in"]) @ params["out"] / np.sqrt(params["out"].shape[0])

    def fixed_size(params, x):
        return (x @ params["in"] + jnp.zeros(6)).reshape(3, 6) @ params["out"]

    def counting(params, x):
        hidden = x @ params["in"]
        return hidden @ params["out"] / jnp.sum(jnp.ones_like(hidden), axis=1, keepdims=True)

    params = {"in": jnp.ones((4, 6)), "out": jnp.ones((6, 2))}
    for forward in (neural_tangent, fixed_size, counting):
        model = regjax.from_callable(forward, params)
        _, _, pruned, gated = pruned_and_gated(model, jnp.ones((3, 4)))
        assert pruned.params["in"].shape == (4, 4)
        assert_same_function(model, gated, pruned, jnp.ones((3, 4)), ("evaluation",))


def test_bad_inputs_are_refused():
    params = networks.tree_params(4, 6, 5, 3)
    model, inputs = regjax.from_callable(networks.perceptron, params), jnp.ones((2, 4))
    structure = pruning.find_structure(regjax.model_function(model), params, inputs)
    masks = random_masks(structure)
    remove = lambda **changed: pruning.remove_units(structure, model, {**masks, **changed})
    with pytest.raises(ValueError, match=r"`unit_masks\['1/w'\]` must keep at least one unit"):
        remove(**{"1/w": np.zeros(5, bool)})
    with pytest.raises(ValueError, match=r"`unit_masks\['1/w'\]` must have shape \(5,\), got"):
        remove(**{"1/w": np.ones(6, bool)})
    with pytest.raises(TypeError, match=r"`unit_masks\['1/w'\]` must be boolean.*got float"):
        remove(**{"1/w": np.ones(5)})
    with pytest.raises(ValueError, match=r"must be a dict of the groups of the structure.*'2/w'"):
        remove(**{"2/w": np.ones(3, bool)})
    with pytest.raises(ValueError, match=r"must be a dict of the groups.*got \['0/w'\]"):
        pruning.remove_units(structure, model, {"0/w": masks["0/w"]})
    with pytest.raises(TypeError, match="`unit_masks` must be concrete"):
        jax.jit(lambda masks: pruning.remove_units(structure, model, masks).params)(masks)
    other = regjax.from_callable(networks.perceptron, networks.tree_params(4, 7, 5, 3))
    with pytest.raises(ValueError, match=r"`model.params\[0\]\['b'\]` must have shape \(6,\)"):
        pruning.remove_units(structure, other, masks)


def test_state_of_another_model_is_refused():
    model = networks.nnx_model("plain")
    structure, masks, _, _ = pruned_and_gated(model, networks.IMAGES)
    other = model._replace(state=jax.tree.map(lambda leaf: leaf[:4], model.state))
    with pytest.raises(ValueError, match=r"`model.state` must hold arrays of shapes \[\(6,\)"):
        pruning.remove_units(structure, other, masks)


def test_trees_of_another_model_are_refused_by_the_smaller_one():
    model = networks.nnx_model("plain")
    _, _, pruned, _ = pruned_and_gated(model, networks.IMAGES)
    with pytest.raises(ValueError, match=r"`params\['dense'\]\['bias'\]` must have shape"):
        pruned.apply(model.params, pruned.state, networks.IMAGES, train=False)
    with pytest.raises(ValueError, match="`params` must have the tree structure"):
        pruned.apply({}, pruned.state, networks.IMAGES, train=False)


def test_no_array_loses_all_of_its_units():
    """The group has four units, but two of them are all that one kernel makes."""

    def forward(params, x):
        halves = jnp.concatenate([x @ params["left"], x @ params["right"]], 1)
        return (halves + x @ params["whole"]) @ params["out"]

    shapes = {"left": (4, 2), "right": (4, 2), "whole": (4, 4), "out": (4, 3)}
    params = {name: jnp.ones(shape) for name, shape in shapes.items()}
    structure = pruning.find_structure(forward, params, jnp.ones((3, 4)))
    assert [group.num_units for group in structure.groups.values()] == [4]
    model = regjax.from_callable(forward, params)
    pruned = pruning.remove_units(structure, model, {"left": np.array([True, False, False, True])})
    assert {name: leaf.shape for name, leaf in pruned.params.items()} == {
        "left": (4, 1), "right": (4, 1), "whole": (4, 2), "out": (2, 3)
    }  # fmt: skip
    with pytest.raises(ValueError, match="`unit_masks` must leave a unit of `left`, got none"):
        pruning.remove_units(structure, model, {"left": np.array([False, False, True, True])})


class Doubled(linen.Module):
    """Parameters made in `setup`, and a layer within a layer."""

    def setup(self):
        self.kernel = self.param("kernel", linen.initializers.lecun_normal(), (72, 6))
        self.head = linen.Sequential([linen.Dense(4), jnp.tanh, linen.Dense(3)])

    def __call__(self, x):
        return self.head(jnp.tanh(x.reshape(x.shape[0], -1) @ self.kernel))


def test_linen_parameters_of_setup_and_of_inner_layers():
    module = Doubled()
    model = regjax.from_linen(module, module.init(jax.random.key(0), networks.IMAGES))
    _, _, pruned, gated = pruned_and_gated(model, networks.IMAGES)
    assert_same_function(model, gated, pruned, networks.IMAGES, ("evaluation",))
