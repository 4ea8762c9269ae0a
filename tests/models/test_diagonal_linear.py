"""Descent of diagonal linear networks against the closed forms of their gradient flow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import regjax
from regjax import models, transforms

RANDOM = np.random.default_rng(0)
X = RANDOM.choice([-1.0, 1.0], size=(40, 60))
Y = X[:, :3] @ [1.0, -0.7, 1.0] + 0.1 * RANDOM.normal(size=40)


def alpha_of(depth):
    """Equal alpha^N, at which depths are comparable."""
    return 0.01 ** (1 / depth)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def descend(depth, num_steps, rate, x, y, momentum=0.0):
    """u, v and the integrated residual after so many steps."""

    def loss(pair):
        return jnp.mean((x @ models.diagonal_weights(*pair, depth=depth) - y) ** 2)

    def step(carry, _):
        pair, velocity, integral = carry
        weights = models.diagonal_weights(*pair, depth=depth)
        residual = 2 / len(y) * x.T @ (x @ weights - y)
        velocity = jax.tree.map(lambda m, g: momentum * m + g, velocity, jax.grad(loss)(pair))
        pair = jax.tree.map(lambda p, m: p - rate * m, pair, velocity)
        return (pair, velocity, integral + rate * residual), None

    start = (jnp.full(x.shape[1], alpha_of(depth), x.dtype),) * 2
    carry = (start, jax.tree.map(jnp.zeros_like, start), jnp.zeros(x.shape[1], x.dtype))
    (pair, _, integral), _ = jax.lax.scan(step, carry, None, length=num_steps)
    return *pair, integral


def violation(depth, rate, momentum=0.0):
    u, v, _ = descend(depth, round(0.5 / rate), rate, jnp.asarray(X), jnp.asarray(Y), momentum)
    start = jnp.asarray([alpha_of(depth)])
    exact = models.conserved_quantity(start, start, depth=depth)
    return float(jnp.max(jnp.abs(models.conserved_quantity(u, v, depth=depth) / exact - 1)))


def test_the_sign_is_that_of_u():
    u, v = jnp.asarray([2.0, 1.0]), jnp.asarray([1.0, 3.0])
    np.testing.assert_array_equal(models.diagonal_weights(u, v, depth=2), [3, -8])
    np.testing.assert_array_equal(models.diagonal_weights(u, None, depth=3), [8, 1])


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_descent_keeps_what_the_flow_keeps_up_to_its_rate(depth, double):
    coarse, fine = violation(depth, 1e-3), violation(depth, 5e-4)
    assert coarse < 0.02
    assert coarse / fine == pytest.approx(2, abs=0.1)


def test_momentum_does_not(double):
    assert violation(2, 1e-3, momentum=0.9) > 0.01


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_weights_follow_from_the_integrated_residual(depth, double):
    u, v, integral = descend(depth, 5000, 1e-4, jnp.asarray(X), jnp.asarray(Y))
    weights = models.diagonal_weights(u, v, depth=depth)
    assert float(jnp.max(jnp.abs(weights))) > 0.05  # it has gone somewhere
    flow = functools.partial(models.diagonal_flow, depth=depth, init_scale=alpha_of(depth))
    np.testing.assert_allclose(flow(integral), weights, rtol=1e-2, atol=1e-5)
    # From the start on, and not beyond what a flow reaches.
    np.testing.assert_array_equal(flow(jnp.zeros(2)), 0)
    far = models.diagonal_flow(jnp.asarray([1.0, 0.1]), depth=4, init_scale=0.5)
    np.testing.assert_array_equal(np.isnan(far), [True, False])


def window_of(alpha, depth, rate, signal, noise):
    return models.early_stopping_window(
        depth=depth, init_scale=alpha, learning_rate=rate, smallest_signal=signal, noise_level=noise
    )


# Time to half of a signal of 1 by quadrature of the flow's equation; orthonormal features.
@pytest.mark.parametrize(
    ("depth", "alpha", "half"), [(2, 0.01, 1.15128), (3, 0.05, 3.19142), (4, 0.1, 6.2161)]
)
def test_the_signal_comes_when_the_flow_says(depth, alpha, half, double):
    rate = 1e-4

    def step(u, _):
        # L = (u^N - 1)^2: the branch of v stays at its start, and is left out.
        return u - rate * 2 * depth * (u**depth - 1) * u ** (depth - 1), u**depth

    _, weights = jax.lax.scan(step, jnp.asarray(alpha), None, length=round(1.2 * half / rate))
    assert rate * int(np.argmax(weights >= 0.5)) == pytest.approx(half, rel=5e-4)
    window = window_of(alpha, depth, rate, 1.0, 0.01)
    assert float(rate * window.first) == pytest.approx(half, rel=0.2)  # to leading order
    if depth == 2:
        times = rate * np.arange(len(weights))
        logistic = 1 / (1 + (1 / alpha**2 - 1) * np.exp(-8 * times))
        np.testing.assert_allclose(weights, logistic, rtol=2e-3)


def test_the_window_is_that_of_the_formulas_and_grows_with_depth(double):
    window = window_of(0.01, 2, 0.1, 0.5, 0.05)
    np.testing.assert_allclose(window.first, np.log(0.5 / 0.01) / (4 * 0.5 * 0.1), rtol=1e-12)
    np.testing.assert_allclose(window.last, np.log(10) / (4 * 0.05 * 0.1), rtol=1e-12)
    window = window_of(0.1, 4, 0.1, 0.5, 0.05)
    np.testing.assert_allclose(window.first, (100 - 0.25**-0.5) / (16 * 0.5 * 0.1), rtol=1e-12)
    np.testing.assert_allclose(window.last, (100 - 10) / (16 * 0.05 * 0.1), rtol=1e-12)
    lengths = [window_of(1e-5 ** (1 / depth), depth, 0.01, 1.0, 0.14) for depth in (2, 3, 4)]
    assert np.all(np.diff([float(w.last - w.first) for w in lengths]) > 0)
    assert float(window_of(0.9, 3, 0.1, 0.5, 0.05).first) == 0


@pytest.mark.parametrize("signed", [True, False])
def test_the_module_and_its_neutral_wrappers(signed, default_promotion):
    module = models.DiagonalLinear(60, depth=3, init_scale=0.5, signed=signed)
    model = regjax.from_nnx(module)
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)
    expected = 0 if signed else 0.5**3 * np.sum(X, 1)
    np.testing.assert_allclose(module(x), expected, rtol=1e-5, atol=1e-6)
    assert set(model.params) == ({"u", "v"} if signed else {"u"})
    loss = regjax.model_loss(model, lambda outputs, targets: jnp.mean((outputs - targets) ** 2))
    grad_fn = lambda params, i: jax.grad(loss)(params, x, y)
    ends = []
    for tx in (None, transforms.sam(0.0), transforms.sam(0.1)):
        chain = optax.chain(*([] if tx is None else [tx]), optax.sgd(0.01))
        params, state = model.params, chain.init(model.params)
        for _ in range(3):
            updates, state = chain.update(grad_fn(params, 0), state, params, grad_fn=grad_fn)
            params = optax.apply_updates(params, updates)
        ends.append(params)
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])
    assert not np.array_equal(ends[0]["u"], ends[2]["u"])


@pytest.mark.parametrize("signed", [True, False])
def test_linen_gives_the_same(signed):
    x = jnp.asarray(X[:, :5], jnp.float32)
    options = {"depth": 4, "init_scale": 0.3, "signed": signed}
    module, other = models.linen.DiagonalLinear(**options), models.DiagonalLinear(5, **options)
    adapted = regjax.from_linen(module, module.init(jax.random.key(0), x)), regjax.from_nnx(other)
    jax.tree.map(np.testing.assert_array_equal, *(model.params for model in adapted))
    moved = jax.tree.map(lambda leaf: leaf * jnp.arange(5.0), adapted[0].params)
    one, two = (regjax.model_function(model)(moved, x) for model in adapted)
    np.testing.assert_array_equal(one, two)
    with pytest.raises(ValueError, match="`depth` must be at least 2, got 1"):
        models.linen.DiagonalLinear(depth=1, init_scale=0.1).init(jax.random.key(0), x)


def test_bad_input():
    with pytest.raises(ValueError, match="`depth` must be at least 2, got 1"):
        models.DiagonalLinear(3, depth=1, init_scale=0.1)
    with pytest.raises(ValueError, match="`init_scale` must be positive, got 0"):
        models.DiagonalLinear(3, depth=2, init_scale=0.0)
    with pytest.raises(ValueError, match="`init_scale` must be below 1, got 2"):
        window_of(2.0, 3, 0.1, 1.0, 0.1)
    with pytest.raises(ValueError, match="`noise_level` must be positive, got 0"):
        window_of(0.1, 3, 0.1, 1.0, 0.0)
    with pytest.raises(TypeError, match="`depth` must be a Python integer"):
        models.conserved_quantity(jnp.ones(2), jnp.ones(2), depth=2.5)
    assert isinstance(models.DiagonalLinear(3, depth=2, init_scale=0.1), nnx.Module)
