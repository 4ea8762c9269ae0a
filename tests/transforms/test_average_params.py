"""Averages of weights: NumPy's means, the wrappers of optax, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
from regjax import transforms
from tests.transforms import modules
from tests.transforms.modules import assert_same


@pytest.fixture(autouse=True)
def _promotion(default_promotion):
    """The chains around ours are optax's, which promote."""


RANDOM = np.random.default_rng(0)
STEPS = RANDOM.normal(size=(7, 3, 2)).astype(np.float32)
START = RANDOM.normal(size=(3, 2)).astype(np.float32)


def path_of(tx, steps=STEPS, start=START, dtype=jnp.float32):
    """The state after some updates, and the weights after each, as optax makes them."""
    params = {"w": jnp.asarray(start, dtype)}
    state, path = tx.init(params), []
    update = jax.jit(tx.update)
    for step in steps:
        updates, state = update({"w": jnp.asarray(step, dtype)}, state, params)
        params = optax.apply_updates(params, updates)
        path.append(np.asarray(params["w"], np.float64))
    return state, np.stack(path)


def rounded_mean(weights):
    """NumPy's mean of a float64 sum, rounded once for the sum and once for the quotient."""
    return np.float32(weights.sum(0)) / np.float32(len(weights))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_means_are_those_of_numpy_bit_for_bit(dtype):
    average = lambda state: np.asarray(transforms.averaged_params(state)["w"])
    state, path = path_of(transforms.average_params(), dtype=dtype)
    np.testing.assert_array_equal(average(state), rounded_mean(path))
    state, path = path_of(transforms.average_params(begin=1, every=2), dtype=dtype)
    np.testing.assert_array_equal(average(state), rounded_mean(path[2::2]))
    state, path = path_of(transforms.average_params(num_latest=3), dtype=dtype)
    np.testing.assert_array_equal(average(state), rounded_mean(path[-3:]))
    state, path = path_of(transforms.average_params(num_latest=3, begin=2, every=2), dtype=dtype)
    np.testing.assert_array_equal(average(state), rounded_mean(path[3::2]))
    decay = 0.75
    state, path = path_of(transforms.average_params(decay=decay), dtype=dtype)
    weights = decay ** np.arange(len(path) - 1.0, -1, -1)
    expected = np.average(path, axis=0, weights=weights)
    np.testing.assert_allclose(average(state), expected, rtol=2e-7)
    state, path = path_of(transforms.average_params(decay=decay, num_latest=4), dtype=dtype)
    expected = np.average(path[-4:], axis=0, weights=weights[-4:])
    np.testing.assert_allclose(average(state), expected, rtol=2e-7)


def test_before_the_first_average_it_is_the_newest_weights():
    for options in ({"begin": 5}, {"begin": 5, "num_latest": 2}, {"every": 9, "decay": 0.5}):
        tx = transforms.average_params(**options)
        np.testing.assert_array_equal(transforms.averaged_params(tx.init({"w": START}))["w"], START)
        state, path = path_of(tx, STEPS[:5])
        np.testing.assert_array_equal(transforms.averaged_params(state)["w"], path[-1])
        assert int(state.num_averaged) == 0
    state, path = path_of(transforms.average_params(begin=5), STEPS[:6])
    np.testing.assert_array_equal(transforms.averaged_params(state)["w"], path[-1])


@pytest.mark.parametrize("decay", [1.0, 0.9999])
def test_weights_that_hardly_move_are_averaged_to_rounding(decay):
    """Over 1e5 steps a plain sum, and a running mean in float32, are off by 1e-3."""
    num_steps, tx = 100_000, transforms.average_params(decay=decay)
    weights = jnp.asarray([1.003, -0.7, 1e-3], jnp.float32)
    drift = jnp.asarray([3e-7, 0, 1e-8], jnp.float32)

    @jax.jit
    def run(state):
        def step(carry, _):
            weights, state = carry
            _, state = tx.update(drift, state, weights)
            return (weights + drift, state), weights + drift

        return jax.lax.scan(step, (weights, state), length=num_steps)

    (_, state), path = run(tx.init(weights))
    age = np.arange(num_steps - 1.0, -1, -1)
    expected = np.average(np.asarray(path, np.float64), axis=0, weights=decay**age)
    np.testing.assert_allclose(transforms.averaged_params(state), expected, rtol=3e-7)


def test_counts_beyond_what_float32_counts():
    tx = transforms.average_params()
    params = jnp.zeros(1)
    state = tx.init(params)
    count = 2**24 + 2**10
    state = state._replace(
        num_updates=jnp.int32(count),
        num_averaged=jnp.int32(count),
        sums=jnp.asarray([float(count)]),
        total=jnp.asarray([float(count), 0.0]),
    )
    for _ in range(5):
        _, state = tx.update(jnp.ones(1), state, params)
    assert np.asarray(state.total, np.float64).sum() == count + 5
    np.testing.assert_array_equal(transforms.averaged_params(state), 1)


def test_the_average_of_a_noisy_quadratic_has_the_variance_of_theory():
    """Descent on w^2 / 2 with noise: w' = (1 - eta) w + eta xi, an autoregression.

    In its stationary state the variance of w is s = eta / (2 - eta), the covariance at a lag of k
    is s (1 - eta)^k, and that of the mean of m follows by summing.
    """
    eta, m, num_runs = 0.2, 40, 20_000
    lags = np.arange(1, m)
    s = eta / (2 - eta)
    expected = s / m * (1 + 2 * np.sum((1 - lags / m) * (1 - eta) ** lags))
    tx = transforms.average_params(begin=60)
    keys = jax.random.split(jax.random.key(0), 60 + m)
    params = jnp.zeros(num_runs)

    def step(carry, key):
        params, state = carry
        updates = eta * (jax.random.normal(key, (num_runs,)) - params)
        updates, state = tx.update(updates, state, params)
        return (params + updates, state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, keys)[0])
    last, state = run((params, tx.init(params)))
    error = 5 * np.sqrt(2 / num_runs)
    np.testing.assert_allclose(np.var(transforms.averaged_params(state)), expected, rtol=error)
    np.testing.assert_allclose(np.var(last), s, rtol=error)
    assert expected < 0.4 * s


def params_and_grads():
    params = {"kernel": jnp.asarray(START), "bias": jnp.asarray(START[0])}
    return params, jax.tree.map(jnp.ones_like, params)


def test_a_step_of_several_micro_batches_counts_once():
    params, grads = params_and_grads()
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.5), transforms.average_params()), 3)
    state = tx.init(params)
    for _ in range(6):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    expected = jax.tree.map(lambda leaf: leaf + 0.25, params)  # the mean of w + 0.5 and w
    assert_same(transforms.averaged_params(state), expected, rtol=1e-6)
    assert int(state.inner_opt_state[1].num_averaged) == 2


def wrapped(average, name):
    """Chains around an average, whose updates are half the gradient."""
    return {
        "masked": optax.chain(
            optax.scale(-0.5), optax.masked(average, {"kernel": True, "bias": False})
        ),
        "partition": optax.chain(
            optax.scale(-0.5),
            optax.partition(
                {"ours": average, "rest": optax.identity()}, {"kernel": "ours", "bias": "rest"}
            ),
        ),
    }[name]


@pytest.mark.parametrize("options", [{}, {"num_latest": 2}])
@pytest.mark.parametrize("name", ["masked", "partition"])
def test_masked_leaves_are_the_weights(name, options):
    params, grads = params_and_grads()
    tx = wrapped(transforms.average_params(**options), name)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(grads, state, params)
        assert_same(updates, jax.tree.map(lambda leaf: -0.5 * leaf, grads))
        params = optax.apply_updates(params, updates)
    average = transforms.averaged_params(state, params)
    assert_same({"b": average["bias"]}, {"b": params["bias"]})
    assert_same({"k": average["kernel"]}, {"k": params["kernel"] + 0.25}, rtol=1e-6)
    with pytest.raises(ValueError, match="`params` must be given, got None"):
        transforms.averaged_params(state)


def test_the_average_is_found_wherever_it_is():
    params, grads = params_and_grads()
    make = functools.partial(transforms.average_params, begin=0)
    hyper = optax.inject_hyperparams(make, static_args=transforms.average_params.static_args)
    chains = (
        optax.chain(optax.adam(0.1), optax.chain(optax.identity(), make())),
        optax.named_chain(("step", optax.adam(0.1)), ("average", make())),
        transforms.skip_nonfinite(optax.chain(optax.adam(0.1), make())),
        optax.chain(optax.adam(0.1), hyper(decay=1.0)),
    )
    for tx in chains:
        updates, state = tx.update(grads, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        assert_same(transforms.averaged_params(state), after, rtol=1e-6)
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chains[0], wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    average = transforms.averaged_params(optimizer.opt_state)
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_same(nnx.to_pure_dict(average), expected, rtol=1e-6)


def test_results_have_the_types_of_the_parameters_where_given():
    state, _ = path_of(transforms.average_params(), dtype=jnp.bfloat16)
    params = {"w": jnp.zeros((3, 2), jnp.bfloat16)}
    assert transforms.averaged_params(state)["w"].dtype == jnp.float32
    assert transforms.averaged_params(state, params)["w"].dtype == jnp.bfloat16
    with jax.enable_x64(True):
        state, path = path_of(transforms.average_params(decay=0.9), dtype=jnp.float64)
        weights = 0.9 ** np.arange(len(path) - 1.0, -1, -1)
        average = transforms.averaged_params(state)["w"]
        np.testing.assert_allclose(average, np.average(path, 0, weights), rtol=1e-14)


@pytest.mark.parametrize("options", [{}, {"num_latest": 2}])
def test_weights_and_state_can_both_be_donated(options):
    tx = transforms.average_params(**options)
    step = jax.jit(lambda params, state: tx.update(params, state, params), donate_argnums=(0, 1))
    for init in (tx.init, jax.jit(tx.init)):
        params = {"w": jnp.asarray(START)}
        step(params, init(params))


def test_running_statistics_of_the_average():
    x, _ = modules.data()
    model = regjax.from_nnx(modules.Net(nnx.Rngs(0)))
    tx = transforms.average_params()
    params, state = model.params, tx.init(model.params)
    for size in (0.0, 0.5):
        updates = jax.tree.map(lambda leaf: size * jnp.ones_like(leaf), params)  # noqa: B023
        updates, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, updates)
    average = transforms.averaged_params(state, params)
    statistics = regjax.population_statistics(model, average, [x], key=jax.random.key(0))
    hidden = x @ average["first"]["kernel"] + average["first"]["bias"]
    np.testing.assert_allclose(statistics["norm"]["mean"], jnp.mean(hidden, 0), rtol=1e-5)


def test_bad_arguments():
    for options, text in (
        ({"decay": 1.5}, "`decay` must be between 0 and 1, got 1.5"),
        ({"decay": jnp.float32(2)}, "`decay` must be between 0 and 1, got 2"),
        ({"num_latest": 0}, "`num_latest` must be at least 1, got 0"),
        ({"begin": -1}, "`begin` must be at least 0, got -1"),
        ({"every": 0}, "`every` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=text):
            transforms.average_params(**options)
    params, _ = params_and_grads()
    average = transforms.average_params()
    for state, count in ((optax.adam(0.1).init(params), 0), ((average.init(params),) * 2, 2)):
        with pytest.raises(ValueError, match=f"`state` must hold the state of one .* got {count}"):
            transforms.averaged_params(state)
    with pytest.raises(ValueError, match="`params` must have the tree structure"):
        transforms.averaged_params(average.init(params), {"w": params["bias"]})
    with pytest.raises(ValueError, match="must have shape"):
        transforms.averaged_params(average.init(params), jax.tree.map(lambda x: x[:1], params))
