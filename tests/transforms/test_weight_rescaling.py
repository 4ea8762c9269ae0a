"""Weight rescaling: norms, and the identities of scale-invariant losses."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import schedules, transforms
from tests.transforms import runs

pytestmark = pytest.mark.usefixtures("default_promotion")


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def regression(dtype=np.float64):
    """Batch norm without epsilon behind a dense layer: invariant to the scale of each column."""
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(20, 5)), dtype)
    y = jnp.asarray(random.normal(size=(20, 1)), dtype)
    params = {
        "dense": jnp.asarray(random.normal(size=(5, 3)), dtype),
        "head": jnp.asarray(random.normal(size=(3, 1)), dtype),
    }

    def loss(p, epsilon=0.0):
        hidden = x @ p["dense"]
        centred = hidden - hidden.mean(0)
        normal = centred / jnp.sqrt(jnp.mean(centred**2, 0) + epsilon)
        return jnp.mean((jnp.tanh(normal) @ p["head"] - y) ** 2)

    return loss, params


MASK = {"dense": True, "head": False}


def norms(kernel):
    return np.sqrt(np.sum(np.asarray(kernel, np.float64) ** 2, axis=tuple(range(kernel.ndim - 1))))


@pytest.mark.parametrize("shape", [(5, 3), (3, 3, 2, 4)])
def test_norm_of_each_filter_after_the_step(shape):
    random = np.random.default_rng(1)
    params = {"k": jnp.asarray(random.normal(size=shape), jnp.float32)}
    updates = {"k": jnp.asarray(random.normal(size=shape), jnp.float32)}
    per_filter = transforms.rescale_weights(mask=None, target_norm=2.0)
    after = optax.apply_updates(
        params, per_filter.update(updates, per_filter.init(params), params)[0]
    )
    np.testing.assert_allclose(norms(after["k"]), 2, rtol=1e-6)
    q = params["k"] + updates["k"]
    np.testing.assert_allclose(after["k"], 2 * q / norms(q), rtol=1e-5, atol=1e-6)
    whole = transforms.rescale_weights(mask=None, per_filter=False)
    after = optax.apply_updates(params, whole.update(updates, whole.init(params), params)[0])
    assert float(jnp.linalg.norm(after["k"])) == pytest.approx(1, rel=1e-6)
    assert not np.allclose(norms(after["k"]), norms(after["k"])[0], rtol=0.1)


def test_the_loss_does_not_change(double):
    loss, params = regression()
    tx = transforms.rescale_weights(mask=MASK)
    zero = jax.tree.map(jnp.zeros_like, params)
    after = optax.apply_updates(params, tx.update(zero, tx.init(params), params)[0])
    assert float(loss(after, 1e-5)) == pytest.approx(float(loss(params, 1e-5)), abs=1e-5)
    assert np.abs(norms(params["dense"]) - 1).max() > 0.1
    # Norms over the input channels instead of the output channels change it.
    wrong = {**params, "dense": params["dense"] / norms(params["dense"].T)[:, None]}
    assert abs(float(loss(wrong) - loss(params))) > 1e-3


def test_unmasked_leaves_and_steps_in_between_pass_through():
    _, params = regression(np.float32)
    updates = jax.tree.map(lambda leaf: 0.1 * leaf + 0.01, params)
    tx = transforms.rescale_weights(mask=MASK, every=3)
    state = tx.init(params)
    for step in (1, 2, 3, 4):
        new, state = tx.update(updates, state, params)
        np.testing.assert_array_equal(new["head"], updates["head"])
        if step == 3:
            np.testing.assert_allclose(norms(params["dense"] + new["dense"]), 1, rtol=1e-6)
        else:
            np.testing.assert_array_equal(new["dense"], updates["dense"])


def test_unit_and_zero_filters():
    kernel = jnp.asarray([[0.6, 0.0, 3.0], [0.8, 0.0, 4.0]])
    params, zero = {"k": kernel}, {"k": jnp.zeros_like(kernel)}
    tx = transforms.rescale_weights(mask=None)
    after = kernel + tx.update(zero, tx.init(params), params)[0]["k"]
    np.testing.assert_allclose(after, [[0.6, 0, 0.6], [0.8, 0, 0.8]], atol=1e-7)


def test_identities_of_a_scale_invariant_loss(double):
    loss, params = regression()
    column = lambda w: {**params, "dense": params["dense"].at[:, 0].set(w)}
    f, w = lambda w: loss(column(w)), params["dense"][:, 0]
    hessian_of = jax.jit(jax.hessian(f))
    g, hessian = jax.grad(f)(w), hessian_of(w)
    assert jnp.linalg.norm(g) > 1e-2
    np.testing.assert_allclose(w @ g, 0, atol=1e-10)
    np.testing.assert_allclose(jax.grad(f)(3 * w), g / 3, atol=1e-10)
    np.testing.assert_allclose(hessian_of(3 * w), hessian / 9, atol=1e-10)
    np.testing.assert_allclose(hessian @ w, -g, atol=1e-10)
    rate = 0.3
    np.testing.assert_allclose(jnp.sum((w - rate * g) ** 2), w @ w + rate**2 * g @ g, atol=1e-10)
    # A rescaled step at unit norm has the direction of a plain step at norm r with rate r^2.
    radius = jnp.linalg.norm(w)
    unit = w / radius
    tx = optax.chain(optax.sgd(rate), transforms.rescale_weights(mask=None, per_filter=False))
    rescaled = unit + tx.update(jax.grad(f)(unit), tx.init(unit), unit)[0]
    plain = w - rate * radius**2 * g
    np.testing.assert_allclose(rescaled, plain / jnp.linalg.norm(plain), atol=1e-10)
    angle = jnp.arccos(unit @ rescaled)
    np.testing.assert_allclose(
        angle, jnp.arctan(rate * jnp.linalg.norm(jax.grad(f)(unit))), atol=1e-8
    )


def test_the_matched_rate_turns_like_a_decayed_run_in_equilibrium(double):
    # A gradient of unit norm at unit weight norm, always across the weights: it turns them.
    turn = jnp.asarray([[0.0, -1.0], [1.0, 0.0]])
    gradient = lambda w: turn @ w / jnp.sum(w**2)
    rate, decay = 0.1, 5e-3

    def decayed(w, _):
        new = (1 - rate * decay) * w - rate * gradient(w)
        return new, jnp.arccos(w @ new / jnp.linalg.norm(w) / jnp.linalg.norm(new))

    end, angles = jax.lax.scan(decayed, jnp.asarray([1.0, 0.0]), length=20_000)
    assert float(jnp.linalg.norm(end)) == pytest.approx((rate / 2 / decay) ** 0.25, rel=0.01)
    assert float(angles[-1]) == pytest.approx(np.sqrt(2 * rate * decay), rel=0.01)
    matched = schedules.matched_learning_rate(
        learning_rate=rate, weight_decay=decay, gradient_norm=1.0
    )
    tx = optax.chain(optax.sgd(matched), transforms.rescale_weights(mask=None, per_filter=False))
    w = jnp.asarray([1.0, 0.0])
    after, _ = runs.scan(tx, w, lambda w, i: gradient(w), 1)
    assert float(jnp.arccos(w @ after)) == pytest.approx(float(angles[-1]), rel=0.02)


def test_velocity_of_rescaled_weights(double):
    # Momentum at 2 w with buffers halved and four times the rate is the same walk, twice as large.
    loss, params = regression()
    f = lambda w: loss({**params, "dense": w})

    def walk(w, velocity, rate):
        for _ in range(5):
            velocity = 0.9 * velocity + jax.grad(f)(w)
            w = w - rate * velocity
        return w

    w, velocity = params["dense"], jax.grad(f)(params["dense"] + 0.1)
    halved = transforms.rescale_velocity(velocity, factor=2.0)
    np.testing.assert_allclose(walk(2 * w, halved, 0.4), 2 * walk(w, velocity, 0.1), atol=1e-10)
    factor = {"a": jnp.asarray([1.0, 2.0, 4.0])}
    tree = transforms.rescale_velocity({"a": jnp.ones((2, 3))}, factor=factor)
    np.testing.assert_array_equal(tree["a"], [[1, 0.5, 0.25]] * 2)


def test_error_texts():
    with pytest.raises(ValueError, match=r"`target_norm` must be positive, got 0"):
        transforms.rescale_weights(mask=None, target_norm=0)
    with pytest.raises(ValueError, match=r"`every` must be at least 1, got 0"):
        transforms.rescale_weights(mask=None, every=0)
    tx = transforms.rescale_weights(mask=None)
    with pytest.raises(ValueError, match=r"leave out leaves without input axes, got \['b'\]"):
        tx.init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update({"b": jnp.ones((3, 3))}, tx.init({"b": jnp.ones((3, 3))}))
    with pytest.raises(ValueError, match="`weight_decay` must be positive, got 0"):
        schedules.matched_learning_rate(learning_rate=0.1, weight_decay=0, gradient_norm=1.0)


@pytest.mark.parametrize("size", [1e-36, 1e-25, 1.0, 1e3])
def test_filters_of_any_size_end_at_the_norm(size):
    params = {"w": size * jnp.asarray([[3.0, 1.0], [4.0, 1.0]])}
    tx = transforms.rescale_weights(mask={"w": True}, target_norm=2.0)
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zero, tx.init(params), params)
    norms = jnp.linalg.norm(params["w"] + updates["w"], axis=0)
    # The sum of the update and large weights has their rounding.
    np.testing.assert_allclose(norms, 2, rtol=max(1e-6, 5e-7 * size))


@pytest.mark.parametrize("size", [1e22, 1e37])
def test_filters_beyond_all_rounding_come_down(size):
    params = {"w": size * jnp.asarray([[3.0, 1.0], [4.0, 1.0]])}
    tx = transforms.rescale_weights(mask={"w": True}, target_norm=2.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -params["w"], rtol=1e-6)
