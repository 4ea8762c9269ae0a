"""Dropout's penalties against the enumeration of all masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import regjax
from regjax import curvature, regularizers
from tests import oracles

KEY = jax.random.key(0)
KEEP = 0.7
RATE = 0.3


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def features(params, inputs):
    return jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"][None])


def masked_loss(mask, params, key, inputs, targets):
    """Under a given mask (width,) or (N, width); the key is ignored."""
    mask = jnp.broadcast_to(mask, (inputs.shape[0], mask.shape[-1]))
    outputs = (features(params, inputs) * mask) @ params["second"]["kernel"]
    return oracles.squared_error(outputs + params["second"]["bias"][None], targets)


def dropout_loss(params, key, inputs, targets):
    hidden = (params["second"]["kernel"].shape[0],)
    mask = jax.random.bernoulli(key, KEEP, hidden).astype(inputs.dtype) / KEEP
    return masked_loss(mask, params, None, inputs, targets)


def plain_loss(params, inputs, targets):
    return oracles.squared_error(oracles.model_fn(params, inputs), targets)


def penalized_loss(params, inputs, targets):
    hidden, kernel = features(params, inputs), params["second"]["kernel"]
    penalty = regularizers.dropout_penalty(hidden, kernel, keep_probability=KEEP)
    return plain_loss(params, inputs, targets) + penalty


def all_masks(shape):
    """The 64 masks of six units, with their probabilities."""
    kept = (np.arange(64)[:, None] >> np.arange(6)) & 1
    probabilities = KEEP ** kept.sum(1) * (1 - KEEP) ** (6 - kept.sum(1))
    return jnp.asarray(kept.reshape(64, *shape) / KEEP), jnp.asarray(probabilities)


def small(num_examples=5, width=6):
    return oracles.problem(num_examples, 3, width, 2, np.float64)


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("per_example", [False, True])
def test_mean_over_all_masks_is_the_loss_plus_the_penalty(per_example, double):
    problem = small(2, 3) if per_example else small()
    masks, probabilities = all_masks((2, 3) if per_example else (6,))

    def mean_loss(params, inputs, targets):
        under = lambda mask: masked_loss(mask, params, None, inputs, targets)
        return probabilities @ jax.vmap(under)(masks)

    mean, mean_gradient = jax.jit(jax.value_and_grad(mean_loss))(problem.params, *problem.batch)
    penalized = jax.jit(jax.value_and_grad(penalized_loss))
    value, gradient = penalized(problem.params, *problem.batch)
    assert float(value) == pytest.approx(float(mean), rel=1e-12)
    np.testing.assert_allclose(flat(gradient), flat(mean_gradient), rtol=1e-12, atol=1e-12)
    # A penalty in terms of the drop probability would be this far off.
    assert abs(float(value - plain_loss(problem.params, *problem.batch))) > 0.1


def test_gradient_penalty_over_all_masks_is_mean_and_covariance(double):
    problem = small()
    masks, probabilities = all_masks((6,))

    def expected_penalty(params):
        def one(mask):
            loss = Partial(masked_loss, mask, inputs=problem.inputs, targets=problem.targets)
            return regularizers.dropout_gradient_penalty(
                loss, params, key=KEY, learning_rate=RATE
            ).value

        return probabilities @ jax.vmap(one)(masks)

    def oracle(params):
        gradients = jax.vmap(jax.grad(masked_loss, 1), (0, None, None, None, None))(
            masks, params, KEY, *problem.batch
        )
        rows = jnp.concatenate([g.reshape(64, -1) for g in jax.tree.leaves(gradients)], 1)
        mean = ravel_pytree(jax.grad(penalized_loss)(params, *problem.batch))[0]
        covariance_trace = probabilities @ jnp.sum((rows - mean[None]) ** 2, 1)
        return RATE / 4 * (jnp.sum(mean**2) + covariance_trace)

    value, gradient = jax.jit(jax.value_and_grad(expected_penalty))(problem.params)
    expected, expected_gradient = jax.jit(jax.value_and_grad(oracle))(problem.params)
    assert float(value) == pytest.approx(float(expected), rel=1e-12)
    np.testing.assert_allclose(flat(gradient), flat(expected_gradient), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("num_samples", [1, 5])
def test_gradient_penalty_of_sampled_masks(num_samples, double):
    problem = small()
    inputs, targets = problem.batch
    loss = Partial(dropout_loss, inputs=inputs, targets=targets)
    penalty = functools.partial(
        regularizers.dropout_gradient_penalty, loss, key=KEY, num_samples=num_samples
    )
    found = penalty(problem.params, learning_rate=RATE)
    vector, unravel = ravel_pytree(problem.params)

    @jax.jit
    def gradient_and_product(key):
        gradient_of = jax.grad(lambda v: dropout_loss(unravel(v), key, inputs, targets))
        gradient = gradient_of(vector)
        return gradient, jax.jit(jax.jacrev(gradient_of))(vector) @ gradient

    found_by_key = map(gradient_and_product, jax.random.split(KEY, num_samples))
    gradients, products = zip(*found_by_key, strict=True)
    norms = np.sum(np.asarray(gradients) ** 2, 1)
    assert float(found.value) == pytest.approx(RATE / 4 * norms.mean(), rel=1e-12)
    if num_samples == 1:
        assert np.isnan(found.standard_error)
    else:
        error = RATE / 4 * norms.std(ddof=1) / np.sqrt(num_samples)
        assert float(found.standard_error) == pytest.approx(error, rel=1e-10)
    # Its derivative is rate / 2 times the mean of H g, which stop_gradient would lose.
    derivative = jax.jit(jax.grad(lambda p, rate: penalty(p, learning_rate=rate).value))
    np.testing.assert_allclose(
        flat(derivative(problem.params, RATE)), RATE / 2 * np.mean(products, 0), rtol=1e-10
    )


def test_a_step_of_descent_is_the_flow_of_the_loss_plus_the_penalty(double):
    # On L = alpha w^2 / 2 the step multiplies w by 1 - rate alpha.
    alpha, rate = 1.0, 0.05
    loss = lambda w, key: alpha * w**2 / 2
    modified = lambda w: (
        loss(w, None)
        + regularizers.dropout_gradient_penalty(loss, w, key=KEY, learning_rate=rate).value
    )
    decay = float(jax.grad(modified)(jnp.asarray(1.0)))
    assert decay == pytest.approx(alpha + rate * alpha**2 / 2, rel=1e-12)
    assert np.exp(-rate * decay) == pytest.approx(1 - rate * alpha, abs=1e-4)
    assert np.exp(-rate * alpha) != pytest.approx(1 - rate * alpha, abs=1e-4)


def test_keeping_everything_has_no_penalty(double):
    problem = small()
    hidden, kernel = features(problem.params, problem.inputs), problem.params["second"]["kernel"]
    assert float(regularizers.dropout_penalty(hidden, kernel, keep_probability=1)) == 0
    traced = jax.jit(lambda p: regularizers.dropout_penalty(hidden, kernel, keep_probability=p))
    assert float(traced(1.0)) == 0
    assert float(traced(0.5)) == pytest.approx(
        float(jnp.sum((hidden**2) @ kernel**2)) / (2 * 5), rel=1e-12
    )


class Linen(linen.Module):
    rate: float

    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.relu(linen.Dense(8, name="first")(x))
        x = linen.Dropout(self.rate, deterministic=not train)(x)
        return linen.Dense(2, name="last")(x)


class Nnx(nnx.Module):
    def __init__(self, rate):
        rngs = nnx.Rngs(0)
        self.first, self.last = nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.first(x))))


def adapted(kind, rate):
    if kind == "nnx":
        return regjax.from_nnx(Nnx(rate))
    module = Linen(rate)
    return regjax.from_linen(module, module.init(KEY, jnp.zeros((1, 3))))


@pytest.mark.usefixtures("default_promotion")
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_flax_dropout_of_rate_one_minus_keep_has_the_penalty_on_average(kind):
    problem = oracles.problem(5, 3, num_classes=2)
    for rate in (0.0, 1 - KEEP):
        model = adapted(kind, rate)
        params = model.params

        def loss(key, model=model):
            outputs, _ = model.apply(
                model.params, model.state, problem.inputs, train=key is not None, key=key
            )
            return oracles.squared_error(outputs, problem.targets)

        hidden = jax.nn.relu(problem.inputs @ params["first"]["kernel"] + params["first"]["bias"])
        penalty = regularizers.dropout_penalty(
            hidden, params["last"]["kernel"], keep_probability=1 - rate
        )
        if rate == 0:
            assert float(penalty) == 0
            assert float(loss(KEY)) == float(loss(None))
            continue
        losses = np.asarray(jax.jit(jax.vmap(loss))(jax.random.split(KEY, 2000)))
        error = losses.std(ddof=1) / np.sqrt(2000)
        assert losses.mean() == pytest.approx(float(loss(None) + penalty), abs=5 * error)
        assert float(penalty) > 10 * error


def test_two_units_of_a_given_sum_share_it_evenly(double):
    target = jnp.asarray(np.random.default_rng(0).normal(size=7))
    outputs = lambda first: jnp.stack([first, target - first], 1)
    penalty = lambda first: regularizers.dropout_penalty(
        outputs(first), jnp.ones((2, 1)), keep_probability=0.5
    )
    # A quadratic function with the Hessian 2 (1 - p) / (n p) I: Newton's step is exact.
    first = -jax.jit(jax.grad(penalty))(jnp.zeros(7)) / (2 / 7)
    np.testing.assert_allclose(first, target / 2, atol=1e-12)


def relu_network(params, inputs):
    return jax.nn.relu(inputs @ params["in"]) @ params["out"]


def squared_norms(params, inputs):
    """The mean over the inputs of ||d f / d params||^2."""
    jacobian = jax.jit(jax.jacrev(relu_network))(params, inputs)
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(jacobian)) / inputs.shape[0]


@jax.jit
def at_zero_loss(params, inputs):
    """tr H, the mean of ||d f / d params||^2, and how fast that changes down the penalty."""
    fit = relu_network(params, inputs)
    loss = lambda p, x, y: jnp.mean((relu_network(p, x) - y) ** 2) / 2
    penalty = lambda p: regularizers.dropout_penalty(
        jax.nn.relu(inputs @ p["in"]), p["out"], keep_probability=0.5
    )
    downhill = jax.tree.map(jnp.negative, jax.grad(penalty)(params))
    flatness, change = jax.jvp(lambda p: squared_norms(p, inputs), (params,), (downhill,))
    return jnp.trace(curvature.hessian(loss, params, inputs, fit).dense()), flatness, change


def test_at_zero_loss_the_penalty_flattens(double):
    for seed in range(3):
        random = np.random.default_rng(seed)
        params = {"in": random.normal(size=(3, 8)), "out": random.normal(size=(8, 1))}
        trace, flatness, change = at_zero_loss(params, random.normal(size=(6, 3)))
        assert float(trace) == pytest.approx(float(flatness), rel=1e-10)
        assert float(change) < -1


def test_error_texts():
    hidden, kernel = jnp.ones((4, 3)), jnp.ones((3, 2))
    with pytest.raises(ValueError, match=r"shapes \(n, m\) and \(m, k\), got \(4, 3\) and \(2,\)"):
        regularizers.dropout_penalty(hidden, jnp.ones(2), keep_probability=0.5)
    with pytest.raises(ValueError, match="`keep_probability` must be positive, got 0"):
        regularizers.dropout_penalty(hidden, kernel, keep_probability=0.0)
    with pytest.raises(ValueError, match=r"`keep_probability` must be between 0 and 1, got 1.5"):
        regularizers.dropout_penalty(hidden, kernel, keep_probability=1.5)
    penalty = functools.partial(regularizers.dropout_gradient_penalty, lambda w, key: jnp.sum(w))
    with pytest.raises(ValueError, match="`num_samples` must be at least 1, got 0"):
        penalty(kernel, key=KEY, learning_rate=0.1, num_samples=0)
    with pytest.raises(ValueError, match="`learning_rate` must be non-negative, got -1"):
        penalty(kernel, key=KEY, learning_rate=-1)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        penalty(kernel, key=0, learning_rate=0.1)
    with pytest.raises(
        ValueError, match=r"must return a scalar, the mean loss, got shape \(3, 2\)"
    ):
        regularizers.dropout_gradient_penalty(lambda w, key: w, kernel, key=KEY, learning_rate=0.1)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1.0, 1e25])
def test_small_features_and_large_weights_make_a_usual_penalty(size):
    random = np.random.default_rng(0)
    features, kernel = random.normal(size=(6, 4)), random.normal(size=(4, 3))
    expected = 0.25 / (2 * 6 * 0.75) * np.sum(np.sum(kernel**2, 1) * np.sum(features**2, 0))
    penalty = lambda f, w: regularizers.dropout_penalty(f, w, keep_probability=0.75)
    f, w = jnp.asarray(features * size, jnp.float32), jnp.asarray(kernel / size, jnp.float32)
    np.testing.assert_allclose(penalty(f, w), expected, rtol=1e-5)
    slope = np.asarray(jax.grad(penalty)(f, w), float) * size
    np.testing.assert_allclose(
        slope, 0.25 / (6 * 0.75) * features * np.sum(kernel**2, 1), rtol=1e-5
    )
    # Zero features have no slope, but curvature.
    zero = jnp.zeros((1, 1)), jnp.ones((1, 1))
    curvature = jax.hessian(lambda f: penalty(f, zero[1]))(zero[0])
    np.testing.assert_allclose(curvature.ravel(), [0.25 / 0.75], rtol=1e-6)
