from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree

import regjax
from regjax.models import MLP, ConvNet, ResNet
from tests import oracles

SHAPE = (28, 28, 1)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def make(network, shape=SHAPE, **options):
    return regjax.from_nnx(network(shape, 10, rngs=nnx.Rngs(0), **options))


def random_params(model):
    vector, unravel = ravel_pytree(model.params)
    return unravel(jnp.asarray(np.random.default_rng(1).normal(size=vector.size), vector.dtype))


def run(model, params, inputs):
    return model.apply(params, model.state, inputs, train=False)[0]


def num_convolutions(model, shape=SHAPE):
    text = str(jax.make_jaxpr(partial(run, model))(model.params, jnp.ones((1, *shape))))
    return text.count("conv_general_dilated[")


def test_plain_networks_have_the_agreed_sizes():
    assert count(make(MLP, width=256, depth=2).params) == 784 * 256 + 256 + 256 * 257 + 257 * 10
    assert count(make(MLP, width=256, depth=2).params) == 269_322
    resnet = make(ResNet, normalization="none")
    assert count(resnet.params) == 150_810
    assert num_convolutions(resnet) == 11
    convnet = make(ConvNet, width=16, depth=2)
    assert count(convnet.params) == (9 * 16 + 16) + (9 * 16 * 16 + 16) + (7 * 7 * 16 * 10 + 10)
    assert num_convolutions(convnet) == 2


@pytest.mark.parametrize("depth", [1, 3, 5])
def test_depth_counts_hidden_layers_and_convolutions(depth):
    shape = (8, 8, 1)  # smaller than what five halvings need
    assert num_convolutions(make(ConvNet, shape, depth=depth, width=4), shape) == depth
    mlp = make(MLP, shape, depth=depth, width=4)
    assert len(mlp.params) == depth + 1
    assert count(mlp.params) == 64 * 4 + 4 + (depth - 1) * 20 + 50


def test_an_mlp_without_hidden_layers_is_linear():
    model = make(MLP, (2, 2, 3), depth=0)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2, 2, 3)), jnp.float32)
    outputs, _ = model.apply(model.params, model.state, inputs, train=False)
    expected = inputs.reshape(5, 12) @ model.params["head"]["kernel"]
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)


def head(params, features):
    return np.asarray(features @ params["head"]["kernel"]) + np.asarray(params["head"]["bias"])


def convolve(inputs, layer, stride=1):
    return jax.lax.conv_general_dilated(
        inputs,
        layer["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


@pytest.mark.parametrize("network", [MLP, ConvNet])
def test_the_plain_networks_are_the_ones_written_out(network):
    model = make(network, (6, 6, 2), width=3, depth=2)
    params = random_params(model)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)
    outputs = run(model, params, inputs)
    features = inputs.reshape(5, -1) if network is MLP else inputs
    for name in ("layer_0", "layer_1"):
        layer = params[name]["layer"]
        linear = features @ layer["kernel"] if network is MLP else convolve(features, layer, 2)
        features = np.maximum(np.asarray(linear) + np.asarray(layer["bias"]), 0)
    expected = head(params, features.reshape(5, -1))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_the_residual_network_is_the_one_written_out():
    model = make(ResNet, (6, 6, 2), widths=(3, 3, 4))
    params = random_params(model)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 6, 6, 2)), jnp.float32)
    outputs = run(model, params, inputs)
    features = jax.nn.relu(convolve(inputs, params["stem"]["layer"]))
    for name, stride in (("block_0", 1), ("block_1", 1), ("block_2", 2)):
        block = {part: layer["layer"] for part, layer in params[name].items()}
        hidden = jax.nn.relu(convolve(features, block["first"], stride))
        residual = convolve(hidden, block["second"])
        if "shortcut" in block:
            features = convolve(features, block["shortcut"], stride)
        features = jax.nn.relu(residual + features)
    assert features.shape == (5, 3, 3, 4)
    expected = head(params, features.mean(axis=(1, 2)))
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("network", [MLP, ConvNet, ResNet])
@pytest.mark.parametrize("norm", ["none", "batch", "layer", "group"])
def test_norm_variants(network, norm):
    shape = (8, 8, 3)
    options = {"widths": (6, 12)} if network is ResNet else {"width": 12, "depth": 2}
    model = make(network, shape, normalization=norm, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    # ResNet: stem and block 0 (3 norms of 6), block 1 with its projection (3 norms of 12).
    normalized = 3 * 6 + 3 * 12 if network is ResNet else 2 * 12
    assert model.has_batch_statistics == (norm == "batch")
    assert count(model.state) == (2 * normalized if norm == "batch" else 0)
    plain = count(make(network, shape, normalization="none", **options).params)
    biases = 0 if network is ResNet else 24  # the norm's bias takes the place of the bias
    assert count(model.params) == plain + (2 * normalized - biases if norm != "none" else 0)

    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(6, *shape)), jnp.float32)
    for train in (False, True):
        outputs, state = model.apply(model.params, model.state, inputs, train=train)
        assert outputs.shape == (6, 10)
        assert outputs.dtype == jnp.float32
        assert jax.tree.structure(state) == jax.tree.structure(model.state)
    loss = regjax.model_loss(model, oracles.cross_entropy, mode="train")
    assert regjax.couples_examples(loss) == (norm == "batch")
    if norm != "batch":
        regjax.check_separable(loss, model.params, inputs, jnp.arange(6, dtype=jnp.int32))


@pytest.mark.parametrize("norm", ["batch", "layer", "group"])
def test_outputs_do_not_feel_the_scale_of_a_normalized_layer(norm):
    # Exact invariance of norm(c W x) in c > 0, up to the norm's epsilon.
    model = make(ConvNet, (8, 8, 1), width=16, normalization=norm)
    inputs = 10 * jnp.asarray(np.random.default_rng(0).normal(size=(6, 8, 8, 1)), jnp.float32)
    layer = model.params["layer_0"]
    scaled = {**layer, "layer": jax.tree.map(lambda leaf: 3 * leaf, layer["layer"])}
    before, after = (
        model.apply(params, model.state, inputs, train=True)[0]
        for params in (model.params, {**model.params, "layer_0": scaled})
    )
    np.testing.assert_allclose(after, before, atol=1e-3)
    assert jnp.abs(before).max() > 0.1


@pytest.mark.parametrize("num_features", [6, 12, 16, 24])
def test_group_norm_takes_any_width(num_features):
    model = make(MLP, (2, 2, 1), width=num_features, depth=1, normalization="group")
    outputs, _ = model.apply(model.params, model.state, jnp.ones((2, 2, 2, 1)), train=False)
    assert jnp.isfinite(outputs).all()


@pytest.mark.parametrize(
    ("network", "options", "error", "message"),
    [
        (
            MLP,
            {"normalization": "instance"},
            ValueError,
            "`normalization` must be one of none, batch, layer, group",
        ),
        (
            MLP,
            {"normalization": "instance", "depth": 0},
            ValueError,
            "`normalization` must be one of",
        ),
        (ConvNet, {"normalization": "instance"}, ValueError, "`normalization` must be one of"),
        (ResNet, {"normalization": "instance"}, ValueError, "`normalization` must be one of"),
        (MLP, {"depth": -1}, ValueError, "`depth` must be at least 0, got -1"),
        (ConvNet, {"depth": 0}, ValueError, "`depth` must be at least 1, got 0"),
        (ConvNet, {"depth": 2.0}, TypeError, "`depth` must be a Python integer, got 2.0"),
        (MLP, {"width": 0}, ValueError, "`width` must be at least 1, got 0"),
        (ResNet, {"widths": ()}, ValueError, "`widths` must name at least one block"),
        (ResNet, {"widths": (16, 0)}, ValueError, "`widths` must be at least 1, got 0"),
        (ResNet, {"shape": (28, 28)}, ValueError, r"`input_shape` must be \(height, width, cha"),
        (MLP, {"shape": (28, 28, 0)}, ValueError, "`input_shape` must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_named(network, options, error, message):
    with pytest.raises(error, match=message):
        make(network, **options)
