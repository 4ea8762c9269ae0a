import sys
from functools import partial

import equinox
import haiku
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from flax import core, linen, nnx
from jax.flatten_util import ravel_pytree

import regjax
from regjax import curvature, pruning
from tests import oracles

MOMENTUM, EPSILON = 0.9, 1e-5
KINDS = ["linen", "nnx"]


class LinenNet(linen.Module):
    rate: float = 0.0
    width: int = 4

    @linen.compact
    def __call__(self, inputs, train):
        hidden = linen.Dense(self.width, name="dense")(inputs)
        hidden = linen.BatchNorm(not train, momentum=MOMENTUM, name="norm")(hidden)
        hidden = linen.Dropout(self.rate, deterministic=not train)(jnp.tanh(hidden))
        return linen.Dense(3, name="head")(hidden)


class NnxNet(nnx.Module):
    def __init__(self, rate=0.0, width=4, *, rngs):
        self.dense = nnx.Linear(5, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.head = nnx.Linear(width, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.head(self.dropout(jnp.tanh(self.norm(self.dense(inputs)))))


def linear(params, inputs):
    return inputs @ params["kernel"] + params["bias"][None]


def hand_written(params, inputs, statistics=None):
    """The net without flax; the batch's own statistics if none are given."""
    hidden = linear(params["dense"], inputs)
    if statistics is None:
        mean = hidden.mean(axis=0)
        statistics = mean, ((hidden - mean[None]) ** 2).mean(axis=0)
    mean, variance = (jnp.asarray(moment, hidden.dtype) for moment in statistics)
    hidden = (hidden - mean[None]) / jnp.sqrt(variance + EPSILON)[None]
    hidden = hidden * params["norm"]["scale"][None] + params["norm"]["bias"][None]
    return linear(params["head"], jnp.tanh(hidden))


def hand_written_loss(params, inputs, targets, statistics=None):
    return oracles.cross_entropy(hand_written(params, inputs, statistics), targets)


def make_model(kind, rate=0.0, seed=0, width=4):
    if kind == "linen":
        module = LinenNet(rate, width)
        return regjax.from_linen(module, module.init(jax.random.key(seed), jnp.ones((2, 5)), False))
    return regjax.from_nnx(NnxNet(rate, width, rngs=nnx.Rngs(seed)))


def random_tree(like, seed):
    vector, unravel = ravel_pytree(like)
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=vector.size), vector.dtype))


@pytest.fixture
def data():
    problem = oracles.problem(num_examples=10)
    return problem.inputs * 2 + 1, problem.targets


def statistics_of(model, state):
    return state["batch_stats"]["norm"] if "batch_stats" in state else state["norm"]


def with_statistics(model, mean, variance):
    statistics = {"mean": jnp.asarray(mean), "var": jnp.asarray(variance)}
    if "batch_stats" in model.state:
        return {**model.state, "batch_stats": {"norm": statistics}}
    return {**model.state, "norm": statistics}


@pytest.mark.parametrize("kind", KINDS)
def test_train_mode_uses_the_batch_and_updates_the_running_statistics_once(kind, data):
    model = make_model(kind)
    params = random_tree(model.params, seed=1)
    mean, variance = np.arange(4, dtype=np.float32), np.arange(1, 5, dtype=np.float32)
    state = with_statistics(model, mean, variance)
    outputs, new_state = model.apply(params, state, data[0], train=True, key=jax.random.key(0))
    np.testing.assert_allclose(outputs, hand_written(params, data[0]), rtol=1e-4, atol=1e-4)
    hidden = np.asarray(linear(params["dense"], data[0]))
    new = statistics_of(model, new_state)
    np.testing.assert_allclose(
        new["mean"], MOMENTUM * mean + (1 - MOMENTUM) * hidden.mean(0), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(
        new["var"], MOMENTUM * variance + (1 - MOMENTUM) * hidden.var(0), rtol=1e-4
    )
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_mode_uses_the_running_statistics_and_changes_nothing(kind, data):
    model = make_model(kind, rate=0.5)
    params = random_tree(model.params, seed=1)
    mean, variance = np.arange(4, dtype=np.float32), np.arange(1, 5, dtype=np.float32)
    state = with_statistics(model, mean, variance)
    outputs, new_state = model.apply(params, state, data[0], train=False)
    expected = hand_written(params, data[0], (mean, variance))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    assert new_state is state


def test_linen_and_nnx_have_one_tree_of_parameters():
    assert jax.tree.map(jnp.shape, make_model("linen").params) == jax.tree.map(
        jnp.shape, make_model("nnx").params
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["train", "evaluation"])
def test_the_hessian_of_each_mode_is_that_of_the_hand_written_network(kind, mode, data):
    model = make_model(kind)
    params = random_tree(model.params, seed=1)
    mean, variance = np.full(4, 0.5, np.float32), np.full(4, 3, np.float32)
    model = model._replace(state=with_statistics(model, mean, variance))
    statistics = None if mode == "train" else (mean, variance)

    reference = partial(hand_written_loss, statistics=statistics)
    loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
    dense = curvature.hessian(loss, params, *data).dense()
    expected = oracles.dense_hessian(reference, params, *data)
    np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_products_with_batch_norm_and_dropout_are_symmetric_and_repeatable(kind, data):
    model = make_model(kind, rate=0.5)
    u, v = random_tree(model.params, seed=2), random_tree(model.params, seed=3)

    def product(key, vector):
        loss = regjax.model_loss(model, oracles.cross_entropy, mode="train", key=key)
        gradient = jax.grad(lambda params: loss(params, *data))
        return ravel_pytree(jax.jvp(gradient, (model.params,), (vector,))[1])[0]

    first, again = (product(jax.random.key(0), v) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - product(jax.random.key(1), v)).max() > 1e-3
    one, other = ravel_pytree(u)[0] @ first, ravel_pytree(v)[0] @ product(jax.random.key(0), u)
    np.testing.assert_allclose(one, other, rtol=1e-4)


def test_dropout_of_nnx_follows_the_key_with_a_mask_of_its_own_for_each_layer():
    class Masks(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Dropout(0.5, rngs=rngs)
            self.two = nnx.Dropout(0.5, rngs=rngs)
            self.three = nnx.Dropout(0.5, rng_collection="noise", rngs=rngs)

        def __call__(self, inputs):
            return jnp.stack([self.one(inputs), self.two(inputs), self.three(inputs)])

    inputs = jnp.ones(200)
    runs = []
    for seed in (0, 1):
        model = regjax.from_nnx(Masks(nnx.Rngs(dropout=seed, noise=seed + 2)))
        keys = [jax.random.key(7), jax.random.key(7), jax.random.key(8)]
        runs += [model.apply({}, model.state, inputs, train=True, key=key)[0] for key in keys]
    for i in (1, 3, 4):  # the same key, whatever keys the module was made with
        np.testing.assert_array_equal(runs[0], runs[i])
    np.testing.assert_array_equal(runs[2], runs[5])
    # Independent masks of 200 agree on 100 +- 7 places.
    for a, b in ((runs[0][0], runs[0][1]), (runs[0][0], runs[0][2]), (runs[0][0], runs[2][0])):
        assert abs(int((a == b).sum()) - 100) < 36


@pytest.mark.parametrize("kind", KINDS)
def test_an_equal_model_or_a_new_state_does_not_trace_again(kind, data):
    traces = []

    @jax.jit
    def evaluate(loss, params):
        traces.append(loss.function.mode)
        return loss(params, *data)

    for seed in (0, 1):
        model = make_model(kind, seed=seed)
        _, state = model.apply(
            model.params, model.state, data[0], train=True, key=jax.random.key(0)
        )
        for each in (model, model._replace(state=state)):
            evaluate(regjax.model_loss(each, oracles.cross_entropy), model.params)
    assert traces == ["evaluation"]
    evaluate(regjax.model_loss(model, oracles.cross_entropy, mode="train"), model.params)
    assert traces == ["evaluation", "train"]
    loss = regjax.model_loss(model, oracles.cross_entropy)
    np.testing.assert_allclose(
        jax.jit(loss)(model.params, *data), evaluate(loss, model.params), rtol=1e-6
    )
    np.testing.assert_allclose(
        jax.jit(loss.function)(model.params, data[0]),
        loss.function(model.params, data[0]),
        rtol=1e-5,
    )


@pytest.mark.parametrize(
    ("flag", "in_training"),
    [("train", True), ("training", True), ("deterministic", False), ("use_running_average", False)],
)
def test_linen_modules_hear_of_the_mode_by_any_of_the_usual_names(flag, in_training):
    namespace = {}
    exec(f"def __call__(self, inputs, *, {flag}={not in_training}): return {flag}", namespace)
    module = type("Net", (linen.Module,), namespace)()
    model = regjax.from_linen(module, {"params": {}})
    assert model.apply({}, {}, jnp.ones(1), train=True)[0] is in_training
    assert model.apply({}, {}, jnp.ones(1), train=False)[0] is not in_training


def test_frozen_variables_become_plain_dicts():
    module = linen.Dense(2)
    model = regjax.from_linen(module, core.freeze(module.init(jax.random.key(0), jnp.ones((1, 3)))))
    assert type(model.params) is dict
    assert model.state == {}
    assert not model.has_batch_statistics
    assert model.apply(model.params, {}, jnp.ones((1, 3)), train=True)[1] == {}


def test_lists_of_nnx_layers_keep_their_order_and_refuse_text_keys():
    layers = [nnx.Linear(1, 1, rngs=nnx.Rngs(0)) for _ in range(12)]
    for i, layer in enumerate(layers):
        layer.kernel[...], layer.bias[...] = jnp.full((1, 1), 2.0), jnp.full(1, float(i))
    model = regjax.from_nnx(nnx.Sequential(*layers))
    expected = 1.0
    for i in range(12):
        expected = 2 * expected + i
    outputs, _ = model.apply(model.params, model.state, jnp.ones((1, 1)), train=False)
    np.testing.assert_allclose(outputs, [[expected]])
    # nnx itself takes these and pairs layer "10" with layer 2.
    texts = {"layers": {str(i): leaf for i, leaf in model.params["layers"].items()}}
    with pytest.raises(ValueError, match="`params` must have the tree structure"):
        model.apply(texts, model.state, jnp.ones((1, 1)), train=False)


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_chunks(kind, data):
    model = make_model(kind)
    train, per_chunk = (
        regjax.model_loss(model, oracles.cross_entropy, mode=mode)
        for mode in ("train", "train_per_chunk")
    )
    assert regjax.couples_examples(train)
    assert regjax.couples_examples(regjax.model_function(model, mode="train"))
    assert not regjax.couples_examples(regjax.model_loss(model, oracles.cross_entropy))
    with pytest.raises(ValueError, match="`chunk_size` must not split"):
        curvature.hessian(train, model.params, *data, chunk_size=6)
    chunked = curvature.hessian(per_chunk, model.params, *data, chunk_size=6).dense()
    parts = [
        oracles.dense_hessian(hand_written_loss, model.params, data[0][part], data[1][part])
        for part in (slice(0, 6), slice(6, 10))
    ]
    expected = np.average(parts, axis=0, weights=[6, 4])
    np.testing.assert_allclose(chunked, expected, atol=2e-5 * np.abs(expected).max())


def test_a_dropout_mask_belongs_to_the_whole_batch(data):
    model = regjax.from_callable(oracles.model_fn, oracles.problem().params)
    key = jax.random.key(0)
    assert regjax.couples_examples(regjax.model_function(model, mode="train", key=key))
    for mode in ("evaluation", "train_per_chunk"):
        assert not regjax.couples_examples(regjax.model_function(model, mode=mode, key=key))
    assert not regjax.couples_examples(regjax.model_function(model, mode="train"))


def test_a_callable_becomes_a_model(data):
    problem = oracles.problem(num_examples=10)
    model = regjax.from_callable(oracles.model_fn, problem.params)
    assert model == regjax.from_callable(oracles.model_fn, problem.params, {})
    outputs, state = model.apply(problem.params, {}, problem.inputs, train=True)
    np.testing.assert_array_equal(outputs, oracles.model_fn(problem.params, problem.inputs))
    assert state == {}
    carried = regjax.from_callable(oracles.model_fn, problem.params, {"steps": 3})
    assert carried.apply(problem.params, {"steps": 4}, problem.inputs, train=True)[1] == {
        "steps": 4
    }


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_and_state_of_another_model_are_refused(kind, data):
    model = make_model(kind)
    less = {name: leaf for name, leaf in model.params.items() if name != "norm"}
    renamed = {**less, "norms": model.params["norm"]}
    for params in (less, renamed, {**model.params, "more": jnp.ones(1)}):
        with pytest.raises(ValueError, match="`params` must have the tree structure"):
            regjax.model_function(model)(params, data[0])
    with pytest.raises(ValueError, match="`state` must have the tree structure"):
        model.apply(model.params, {}, data[0], train=False)


def test_wrong_arguments_are_named():
    model = make_model("nnx")
    with pytest.raises(ValueError, match="`mode` must be one of evaluation, train, train_per_ch"):
        regjax.model_loss(model, oracles.cross_entropy, mode="eval")
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        regjax.model_function(model, mode="train", key=0)
    with pytest.raises(TypeError, match="`output_loss_fn` must be callable, got str"):
        regjax.model_loss(model, "cross_entropy")
    with pytest.raises(TypeError, match=r"must be a flax\.nnx\.Module, got LinenNet"):
        regjax.from_nnx(LinenNet())
    with pytest.raises(TypeError, match=r"must be a flax\.linen\.Module, got NnxNet"):
        regjax.from_linen(NnxNet(rngs=nnx.Rngs(0)), {"params": {}})
    with pytest.raises(ValueError, match="`variables` must hold 'params', got \\['kernel'\\]"):
        regjax.from_linen(LinenNet(), {"kernel": jnp.ones(1)})
    with pytest.raises(TypeError, match="`function` must be callable, got dict"):
        regjax.from_callable({}, {})
    with pytest.raises(TypeError, match="must be real floating point, got int32"):
        regjax.from_callable(oracles.model_fn, {"kernel": jnp.ones(1, jnp.int32)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("writable", [True, False])
def test_arrays_of_the_caller_are_never_written(kind, writable, data):
    model = make_model(kind)

    def plain(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf
        array = np.array(leaf)
        array.flags.writeable = writable
        return array

    def numbers(tree):
        floating = lambda leaf: not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return [np.array(leaf) for leaf in jax.tree.leaves(tree) if floating(leaf)]

    params, state = jax.tree.map(plain, model.params), jax.tree.map(plain, model.state)
    before = numbers((params, state))
    key = jax.random.key(0)
    _, new = model.apply(params, state, data[0], train=True, key=key)
    again = regjax.updated_statistics(model, params, data[0], state=state, key=key)
    jax.tree.map(np.testing.assert_array_equal, numbers(new), numbers(again))
    assert any(np.any(a != b) for a, b in zip(numbers(new), numbers(state), strict=True))
    numpy_model = model._replace(params=params, state=state)
    loss = regjax.model_loss(numpy_model, oracles.cross_entropy, mode="train", key=key)
    loss(params, *data)
    regjax.initializers.data_dependent(numpy_model, params, state, data[0], key=key)
    for one, other in zip(before, numbers((params, state)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_module_with_arrays_of_numpy_is_not_changed(data):
    module = NnxNet(rngs=nnx.Rngs(0))
    module.norm.mean.set_value(np.zeros(4, np.float32))
    module.norm.var.set_value(np.ones(4, np.float32))
    model = regjax.from_nnx(module)
    model.apply(model.params, model.state, data[0], train=True, key=jax.random.key(0))
    np.testing.assert_array_equal(module.norm.mean[...], 0)
    module.norm.mean[...] += 1
    np.testing.assert_array_equal(model.state["norm"]["mean"], 0)


def by_hand(params, state, inputs, *, train, key=None):
    """The example of `regjax.Model`: a model that no framework made."""
    hidden = inputs @ params["first"]
    mean = hidden.mean(0) if train else state["mean"]
    hidden = jax.nn.relu(hidden - mean[None])
    if train and key is not None:
        hidden = 2 * hidden * jax.random.bernoulli(key, 0.5, hidden.shape).astype(hidden.dtype)
    new_state = {"mean": 0.9 * state["mean"] + 0.1 * mean} if train else state
    return hidden @ params["last"], new_state


def test_a_model_may_be_made_by_hand(data):
    params = random_tree({"first": jnp.ones((5, 4)), "last": jnp.ones((4, 3))}, seed=1)
    model = regjax.Model(by_hand, params, {"mean": jnp.full(4, 0.5)}, has_batch_statistics=True)
    for mode in ("evaluation", "train"):
        loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)

        def own(params, inputs, targets, state, mode=mode):
            outputs, _ = by_hand(params, state, inputs, train=mode == "train")
            return oracles.cross_entropy(outputs, targets)

        expected = oracles.dense_hessian(own, params, *data, model.state)
        dense = curvature.hessian(loss, params, *data).dense()
        np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())
        assert regjax.couples_examples(loss) == (mode == "train")
    state = regjax.updated_statistics(model, params, data[0])
    mean = 0.9 * 0.5 + 0.1 * (data[0] @ params["first"]).mean(0)
    np.testing.assert_allclose(state["mean"], mean, rtol=1e-5, atol=1e-5)
    cost = pruning.find_structure(regjax.model_function(model), params, data[0])
    assert list(cost.groups) == ["first"]


@pytest.mark.parametrize(
    ("package", "adapt"),
    [
        ("equinox", lambda: regjax.from_equinox(None)),
        ("haiku", lambda: regjax.from_haiku(None, {})),
        ("keras", lambda: regjax.from_keras(None)),
    ],
)
def test_a_package_that_is_not_there_is_named(package, adapt, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    name = {"haiku": "dm-haiku"}.get(package, package)
    with pytest.raises(
        ImportError, match=rf"`from_{package}` needs {name}.*pip install {name}, or"
    ):
        adapt()


def test_parameters_of_one_adapter_are_refused_by_the_others(data, default_promotion):
    net = equinox.nn.MLP(5, 3, 4, 1, key=jax.random.key(0))
    transformed = haiku.transform(lambda x: haiku.nets.MLP([4, 3])(x))
    network = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    models = [
        make_model("nnx"),
        regjax.from_equinox(net),
        regjax.from_haiku(transformed, transformed.init(jax.random.key(0), data[0])),
        regjax.from_keras(network),
        regjax.from_linen(linen.Dense(3), linen.Dense(3).init(jax.random.key(0), data[0])),
    ]
    for model in models:
        for other in models:
            if other is not model:
                with pytest.raises(
                    ValueError, match=r"`params` must have the tree .* got one with"
                ):
                    model.apply(other.params, model.state, data[0], train=False)
    loss = regjax.model_loss(models[1], oracles.cross_entropy)
    with pytest.raises(ValueError, match=r"`params` must have .* without \.layers\[0\]\.weight"):
        curvature.hessian(loss, models[2].params, *data)
