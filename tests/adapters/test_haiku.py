"""`from_haiku` against Haiku's own forward pass, and dense float64 Hessians of its losses."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature
from tests import oracles
from tests.adapters import networks

KEY = jax.random.key(0)


def forward(x, is_training, rate=0.5):
    hidden = hk.Linear(4, name="first")(x)
    hidden = hk.BatchNorm(True, True, 0.9, name="norm")(hidden, is_training)
    hidden = jnp.tanh(hidden)
    if is_training and rate:
        hidden = hk.dropout(hk.next_rng_key(), rate, hidden)
    return hk.nets.MLP([4, 3], activation=jnp.tanh, name="head")(hidden)


NET = hk.transform_with_state(forward)
SURE = hk.transform_with_state(lambda x, is_training: forward(x, is_training, 0))


@pytest.fixture
def data():
    problem = oracles.problem(num_examples=10)
    return problem.inputs * 2 + 1, problem.targets


@pytest.fixture(autouse=True)
def _haiku_promotes(default_promotion):
    """Haiku's own layers promote ranks and types."""


def make(data, net=NET, **options):
    params, state = net.init(KEY, data[0], is_training=True)
    _, state = net.apply(params, state, KEY, data[0], is_training=True)
    return regjax.from_haiku(net, params, state, **options), params, state


def test_names_modes_and_state_are_those_of_haiku(data):
    model, params, state = make(data)
    assert model.params == params
    assert set(model.params) == {"first", "norm", "head/~/linear_0", "head/~/linear_1"}
    assert model.has_batch_statistics
    for train, key in ((False, None), (True, KEY)):
        outputs, new = model.apply(model.params, model.state, data[0], train=train, key=key)
        expected, moved = NET.apply(params, state, key, data[0], is_training=train)
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, new["state"], moved)
        assert jax.tree.structure(new) == jax.tree.structure(model.state)
    assert model == regjax.from_haiku(NET, params, state)._replace(
        params=model.params, state=model.state
    )


@pytest.mark.parametrize("mode", ["evaluation", "train"])
def test_the_hessian_is_that_of_haikus_own_loss(mode, data):
    model, _, state = make(data, SURE)

    def own(params, inputs, targets, state):
        train = mode == "train"
        outputs, _ = SURE.apply(params, state, None, inputs, is_training=train)
        return oracles.cross_entropy(outputs, targets)

    expected = oracles.dense_hessian(own, model.params, *data, state)
    loss = regjax.model_loss(model, oracles.cross_entropy, mode=mode)
    dense = curvature.hessian(loss, model.params, *data).dense()
    np.testing.assert_allclose(dense, expected, atol=2e-5 * np.abs(expected).max())
    assert regjax.couples_examples(loss) == (mode == "train")


def test_the_same_function_compiles_nothing_again(data):
    traces = []

    @jax.jit
    def evaluate(loss, params):
        traces.append(1)
        return loss(params, *data)

    for _ in range(2):
        model, *_ = make(data)
        evaluate(regjax.model_loss(model, oracles.cross_entropy), model.params)
    assert len(traces) == 1


def test_dropout_follows_the_key_and_needs_one(data):
    model, *_ = make(data)
    run = lambda key: model.apply(model.params, model.state, data[0], train=True, key=key)[0]
    np.testing.assert_array_equal(run(KEY), run(KEY))
    assert np.abs(run(KEY) - run(jax.random.key(1))).max() > 1e-3
    with pytest.raises(ValueError, match=r"`key` must be given, in train mode, .* got none"):
        run(None)


def test_a_function_without_state(data):
    net = hk.transform(lambda x: hk.nets.MLP([4, 3])(x))
    model = regjax.from_haiku(net, net.init(KEY, data[0]))
    assert model.state == {}
    outputs, state = model.apply(model.params, {}, data[0], train=True, key=KEY)
    np.testing.assert_array_equal(outputs, net.apply(model.params, None, data[0]))
    assert state == {}
    assert not model.has_batch_statistics


def test_a_flag_of_training_that_is_not_known_is_refused(data):
    def strange(x, noisy=False):
        return forward(x, noisy)

    def dropped(x, noisy: bool = False):
        return hk.dropout(hk.next_rng_key(), 0.5, x) if noisy else hk.Linear(3)(x)

    net = hk.transform_with_state(strange)
    params, state = net.init(KEY, data[0], True)
    model = regjax.from_haiku(net, params, state)
    with pytest.raises(ValueError, match=r"`mode` must be 'evaluation' .* left as it was"):
        model.apply(model.params, model.state, data[0], train=True, key=KEY)
    call = lambda apply, x, *, train: apply(x, noisy=train)
    told = regjax.from_haiku(net, params, state, call=call)
    outputs, _ = told.apply(told.params, told.state, data[0], train=True, key=KEY)
    np.testing.assert_array_equal(outputs, net.apply(params, state, KEY, data[0], True)[0])

    known = regjax.from_haiku(NET, params, state, call=lambda apply, x, *, train: apply(x, False))
    with pytest.raises(ValueError, match="left as it was, though its call is told by train"):
        known.apply(known.params, known.state, data[0], train=True, key=KEY)

    net = hk.transform(dropped)
    model = regjax.from_haiku(net, net.init(KEY, data[0]))
    with pytest.raises(ValueError, match=r"flags noisy.*call=lambda .*module\(inputs, noisy=train"):
        model.apply(model.params, {}, data[0], train=True, key=KEY)


def test_a_call_of_several_inputs_and_a_part_of_the_parameters(data):
    def masked(x, mask, is_training):
        return {"logits": forward(x, is_training, 0) * mask[:, None]}

    net = hk.transform_with_state(masked)
    mask = jnp.ones(10).at[0].set(0)
    params, state = net.init(KEY, data[0], mask, True)
    call = lambda apply, inputs, *, is_training: apply(*inputs, is_training=is_training)
    last = lambda path, leaf: path[0] == "head/~/linear_1"
    loss = lambda outputs, targets: oracles.cross_entropy(outputs["logits"], targets)
    dense = []
    for wrt in (None, last, {name: name == "head/~/linear_1" for name in params}):
        model = regjax.from_haiku(net, params, state, call=call, wrt=wrt)
        bound = regjax.model_loss(model, loss)
        operator = curvature.hessian(bound, model.params, (data[0], mask), data[1])
        dense.append(operator.dense())
        inputs = data[0], mask
        _, new = model.apply(model.params, model.state, inputs, train=True)
        assert jax.tree.structure(new) == jax.tree.structure(model.state)
    assert set(model.params) == {"head/~/linear_1"}

    def own(params, inputs, targets, state):
        return loss(net.apply(params, state, None, *inputs, False)[0], targets)

    expected = oracles.dense_hessian(own, params, (data[0], mask), data[1], state)
    np.testing.assert_allclose(dense[0], expected, atol=2e-5 * np.abs(expected).max())
    # first, norm, head/~/linear_0, head/~/linear_1, in the order of the names.
    names = sorted(params)
    sizes = [sum(leaf.size for leaf in params[name].values()) for name in names]
    start = sum(sizes[: names.index("head/~/linear_1")])
    part = slice(start, start + 15)
    for one in dense[1:]:
        np.testing.assert_allclose(one, expected[part, part], atol=1e-5)


def test_pruned_units_are_removed(data):
    model, *_ = make(data, SURE)
    small = networks.without_a_unit(model, data[0], "first")
    assert small.params["first"]["w"].shape == (5, 3)
    assert small.state["state"]["norm/~/mean_ema"]["average"].shape == (1, 3)


def test_wrong_arguments_are_named(data):
    model, params, state = make(data)
    with pytest.raises(TypeError, match=r"`transformed` must come from .* got function"):
        regjax.from_haiku(forward, params, state)
    with pytest.raises(TypeError, match="`params` must be a mapping, got list"):
        regjax.from_haiku(NET, [jnp.ones(1)])
    stateless = hk.transform(lambda x: x)
    with pytest.raises(TypeError, match=r"must come from haiku\.transform_with_state: it has a st"):
        regjax.from_haiku(stateless, params, state)
    with pytest.raises(ValueError, match="`wrt` must match at least one of the leaves first/"):
        regjax.from_haiku(NET, params, state, wrt=lambda path, leaf: "tail" in path)
    fewer = {name: leaf for name, leaf in params.items() if name != "first"}
    with pytest.raises(ValueError, match=r"`params` must have .* without \['first'\]\['b'\]"):
        model.apply(fewer, model.state, data[0], train=False)


def test_population_statistics_are_those_that_evaluation_reads(data):
    model, params, _ = make(data)
    batches = [data[0], data[0][:4]]
    state = regjax.population_statistics(model, params, batches, key=KEY)
    hidden = [batch @ params["first"]["w"] + params["first"]["b"] for batch in batches]
    mean = (10 * hidden[0].mean(0) + 4 * hidden[1].mean(0)) / 14
    variance = (10 * hidden[0].var(0) + 4 * hidden[1].var(0)) / 14
    x = (hidden[0] - mean) / jnp.sqrt(variance + 1e-5)
    x = jnp.tanh(x * params["norm"]["scale"] + params["norm"]["offset"])
    for name in ("head/~/linear_0", "head/~/linear_1"):
        x = x @ params[name]["w"] + params[name]["b"]
        x = jnp.tanh(x) if name.endswith("0") else x
    outputs, _ = model.apply(params, state, data[0], train=False)
    np.testing.assert_allclose(outputs, x, rtol=1e-4, atol=1e-5)
