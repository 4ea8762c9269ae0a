"""`from_equinox` against Equinox's own forward pass, and dense float64 Hessians of its losses."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature
from tests import oracles
from tests.adapters import networks

KEY = jax.random.key(0)


class Net(eqx.Module):
    linear: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.MLP
    table: jax.Array  # integers: no parameter

    def __init__(self, key, rate=0.5):
        one, two = jax.random.split(key)
        self.linear = eqx.nn.Linear(5, 4, key=one)
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="ema")
        self.dropout = eqx.nn.Dropout(rate)
        self.head = eqx.nn.MLP(4, 3, 4, 1, activation=jnp.tanh, key=two)
        self.table = jnp.arange(4)

    def __call__(self, x, state, *, key=None):
        hidden, state = self.norm(self.linear(x), state)
        return self.head(self.dropout(jnp.tanh(hidden[self.table]), key=key)), state


def make(seed=0, **options):
    return eqx.nn.make_with_state(Net)(jax.random.key(seed), **options)


def mlp(seed=0):
    return eqx.nn.MLP(5, 3, 4, 1, activation=jnp.tanh, key=jax.random.key(seed))


@pytest.fixture
def data():
    problem = oracles.problem(num_examples=10)
    return problem.inputs * 2 + 1, problem.targets


def warmed_up(net, state, inputs):
    """The state after one pass in train mode, by Equinox alone."""
    copy = jax.tree.map(lambda leaf: leaf, state)
    net = eqx.nn.inference_mode(net, False)
    call = jax.vmap(net, (0, None), (0, None), axis_name="batch")
    return call(inputs, copy, key=jax.random.split(KEY, len(inputs)))[1]


def test_names_are_those_of_equinox_and_the_parameters_are_its_partition():
    net, state = make()
    model = regjax.from_equinox(net, state)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(model.params)]
    assert paths[:3] == [".linear.weight", ".linear.bias", ".norm.weight"]
    assert ".head.layers[0].weight" in paths
    assert jax.tree.structure(model.params) == jax.tree.structure(
        eqx.filter(net, eqx.is_inexact_array)
    )
    np.testing.assert_array_equal(eqx.combine(model.params, net).linear.weight, net.linear.weight)
    np.testing.assert_array_equal(model.state["params"].table, net.table)
    assert model.has_batch_statistics


def test_evaluation_and_train_mode_are_equinox_own(data):
    net, state = make()
    state = warmed_up(net, state, data[0])
    model = regjax.from_equinox(net, state)
    for _ in range(2):  # nobody invalidates the state
        outputs, new = model.apply(model.params, model.state, data[0], train=False)
    assert new is model.state
    ours = jax.vmap(eqx.nn.inference_mode(net), (0, None), (0, None), axis_name="batch")
    np.testing.assert_allclose(outputs, ours(data[0], state)[0], rtol=1e-6)

    outputs, new = model.apply(model.params, model.state, data[0], train=True, key=KEY)
    call = jax.vmap(net, (0, None), (0, None), axis_name="batch")
    expected, moved = call(data[0], state, key=jax.random.split(KEY, 10))
    np.testing.assert_allclose(outputs, expected, rtol=1e-6)
    for ours, theirs in zip(jax.tree.leaves(new["state"]), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    assert jax.tree.structure(new) == jax.tree.structure(model.state)


@pytest.mark.parametrize("mode", ["evaluation", "train"])
def test_the_hessian_is_that_of_equinox_own_loss(mode, data):
    net, state = make(rate=0.0)
    state = warmed_up(net, state, data[0])
    model = regjax.from_equinox(net, state)
    static = eqx.nn.inference_mode(net, mode == "evaluation")

    def own(params, inputs, targets, state):
        whole = eqx.combine(params, static)
        outputs, _ = jax.vmap(whole, (0, None), (0, None), axis_name="batch")(inputs, state)
        return oracles.cross_entropy(outputs, targets)

    expected = oracles.dense_hessian(own, model.params, *data, state)
    loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
    assert regjax.couples_examples(loss) == (mode == "train")
    dense = curvature.hessian(loss, model.params, *data).dense()
    np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())


def test_a_module_without_state_is_mapped_over_the_batch(data):
    net = mlp()
    model = regjax.from_equinox(net)
    assert model.state == {}
    outputs, state = model.apply(model.params, {}, data[0], train=True)
    np.testing.assert_allclose(outputs, jax.vmap(net)(data[0]), rtol=1e-6)
    assert state == {}
    assert not model.has_batch_statistics


def test_equal_modules_compile_nothing_again(data):
    traces = []

    @jax.jit
    def evaluate(loss, params):
        traces.append(1)
        return loss(params, *data)

    for seed in (0, 1):
        model = regjax.from_equinox(*make(seed))
        for state in (model.state, jax.tree.map(jnp.copy, model.state)):
            each = model._replace(state=state)
            evaluate(regjax.model_loss(each, oracles.cross_entropy), model.params)
    assert len(traces) == 1
    assert hash(regjax.from_equinox(*make(0)).apply) == hash(model.apply)


def test_a_static_field_that_does_not_hash_is_compared(data):
    class Listed(eqx.Module):
        inner: eqx.nn.MLP
        sizes: list = eqx.field(static=True)

        def __call__(self, x):
            return self.inner(x) * len(self.sizes)

    one, same, other = (Listed(mlp(), sizes) for sizes in ([1], [1], [1, 2]))
    models = [regjax.from_equinox(net) for net in (one, same, other)]
    assert models[0].apply == models[1].apply
    assert hash(models[0].apply) == hash(models[1].apply)
    assert models[0].apply != models[2].apply


def test_dropout_follows_the_key_and_needs_one(data):
    model = regjax.from_equinox(*make())
    run = lambda key: model.apply(model.params, model.state, data[0], train=True, key=key)[0]
    np.testing.assert_array_equal(run(KEY), run(KEY))
    assert np.abs(run(KEY) - run(jax.random.key(1))).max() > 1e-3
    with pytest.raises(ValueError, match="`key` must be given in train mode: Net has dropout"):
        run(None)


def test_dropout_that_was_told_not_to_train_is_refused(data):
    class Own(eqx.Module):
        dropout: eqx.nn.Dropout
        linear: eqx.nn.Linear

        def __call__(self, x, *, noisy=False, key=None):
            return self.dropout(self.linear(x), key=key, inference=not noisy)

    net = Own(eqx.nn.Dropout(0.5), eqx.nn.Linear(5, 3, key=KEY))
    run = lambda model, train: model.apply(model.params, {}, data[0], train=train, key=KEY)[0]
    model = regjax.from_equinox(net)
    evaluation = run(model, False)
    with pytest.raises(
        ValueError, match=r"`mode` must be 'evaluation' .* Own has dropout that its"
    ):
        run(model, True)
    with pytest.raises(ValueError, match=r"Own has dropout .*, though its call is told by train"):
        run(regjax.from_equinox(net, call=lambda net, x, key, train: jax.vmap(net)(x)), True)

    def call(net, x, key, train):
        one = lambda x, key: net(x, key=key, noisy=train)
        keys = None if key is None else jax.random.split(key, len(x))
        return jax.vmap(one, (0, None if key is None else 0))(x, keys)

    told = regjax.from_equinox(net, call=call)
    np.testing.assert_array_equal(run(told, False), evaluation)
    assert np.abs(run(told, True) - evaluation).max() > 1e-3
    jax.jit(jax.grad(lambda params: told.apply(params, {}, data[0], train=True, key=KEY)[0].sum()))(
        told.params
    )


def test_a_batch_norm_that_was_told_not_to_train_is_refused(data):
    class Frozen(eqx.Module):
        norm: eqx.nn.BatchNorm

        def __call__(self, x, state, noisy=False):
            return self.norm(x, state, inference=not noisy)

    net, state = eqx.nn.make_with_state(lambda: Frozen(eqx.nn.BatchNorm(5, "batch", mode="ema")))()
    model = regjax.from_equinox(net, state)
    with pytest.raises(ValueError, match="`mode` must be 'evaluation' for a module that does not"):
        model.apply(model.params, model.state, data[0], train=True)

    def call(module, inputs, *, state, train):
        one = lambda x, state: module(x, state, noisy=train)
        return jax.vmap(one, (0, None), (0, None), axis_name="batch")(inputs, state)

    told = regjax.from_equinox(net, state, call=call)
    outputs, _ = told.apply(told.params, told.state, data[0], train=True)
    np.testing.assert_allclose(outputs.mean(0), 0, atol=1e-5)


def test_a_call_of_several_inputs_and_outputs(data):
    net = mlp()

    def call(module, inputs, *, key):
        hidden = jax.vmap(module)(inputs["x"]) * inputs["mask"][:, None]
        return {"logits": hidden, "noisy": key is not None}

    model = regjax.from_equinox(net, call=call)
    inputs = {"x": data[0], "mask": jnp.ones(10).at[0].set(0)}
    outputs, _ = model.apply(model.params, {}, inputs, train=True, key=KEY)
    np.testing.assert_allclose(outputs["logits"][1:], jax.vmap(net)(data[0])[1:], rtol=1e-6)
    assert (outputs["logits"][0] == 0).all()
    assert outputs["noisy"]
    assert not model.apply(model.params, {}, inputs, train=False)[0]["noisy"]
    loss = regjax.model_loss(model, lambda o, y: oracles.cross_entropy(o["logits"], y))

    def own(params, inputs, targets):
        whole = eqx.combine(params, net)
        outputs = jax.vmap(whole)(inputs["x"]) * inputs["mask"][:, None]
        return oracles.cross_entropy(outputs, targets)

    expected = oracles.dense_hessian(own, model.params, inputs, data[1])
    dense = curvature.hessian(loss, model.params, inputs, data[1], chunk_size=3).dense()
    np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())


def last_layer(net):
    none = jax.tree.map(lambda _: False, net)
    where = lambda tree: (tree.head.layers[1].weight, tree.head.layers[1].bias)
    return eqx.tree_at(where, none, (True, True))


@pytest.mark.parametrize(
    "wrt",
    [
        lambda path, leaf: path[:3] == ("head", "layers", 1),
        last_layer(make()[0]),
        eqx.filter(last_layer(make()[0]), jax.tree.map(eqx.is_array, make()[0])),
    ],
    ids=["path", "filter", "arrays"],
)
def test_a_part_of_the_parameters_gives_the_principal_submatrix(wrt, data):
    net, state = make(rate=0.0)
    state = warmed_up(net, state, data[0])
    whole = regjax.from_equinox(net, state)
    part = regjax.from_equinox(net, state, wrt=wrt)
    assert [leaf.shape for leaf in jax.tree.leaves(part.params)] == [(3, 4), (3,)]
    dense = [
        curvature.hessian(
            regjax.model_loss(model, oracles.cross_entropy), model.params, *data
        ).dense()
        for model in (whole, part)
    ]
    np.testing.assert_allclose(dense[1], dense[0][-15:, -15:], atol=1e-6)
    _, new = part.apply(part.params, part.state, data[0], train=True, key=KEY)
    assert jax.tree.structure(new) == jax.tree.structure(part.state)


def test_pruned_units_are_removed(data):
    net, state = make(rate=0.0)
    state = warmed_up(net, state, data[0])
    model = regjax.from_equinox(net, state)
    small = networks.without_a_unit(model, data[0])
    assert sum(x.size for x in jax.tree.leaves(small.params)) < sum(
        x.size for x in jax.tree.leaves(model.params)
    )


def test_wrong_arguments_are_named(data):
    net, state = make()
    with pytest.raises(TypeError, match=r"`module` must be an equinox\.Module, got dict"):
        regjax.from_equinox({})
    with pytest.raises(TypeError, match=r"`state` must be an equinox\.nn\.State, got dict"):
        regjax.from_equinox(net, {})
    with pytest.raises(ValueError, match="`wrt` must match at least one"):
        regjax.from_equinox(net, state, wrt=lambda path, leaf: "tail" in path)
    with pytest.raises(ValueError, match="`wrt` must choose at least one leaf of real floating"):
        regjax.from_equinox(net, state, wrt=lambda path, leaf: "table" in path)
    with pytest.raises(TypeError, match=r"`params\.weight` must be real floating point, got comp"):
        regjax.from_equinox(eqx.nn.Linear(2, 2, dtype=jnp.complex64, key=KEY))

    class Two(eqx.Module):
        one: eqx.nn.BatchNorm
        two: eqx.nn.BatchNorm

    norms = [eqx.nn.BatchNorm(2, name, mode="ema") for name in ("a", "b")]
    with pytest.raises(ValueError, match=r"must have batch norms of one axis name, got \['a', 'b'"):
        regjax.from_equinox(*eqx.nn.make_with_state(lambda: Two(*norms))())


def test_a_whole_module_as_parameters_is_refused_with_its_leaf(data):
    net = mlp()
    loss = lambda params, x, y: oracles.cross_entropy(jax.vmap(params)(x), y)
    with pytest.raises(TypeError, match=r"`params\.activation` .* `regjax\.from_equinox`"):
        curvature.hessian(loss, net, *data)
    with pytest.raises(TypeError, match=r"`params\.activation` .*equinox\.partition"):
        regjax.subset(loss, net, wrt=None)
    params, static = eqx.partition(net, eqx.is_inexact_array)
    own = lambda params, x, y: loss(eqx.combine(params, static), x, y)
    dense = curvature.hessian(own, params, *data).dense()
    model = regjax.from_equinox(net)
    ours = curvature.hessian(regjax.model_loss(model, oracles.cross_entropy), model.params, *data)
    np.testing.assert_allclose(dense, ours.dense(), atol=1e-6)


@pytest.mark.parametrize("mode", ["ema", "batch"])
@pytest.mark.parametrize("num_steps", [0, 3])
def test_population_statistics_are_those_that_evaluation_reads(mode, num_steps, data):
    def net():
        norm = eqx.nn.BatchNorm(4, "batch", mode=mode, momentum=0.9)
        return eqx.nn.Sequential([eqx.nn.Linear(5, 4, key=KEY), norm])

    model = regjax.from_equinox(*eqx.nn.make_with_state(net)())
    state = model.state
    for _ in range(num_steps):
        state = regjax.updated_statistics(model, model.params, data[0], state=state)
    batches = [data[0], data[0][:4]]
    state = regjax.population_statistics(model, model.params, batches, state=state)
    layer = model.params.layers[0]
    hidden = [batch @ layer.weight.T + layer.bias[None] for batch in batches]
    mean = (10 * hidden[0].mean(0) + 4 * hidden[1].mean(0)) / 14
    variance = (10 * hidden[0].var(0) + 4 * hidden[1].var(0)) / 14
    outputs, _ = model.apply(model.params, state, data[0], train=False)
    expected = (hidden[0] - mean[None]) / jnp.sqrt(variance + 1e-5)[None]
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_called_on_the_inputs_alone_is_refused():
    class Two(eqx.Module):
        norm: eqx.nn.BatchNorm

        def __call__(self, x, mask, state):
            return self.norm(x, state)

    net, state = eqx.nn.make_with_state(lambda: Two(eqx.nn.BatchNorm(4, "batch", mode="ema")))()
    with pytest.raises(TypeError, match=r"`call` must .* needs mask too: pass `call=lambda"):
        regjax.from_equinox(net, state)
    with pytest.raises(ValueError, match="`state` must be given for a module that has one"):
        regjax.from_equinox(net.norm)
