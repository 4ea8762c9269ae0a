"""Entropy-SGD on quadratics, where walk and local entropy are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import schedules, transforms
from tests.transforms import runs

pytestmark = pytest.mark.usefixtures("default_promotion")
A, B, GAMMA = np.diag([1.0, 3.0]), np.array([0.4, -0.7]), 0.7
POINT = np.array([1.0, -2.0])
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _double():
    with jax.enable_x64(True):
        yield


def grad_fn(x, i):
    return jnp.asarray(A) @ x + B


def quiet(num_steps, **options):
    arguments = {"learning_rate": 0.1, "noise_scale": 0.0, "averaging": 0.25, "momentum": 0.0}
    return transforms.entropy_sgd(
        GAMMA, key=KEY, num_inner_steps=num_steps, **{**arguments, **options}
    )


@pytest.mark.parametrize("averaging", [0.25, 0.75, 1.0])
@pytest.mark.parametrize("num_steps", [1, 3, 12])
def test_noise_free_running_mean(num_steps, averaging):
    stiffness, step = A + GAMMA * np.eye(2), 0.1
    centre = np.linalg.solve(stiffness, GAMMA * POINT - B)
    weights = averaging * (1 - averaging) ** (num_steps - np.arange(num_steps + 1.0))
    weights[0] = (1 - averaging) ** num_steps
    powers = [np.linalg.matrix_power(np.eye(2) - step * stiffness, k) for k in range(num_steps + 1)]
    mean = sum(
        c * (centre + power @ (POINT - centre)) for c, power in zip(weights, powers, strict=True)
    )
    updates = runs.once(quiet(num_steps, averaging=averaging), jnp.asarray(POINT), grad_fn)
    np.testing.assert_allclose(updates, POINT - mean, atol=1e-12)


@pytest.mark.slow
def test_a_long_walk_descends_the_local_entropy():
    updates = runs.once(quiet(4000, learning_rate=0.05), jnp.asarray(POINT), grad_fn)
    centre = np.linalg.solve(A + GAMMA * np.eye(2), GAMMA * POINT - B)
    np.testing.assert_allclose(POINT - updates, centre, atol=1e-6)
    scaled = runs.once(
        quiet(4000, learning_rate=0.05, scale_by_gamma=True), jnp.asarray(POINT), grad_fn
    )
    np.testing.assert_allclose(scaled, GAMMA * (POINT - centre), atol=1e-6)


def test_without_well_average_and_noise_it_is_plain_descent():
    seen = []

    def recorded(x, i):
        seen.append((np.asarray(grad_fn(x, i)), int(i)))
        return grad_fn(x, i)

    tx = transforms.entropy_sgd(
        0.0, key=KEY, num_inner_steps=4, noise_scale=0.0, averaging=1.0, momentum=0.0
    )
    updates = tx.update(POINT, tx.init(POINT), jnp.asarray(POINT), grad_fn=recorded)[0]
    np.testing.assert_allclose(updates, 0.1 * sum(g for g, _ in seen), atol=1e-12)
    assert [i for _, i in seen] == [0, 1, 2, 3]


def test_inner_momentum_is_nesterov():
    tx = transforms.entropy_sgd(0.0, key=KEY, num_inner_steps=5, noise_scale=0.0, averaging=1.0)
    end, _ = runs.scan(optax.sgd(0.1, momentum=0.9, nesterov=True), jnp.asarray(POINT), grad_fn, 5)
    updates = runs.once(tx, jnp.asarray(POINT), grad_fn)
    np.testing.assert_allclose(POINT - updates, end, atol=1e-12)


def test_a_stiff_well_holds():
    stiff = transforms.entropy_sgd(1e6, key=KEY, learning_rate=1e-7, noise_scale=0.0, momentum=0.0)
    assert np.abs(runs.once(stiff, jnp.asarray(POINT), grad_fn)).max() < 1e-5


def test_noise_is_fresh_in_every_inner_step():
    # One key for all steps would sum the same noise: variance num_steps times as large.
    tx = transforms.entropy_sgd(
        0.0,
        key=KEY,
        num_inner_steps=8,
        learning_rate=0.1,
        noise_scale=1.0,
        averaging=1.0,
        momentum=0.0,
    )
    params = jnp.zeros(4000)
    updates = runs.once(tx, params, lambda x, i: jnp.zeros_like(x))
    assert float(updates.std()) == pytest.approx(np.sqrt(8 * 0.1), rel=5 / np.sqrt(2 * 4000))


def test_gamma_follows_its_schedule_once_an_update():
    schedule = schedules.scoping_schedule(0.5, 0.2)
    tx = transforms.entropy_sgd(
        schedule, key=KEY, num_inner_steps=3, noise_scale=0.0, averaging=1.0, momentum=0.0
    )
    state = tx.init(POINT)
    for count in range(3):
        updates, state = tx.update(POINT, state, jnp.asarray(POINT), grad_fn=grad_fn)
        fixed = transforms.entropy_sgd(
            0.5 * 1.2**count,
            key=KEY,
            num_inner_steps=3,
            noise_scale=0.0,
            averaging=1.0,
            momentum=0.0,
        )
        np.testing.assert_allclose(
            updates, runs.once(fixed, jnp.asarray(POINT), grad_fn), rtol=1e-6
        )


def test_compile_time_does_not_grow_with_the_steps():
    def lines(num_steps):
        tx = quiet(num_steps)
        update = jax.jit(lambda x: runs.once(tx, x, grad_fn))
        return len(update.lower(jnp.asarray(POINT)).as_text().splitlines())

    assert lines(5) == lines(300)


def test_error_texts():
    with pytest.raises(ValueError, match=r"`gamma` must be non-negative, got -1"):
        transforms.entropy_sgd(-1, key=KEY)
    with pytest.raises(ValueError, match=r"`averaging` must be at most 1, got 2"):
        transforms.entropy_sgd(0.1, key=KEY, averaging=2)
    with pytest.raises(ValueError, match=r"`num_inner_steps` must be at least 0, got -1"):
        transforms.entropy_sgd(0.1, key=KEY, num_inner_steps=-1)


def test_a_walk_below_the_spacing_of_bfloat16_is_walked():
    # Each step moves by 1e-6 or so; weights of bfloat16 at 0.02 are 1.2e-4 apart.
    random = np.random.default_rng(0)
    w = jnp.asarray(0.02 * (1 + 0.1 * random.normal(size=2000)), jnp.bfloat16)
    grads = jnp.asarray(random.normal(size=2000), jnp.float32)
    options = {"learning_rate": 1e-6, "noise_scale": 0.0, "num_inner_steps": 4}
    tx = transforms.entropy_sgd(0.1, key=jax.random.key(0), **options)
    found = []
    for dtype in (jnp.bfloat16, jnp.float32):
        point = w.astype(dtype)
        incoming = grads.astype(dtype)
        found.append(tx.update(incoming, tx.init(point), point, grad_fn=lambda p, i: grads)[0])
    assert found[0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(found[0], found[1].astype(jnp.bfloat16))
    assert np.mean(np.asarray(found[0] != 0)) > 0.99
