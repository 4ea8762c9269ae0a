"""Gate gradients against gates written into the network, and against autodiff."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import regjax
from regjax import models, pruning
from tests.pruning import networks


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def batch_norm(x, layer, *, train, epsilon):
    axes = tuple(range(x.ndim - 1))
    mean = jnp.mean(x, axes, keepdims=True) if train else 0.3
    variance = jnp.var(x, axes, keepdims=True) if train else 1.7
    lift = lambda vector: jnp.expand_dims(vector, axes)
    standardized = (x - mean) / jnp.sqrt(variance + epsilon)
    return standardized * lift(layer["scale"]) + lift(layer["bias"])


def gated_network(params, x, gates=None, *, train=True, epsilon=1e-5):
    """Convolution, batch norm, ReLU, max pooling, gates; twice dense, gates between."""
    one, two = (1.0, 1.0) if gates is None else (gates["first/kernel"], gates["dense"])
    x = convolve(x, params["first"]["kernel"])
    x = jnp.maximum(batch_norm(x, params["first"], train=train, epsilon=epsilon), 0)
    x = nnx.max_pool(x, (2, 2), (2, 2)) * one
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["dense"]) * two
    return x @ params["head"]


def network_params():
    random = np.random.default_rng(3)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape) / np.sqrt(np.prod(shape[:-1])))
    first = {"kernel": draw(3, 3, 2, 5), "scale": 1 + draw(5), "bias": draw(5)}
    return {"first": first, "dense": draw(45, 4), "head": draw(4, 3)}


def problem():
    inputs = jnp.asarray(networks.IMAGES, jnp.float64)
    targets = jnp.asarray(np.random.default_rng(4).normal(size=(8, 3)))
    return network_params(), inputs, targets


def squares(network, params, inputs, targets, **options):
    return jnp.mean(jnp.sum((network(params, inputs, **options) - targets) ** 2, 1))


@pytest.mark.usefixtures("default_promotion", "double")
@pytest.mark.parametrize(("train", "epsilon"), [(True, 0.0), (True, 1e-5), (False, 1e-5)])
def test_gate_gradients_are_those_of_gates_written_into_the_network(train, epsilon):
    params, inputs, targets = problem()
    network = functools.partial(gated_network, train=train, epsilon=epsilon)
    structure = pruning.find_structure(network, params, inputs)
    ones = {"first/kernel": jnp.ones(5), "dense": jnp.ones(4)}
    expected = jax.jit(jax.grad(lambda z: squares(network, params, inputs, targets, gates=z)))(ones)
    grads = jax.jit(jax.grad(lambda p: squares(network, p, inputs, targets)))(params)
    found = pruning.gate_gradients(structure, params, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), found, expected)
    assert min(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(found)) > 1e-2
    gates = pruning.unit_gates(structure, params)
    through = jax.grad(
        lambda z: squares(network, pruning.apply_gates(structure, params, z), inputs, targets)
    )(gates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), through, expected)
    # The gates of the paper, right behind the normalization: gamma dgamma + beta dbeta.
    products = jax.tree.map(jnp.multiply, params["first"], grads["first"])
    of_norm = products["scale"] + products["bias"]
    np.testing.assert_allclose(of_norm, expected["first/kernel"], atol=1e-12)
    of_head = jnp.sum(params["head"] * grads["head"], 1)
    np.testing.assert_allclose(of_head, expected["dense"], atol=1e-12)
    # A filter in front of batch statistics has no scale but for epsilon: its products cancel.
    own = jnp.sum(params["first"]["kernel"] * grads["first"]["kernel"], (0, 1, 2))
    variance = jnp.var(convolve(inputs, params["first"]["kernel"]), (0, 1, 2))
    share = epsilon / (variance + epsilon) if train else jnp.ones(5)
    of_scale = params["first"]["scale"] * grads["first"]["scale"]
    assert bool(jnp.allclose(own, of_scale * share, rtol=1e-6, atol=1e-13)) == train
    assert bool(jnp.max(jnp.abs(own)) < 1e-4) == train


@pytest.mark.usefixtures("default_promotion", "double")
def test_gated_parameters_are_gates_in_the_network():
    params, inputs, _ = problem()
    structure = pruning.find_structure(gated_network, params, inputs)
    random = np.random.default_rng(5)
    gates = {"first/kernel": jnp.asarray(random.normal(size=5)), "dense": jnp.array([0, 1, 2, 0.5])}
    gated = jax.jit(functools.partial(pruning.apply_gates, structure))(params, gates)
    np.testing.assert_allclose(
        gated_network(gated, inputs), gated_network(params, inputs, gates), rtol=1e-10, atol=1e-12
    )
    # Only the kernels behind the gates have changed.
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), gated, params)
    assert changed["dense"]
    assert changed["head"]
    assert not any(changed["first"].values())


@pytest.mark.parametrize("face", ["nnx", "linen"])
@pytest.mark.parametrize("kind", ["residual", "joined"])
def test_gradients_agree_with_autodiff_through_the_gates(face, kind):
    model = networks.MAKERS[face](kind)
    function = regjax.model_function(model)
    structure = pruning.find_structure(function, model.params, networks.IMAGES)
    gates = pruning.unit_gates(structure, model.params)

    def loss_fn(params):
        return jnp.mean(function(params, networks.IMAGES) ** 2)

    @jax.jit
    def both(params, gates):
        through = jax.grad(lambda z: loss_fn(pruning.apply_gates(structure, params, z)))(gates)
        return through, pruning.gate_gradients(structure, params, jax.grad(loss_fn)(params))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected, found = both(model.params, gates)
    assert set(found) == set(networks.UNITS[kind])
    for name, values in found.items():
        np.testing.assert_allclose(values, expected[name], rtol=1e-3, atol=1e-5)
        assert float(jnp.max(jnp.abs(values))) > 1e-3


def test_structure_is_static_and_compiles_nothing_again():
    params, inputs = networks.tree_params(4, 6, 3), jnp.ones((2, 4))
    structure = pruning.find_structure(networks.perceptron, params, inputs)
    apply = jax.jit(pruning.apply_gates)
    apply(structure, params, {"0/w": jnp.ones(6)})
    apply(structure, params, {"0/w": jnp.zeros(6)})
    assert apply._cache_size() == 1


def test_half_precision_stays_so_and_gates_are_wide():
    params = networks.tree_params(4, 6, 3, dtype=jnp.bfloat16)
    structure = pruning.find_structure(networks.perceptron, params, jnp.ones((2, 4), jnp.bfloat16))
    gates = pruning.unit_gates(structure, params)
    assert gates["0/w"].dtype == jnp.float32
    gated = pruning.apply_gates(structure, params, gates)
    jax.tree.map(np.testing.assert_array_equal, gated, params)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(gated))
    found = pruning.gate_gradients(structure, params, params)["0/w"]
    assert found.dtype == jnp.float32
    exact = np.sum(np.asarray(params[1]["w"], np.float64) ** 2, 1)
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_masks_of_parameters():
    model = networks.packaged_model(models.ConvNet, "batch", width=3)
    structure = pruning.find_structure(regjax.model_function(model), model.params, networks.IMAGES)
    units = {
        "layer_0/layer/kernel": jnp.array([True, False, True]),
        "layer_1/layer/kernel": jnp.array([False, True, True]),
    }
    masks = jax.jit(functools.partial(pruning.parameter_masks, structure))(model.params, units)
    first, second = (np.asarray(mask) for mask in units.values())
    whole = np.ones((3, 3, 1, 1), bool)
    expected = {
        "layer_0": {"layer": {"kernel": np.ones((3, 3, 2, 1), bool) & first}, "norm": first},
        "layer_1": {"layer": {"kernel": whole & first[:, None] & second}, "norm": second},
    }
    for name, layer in expected.items():
        np.testing.assert_array_equal(masks[name]["layer"]["kernel"], layer["layer"]["kernel"])
        for vector in masks[name]["norm"].values():
            np.testing.assert_array_equal(vector, layer["norm"])
    # Two by two positions, three channels each.
    np.testing.assert_array_equal(
        masks["head"]["kernel"], np.tile(second, 4)[:, None] & np.ones(3, bool)
    )
    np.testing.assert_array_equal(masks["head"]["bias"], np.ones(3, bool))


def test_bad_inputs_are_refused():
    params, inputs = networks.tree_params(4, 6, 5, 3), jnp.ones((2, 4))
    structure = pruning.find_structure(networks.perceptron, params, inputs)
    gates = pruning.unit_gates(structure, params)
    other = networks.tree_params(4, 7, 5, 3)
    with pytest.raises(
        ValueError, match=r"`params\[0\]\['b'\]` must have shape \(6,\), got \(7,\)"
    ):
        pruning.apply_gates(structure, other, gates)
    with pytest.raises(ValueError, match="`params` must have the tree structure"):
        pruning.unit_gates(structure, params[:2])
    with pytest.raises(ValueError, match="`grads` must have the tree structure"):
        pruning.gate_gradients(structure, params, params[:2])
    with pytest.raises(ValueError, match=r"`gates\['0/w'\]` must have shape \(6,\), got \(5,\)"):
        pruning.apply_gates(structure, params, {**gates, "0/w": jnp.ones(5)})
    with pytest.raises(ValueError, match="`gates` must be a dict of the groups of the structure"):
        pruning.apply_gates(structure, params, {"0/w": gates["0/w"]})
    with pytest.raises(ValueError, match=r"`gates` must be a dict of the groups.*got list"):
        pruning.apply_gates(structure, params, list(gates.values()))
    with pytest.raises(TypeError, match=r"`unit_masks\['0/w'\]` must be boolean.*got float32"):
        pruning.parameter_masks(structure, params, gates)
