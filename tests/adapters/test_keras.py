"""`from_keras` against Keras' own forward pass, and dense float64 Hessians of its losses."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import regjax
from regjax import curvature
from tests import oracles
from tests.adapters import networks

KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _keras_promotes(default_promotion):
    """Keras' own layers promote ranks and types."""


@pytest.fixture
def data():
    problem = oracles.problem(num_examples=10)
    return problem.inputs * 2 + 1, problem.targets


def make(rate=0.5, **options):
    keras.utils.set_random_seed(0)
    net = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(4, name="first", **options),
            keras.layers.BatchNormalization(momentum=0.9, name="norm"),
            keras.layers.Activation("tanh"),
            keras.layers.Dropout(rate),
            keras.layers.Dense(3, name="last"),
        ]
    )
    random = np.random.default_rng(1)
    for variable in net.variables:
        if variable.dtype == "float32":
            variable.assign(np.abs(random.normal(size=variable.shape)) + 0.1)
    return net


def stateless(net, data, train):
    """Keras' own call, whose variables come as lists."""
    return net.stateless_call(
        [variable.value for variable in net.trainable_variables],
        [variable.value for variable in net.non_trainable_variables],
        data[0],
        training=train,
    )


def test_names_modes_and_state_are_those_of_keras(data):
    net = make()
    before = [np.array(variable.value) for variable in net.variables]
    model = regjax.from_keras(net)
    assert set(model.params) == {"first", "norm", "last"}
    np.testing.assert_array_equal(
        model.params["last"]["kernel"], net.get_layer("last").kernel.value
    )
    assert model.has_batch_statistics
    assert model.has_generators
    for train in (False, True):
        outputs, new = model.apply(model.params, model.state, data[0], train=train)
        expected, moved = stateless(net, data, train)
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
        assert jax.tree.structure(new) == jax.tree.structure(model.state)
        np.testing.assert_allclose(new["norm"]["moving_mean"], moved[0], rtol=1e-6)
        np.testing.assert_array_equal(jax.tree.leaves(new["seed_generator"])[0], moved[-1])
    for variable, value in zip(net.variables, before, strict=True):
        np.testing.assert_array_equal(variable.value, value)


@pytest.mark.parametrize("mode", ["evaluation", "train"])
def test_the_hessian_is_that_of_keras_own_loss(mode, data):
    net = make(rate=0.0)
    model = regjax.from_keras(net)
    loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
    norm = net.get_layer("norm")

    def own(params, inputs, targets, moving):  # layers of Keras compute in float32
        hidden = inputs @ params["first"]["kernel"] + params["first"]["bias"]
        mean, variance = (hidden.mean(0), hidden.var(0)) if mode == "train" else moving
        hidden = (hidden - mean) / jnp.sqrt(variance + norm.epsilon) * params["norm"]["gamma"]
        hidden = jnp.tanh(hidden + params["norm"]["beta"])
        outputs = hidden @ params["last"]["kernel"] + params["last"]["bias"]
        return oracles.cross_entropy(outputs, targets)

    moving = norm.moving_mean.value, norm.moving_variance.value
    expected = oracles.dense_hessian(own, model.params, *data, moving)
    dense = curvature.hessian(loss, model.params, *data).dense()
    np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())
    assert regjax.couples_examples(loss) == (mode == "train")


def test_the_same_model_compiles_nothing_again_and_trains_on(data):
    net, traces = make(), []

    @jax.jit
    def evaluate(loss, params):
        traces.append(1)
        return loss(params, *data)

    found = []
    for scale in (1, 2):
        net.get_layer("last").kernel.assign(net.get_layer("last").kernel * scale)
        model = regjax.from_keras(net)
        loss = regjax.model_loss(model, oracles.cross_entropy)
        found.append(evaluate(loss, model.params))
        expected = oracles.cross_entropy(net(data[0], training=False), data[1])
        np.testing.assert_allclose(found[-1], expected, rtol=1e-5)
    assert len(traces) == 1
    assert abs(found[0] - found[1]) > 1e-3


def test_layers_that_are_frozen_later_change_nothing(data):
    net = make()
    model = regjax.from_keras(net)
    outputs, _ = model.apply(model.params, model.state, data[0], train=False)
    net.get_layer("first").trainable = False
    again, _ = model.apply(model.params, model.state, data[0], train=False)
    np.testing.assert_array_equal(again, outputs)
    frozen = regjax.from_keras(net)
    assert set(frozen.params) == {"norm", "last"}
    assert set(frozen.state["first"]) == {"kernel", "bias"}


def test_dropout_follows_the_key_or_the_generators_of_the_model(data):
    model = regjax.from_keras(make())
    run = lambda key: model.apply(model.params, model.state, data[0], train=True, key=key)[0]
    np.testing.assert_array_equal(run(KEY), run(KEY))
    np.testing.assert_array_equal(run(None), run(None))
    for one, other in ((KEY, jax.random.key(1)), (KEY, None)):
        assert np.abs(run(one) - run(other)).max() > 1e-3
    plain = regjax.from_keras(
        keras.Sequential([keras.Input((5,)), keras.layers.Dropout(0.5), keras.layers.Dense(3)])
    )
    assert not plain.has_batch_statistics
    assert regjax.couples_examples(regjax.model_function(plain, mode="train"))
    assert not regjax.couples_examples(regjax.model_function(plain))


def test_penalties_of_the_layers_come_with_a_call(data):
    net = make(rate=0.0, kernel_regularizer=keras.regularizers.L2(0.5))
    call = lambda module, x, *, training: (module(x, training=training), module.losses)
    model = regjax.from_keras(net, call=call)
    twice = jax.tree.map(lambda leaf: 2 * leaf, model.params)
    outputs, losses = regjax.model_function(model)(twice, data[0])
    np.testing.assert_allclose(losses[0], 0.5 * (twice["first"]["kernel"] ** 2).sum(), rtol=1e-6)
    np.testing.assert_array_equal(
        outputs, regjax.model_function(regjax.from_keras(net))(twice, data[0])
    )


def test_a_functional_model_of_several_inputs_and_outputs(data):
    keras.utils.set_random_seed(0)
    x, mask = keras.Input((5,), name="x"), keras.Input((1,), name="mask")
    hidden = keras.layers.Dense(4, activation="tanh", name="first")(x)
    out = keras.layers.Multiply()([keras.layers.Dense(3, name="last")(hidden), mask])
    net = keras.Model({"x": x, "mask": mask}, {"logits": out, "hidden": hidden})
    inputs = {"x": data[0], "mask": jnp.ones((10, 1)).at[0].set(0)}
    whole = regjax.from_keras(net)
    part = regjax.from_keras(net, wrt=lambda path, leaf: path[0] == "last")
    assert set(part.params) == {"last"}
    outputs = regjax.model_function(whole)(whole.params, inputs)
    expected = net(inputs)
    for name in ("logits", "hidden"):
        np.testing.assert_allclose(outputs[name], expected[name], rtol=1e-6)
    loss = lambda outputs, targets: oracles.cross_entropy(outputs["logits"], targets)

    def own(params, inputs, targets):
        hidden = jnp.tanh(inputs["x"] @ params["first"]["kernel"] + params["first"]["bias"])
        logits = (hidden @ params["last"]["kernel"] + params["last"]["bias"]) * inputs["mask"]
        return oracles.cross_entropy(logits, targets)

    expected = oracles.dense_hessian(own, whole.params, inputs, data[1])
    for model, where in ((whole, slice(None)), (part, slice(24, None))):
        bound = regjax.model_loss(model, loss)
        dense = curvature.hessian(bound, model.params, inputs, data[1], chunk_size=4).dense()
        np.testing.assert_allclose(
            dense, expected[where, where], atol=2e-5 * np.abs(expected).max()
        )


def test_custom_layers_with_state_of_their_own_count_as_batch_statistics():
    class Centered(keras.layers.Layer):
        def build(self, shape):
            self.mean = self.add_weight(shape=shape[1:], trainable=False, name="mean")
            self.scale = self.add_weight(shape=shape[1:], name="scale")

        def call(self, x, training=False):
            if training:
                self.mean.assign(keras.ops.mean(x, axis=0))
            return (x - self.mean) * self.scale

    net = keras.Sequential([keras.Input((5,)), Centered(name="centered")])
    model = regjax.from_keras(net)
    assert model.has_batch_statistics
    x = jnp.arange(15.0).reshape(3, 5)
    outputs, state = model.apply(model.params, model.state, x, train=True)
    np.testing.assert_allclose(state["centered"]["mean"], x.mean(0))
    np.testing.assert_allclose(outputs, (x - x.mean(0)) * model.params["centered"]["scale"])


def test_pruned_units_are_removed(data):
    model = regjax.from_keras(make(rate=0.0))
    small = networks.without_a_unit(model, data[0], "first")
    assert small.params["first"]["kernel"].shape == (5, 3)
    assert small.state["norm"]["moving_mean"].shape == (3,)


def test_wrong_arguments_are_named(data, monkeypatch):
    with pytest.raises(TypeError, match=r"`module` must be a keras\.Model, got dict"):
        regjax.from_keras({})
    with pytest.raises(ValueError, match="`module` must be built, as by a call on some inputs"):
        regjax.from_keras(keras.Sequential([keras.layers.Dense(3)]))
    with pytest.raises(ValueError, match="`wrt` must match at least one of the leaves first/"):
        regjax.from_keras(make(), wrt=lambda path, leaf: "tail" in path)
    model = regjax.from_keras(make())
    with pytest.raises(ValueError, match=r"`params` must have .* without \['first'\]\['bias'\]"):
        model.apply({"norm": model.params["norm"]}, model.state, data[0], train=False)
    with pytest.raises(
        TypeError, match=r"`params` must be real floating .*`from_keras` makes a mod"
    ):
        curvature.hessian(lambda net, x, y: 0.0, make(), *data)
    monkeypatch.setattr(keras.backend, "backend", lambda: "tensorflow")
    with pytest.raises(ValueError, match=r"KERAS_BACKEND=jax .* got the backend 'tensorflow'"):
        regjax.from_keras(make())


def test_layers_know_the_outputs_of_their_kernels():
    inputs = keras.Input((8, 3))
    hidden = keras.layers.DepthwiseConv1D(3, use_bias=False, depth_multiplier=2, name="a")(inputs)
    hidden = keras.layers.Conv1DTranspose(6, 3, use_bias=False, name="b")(hidden)
    heads = keras.layers.EinsumDense("btd,ndh->btnh", (None, 2, 4), name="c")(hidden)
    outputs = keras.layers.EinsumDense("btnh,nhd->btd", (None, 6), name="d")(heads)
    layout = regjax.from_keras(keras.Model(inputs, outputs)).layout
    found = {name: (one["kernel"].inputs, one["kernel"].outputs) for name, one in layout.items()}
    assert found == {
        "a": ((0,), (1, 2)),
        "b": ((0, 2), (1,)),
        "c": ((1,), (0, 2)),
        "d": ((0, 1), (2,)),
    }
