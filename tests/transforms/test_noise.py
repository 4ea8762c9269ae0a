"""Noise before the gradient against the expected losses that it descends, in closed form."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import _jaxprs, transforms
from tests.transforms import runs

pytestmark = pytest.mark.usefixtures("default_promotion")
SIGMA = 0.3


def mean_gradient(loss, params, layerwise, num=40_000, **options):
    """Mean and standard error of <g, params> over noises, g what the transformation hands on.

    For the losses below, which are polynomials, this determines the expected loss's slope along
    the parameters.
    """
    tx = transforms.perturbed_gradient(
        SIGMA, key=jax.random.key(0), layerwise=layerwise, cyclic=False, **options
    )

    def once(key):
        state = tx.init(params)._replace(key_data=jax.random.key_data(key))
        grads = tx.update(params, state, params, grad_fn=lambda p, i: jax.grad(loss)(p))[0]
        return optax.tree.vdot(grads, params)

    values = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(1), num))
    return float(values.mean()), float(values.std() / np.sqrt(num))


def slope(expected_loss, params):
    return float(optax.tree.vdot(jax.grad(expected_loss)(params), params))


def diagonal_network():
    random = np.random.default_rng(0)
    x = np.linalg.qr(random.normal(size=(12, 4)))[0] * np.sqrt(12)  # X'X / n = I
    y = random.normal(size=12)
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
    loss = lambda p: jnp.mean((y - x @ (p["u"] ** 2 - p["v"] ** 2)) ** 2) / 2
    params = {name: jnp.asarray(random.normal(size=4), jnp.float32) for name in ("u", "v")}
    return loss, params, x, y


def test_diagonal_network_descends_its_closed_form():
    loss, params, _, _ = diagonal_network()

    # All groups at once: each of the two gets sigma / sqrt(2).
    s2 = SIGMA**2 / 2
    square = lambda p: jnp.sum(p["u"] ** 2) + jnp.sum(p["v"] ** 2)
    expected = slope(lambda p: loss(p) + 2 * s2 * square(p) + 2 * s2**2 * 4, params)
    mean, error = mean_gradient(loss, params, layerwise=False)
    assert abs(mean - expected) < 5 * error
    assert error < 0.02 * abs(expected - slope(loss, params))  # so that the penalty is seen
    # The named wrong version: sigma itself on every group.
    wrong = slope(lambda p: loss(p) + 4 * s2 * square(p), params)
    assert abs(mean - wrong) > 20 * error


def test_descent_on_the_expected_loss_is_the_lasso():
    _, _, x, y = diagonal_network()
    sigma = 0.2
    correlation = np.asarray(x.T @ y / 12)
    expected = np.sign(correlation) * np.maximum(np.abs(correlation) - 2 * sigma**2, 0)
    assert 0 < np.sum(expected == 0) < 4

    def expected_loss(p):
        square = jnp.sum(p["u"] ** 2) + jnp.sum(p["v"] ** 2)
        return jnp.mean((y - x @ (p["u"] ** 2 - p["v"] ** 2)) ** 2) / 2 + 2 * sigma**2 * square

    params = {name: jnp.full(4, 0.5) for name in ("u", "v")}
    end = runs.scan(optax.sgd(0.05), params, lambda p, i: jax.grad(expected_loss)(p), 20_000)[0]
    np.testing.assert_allclose(end["u"] ** 2 - end["v"] ** 2, expected, atol=1e-4)


def linear_network(depth, seed=0):
    random = np.random.default_rng(seed)
    sizes = [*[3, 5, 4, 2][:depth], 2]
    params = {
        f"layer{i}": jnp.asarray(random.normal(size=(m, n)) / 2, jnp.float32)
        for i, (n, m) in enumerate(itertools.pairwise(sizes))
    }
    x, y = (jnp.asarray(random.normal(size=n), jnp.float32) for n in (3, 2))

    def loss(p):
        out = functools.reduce(lambda h, name: p[name] @ h, sorted(p), x)
        return jnp.sum((y - out) ** 2)

    def expected(p, sigmas):
        """|y|^2 - 2 y'W..W x + tr A, with A = W A W' + sigma^2 tr(A) I layer by layer."""
        moments, out = jnp.outer(x, x), x
        for name, sigma in zip(sorted(p), sigmas, strict=True):
            spread = sigma**2 * jnp.trace(moments) * jnp.eye(p[name].shape[0])
            moments, out = p[name] @ moments @ p[name].T + spread, p[name] @ out
        return jnp.sum(y**2) - 2 * y @ out + jnp.trace(moments)

    return loss, expected, params


@pytest.mark.parametrize("depth", [2, 3])
def test_linear_networks_descend_their_closed_form(depth):
    loss, expected_loss, params = linear_network(depth)
    everywhere = [SIGMA / np.sqrt(depth)] * depth
    mean, error = mean_gradient(loss, params, layerwise=False)
    assert abs(mean - slope(lambda p: expected_loss(p, everywhere), params)) < 5 * error
    # One layer at a time has no product of two noises.
    each = [[SIGMA if i == j else 0.0 for i in range(depth)] for j in range(depth)]
    average = lambda p: sum(expected_loss(p, sigmas) for sigmas in each) / depth
    mean, error = mean_gradient(loss, params, layerwise=True)
    assert abs(mean - slope(average, params)) < 5 * error


def perturbations(tx, params, num_steps):
    """What was added to the parameters in each step."""
    seen, state = [], tx.init(params)

    def grad_fn(p, i):
        seen.append(jax.tree.map(jnp.subtract, p, params))
        return p

    for _ in range(num_steps):
        _, state = tx.update(params, state, params, grad_fn=grad_fn)
    return seen


def test_layers_take_turns_and_the_others_stay():
    params = {"a": jnp.zeros(500), "b": jnp.zeros(500), "c": jnp.zeros(500), "d": jnp.zeros(3)}
    groups = {"a": 7, "b": 2, "c": 7, "d": 0}
    tx = transforms.perturbed_gradient(
        SIGMA,
        key=jax.random.key(0),
        groups=groups,
        mask={"a": True, "b": True, "c": True, "d": False},
    )
    for step, noise in enumerate(perturbations(tx, params, 4)):
        names = ("b",) if step % 2 == 0 else ("a", "c")
        for name in params:
            if name in names:  # five standard errors of a standard deviation
                assert float(noise[name].std()) == pytest.approx(SIGMA, rel=5 / np.sqrt(2 * 500))
            else:
                np.testing.assert_array_equal(noise[name], 0)


def test_one_group_is_noise_everywhere():
    params = {"a": jnp.zeros(5), "b": jnp.zeros(3)}
    one = {"a": 0, "b": 0}
    layerwise, everywhere = (
        perturbations(
            transforms.perturbed_gradient(
                SIGMA, key=jax.random.key(0), groups=one, layerwise=layerwise
            ),
            params,
            2,
        )
        for layerwise in (True, False)
    )
    jax.tree.map(np.testing.assert_array_equal, layerwise, everywhere)


def test_only_the_noise_of_the_group_is_drawn():
    params = {"a": jnp.zeros(5), "b": jnp.zeros((3, 2))}
    tx = transforms.perturbed_gradient(SIGMA, key=jax.random.key(0))
    step = lambda state: tx.update(params, state, params, grad_fn=lambda p, i: p)[0]
    traced = jax.make_jaxpr(step)(tx.init(params)).jaxpr
    (branches,) = (e.params["branches"] for e in traced.eqns if e.primitive.name == "cond")
    drawn = [[e for e in _jaxprs.equations(b.jaxpr) if "erf_inv" in str(e)] for b in branches]
    assert len(drawn) == 2
    assert all(drawn)
    outside = [e for e in traced.eqns if e.primitive.name != "cond"]
    assert not any("erf_inv" in str(equation) for equation in outside)


def test_random_groups_are_uniform():
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1), "c": jnp.zeros(1)}
    tx = transforms.perturbed_gradient(SIGMA, key=jax.random.key(0), cyclic=False)
    step = jax.jit(lambda state: tx.update(params, state, params, grad_fn=lambda p, i: p))
    state, counts = tx.init(params), np.zeros(3)
    for _ in range(300):
        noisy, state = step(state)
        counts += [float(noisy[name][0]) != 0 for name in sorted(params)]
    assert counts.sum() == 300
    np.testing.assert_allclose(counts, 100, atol=5 * np.sqrt(300 * 2 / 9))


def test_anticorrelated_noise_is_noise_before_the_gradient_shifted():
    with jax.enable_x64(True):
        params = jnp.asarray(np.random.default_rng(0).normal(size=4))
        matrix = jnp.asarray(np.diag([3.0, 1.0, 0.5, 0.1]))
        grad_fn = lambda w, i: matrix @ w + jnp.sin(w)
        tx = optax.chain(
            optax.sgd(0.1, momentum=0.9),
            transforms.anticorrelated_noise(0.05, key=jax.random.key(0)),
        )
        plain = optax.sgd(0.1, momentum=0.9)
        state, clean_state, clean = tx.init(params), plain.init(params), params
        for _ in range(100):
            updates, state = tx.update(grad_fn(params, 0), state, params)
            # The wrong version would take the gradient at the clean weights.
            clean_updates, clean_state = plain.update(grad_fn(params, 0), clean_state)
            params, clean = params + updates, clean + clean_updates
            np.testing.assert_allclose(
                transforms.denoise_params(params, state[1]), clean, atol=1e-12
            )
        assert float(jnp.abs(params - clean).max()) > 0.01


def test_noise_carried_has_the_scale_and_only_where_masked():
    params = {"a": jnp.zeros(2000), "b": jnp.zeros(4)}
    tx = transforms.anticorrelated_noise(
        lambda count: 0.1 * (1 + count), key=jax.random.key(0), mask={"a": True, "b": False}
    )
    state, zero = tx.init(params), params
    for step in (1, 2):
        updates, state = tx.update(zero, state)
        params = optax.apply_updates(params, updates)
        assert float(params["a"].std()) == pytest.approx(0.1 * step, rel=5 / np.sqrt(2 * 2000))
        np.testing.assert_array_equal(params["b"], 0)
    assert len(jax.tree.leaves(state.noise)) == 1  # no copy of what carries none


def test_widening_valley():
    u0, v0 = jnp.full(20, 0.5), jnp.float32(0.5)
    params = {"u": u0, "v": v0}
    grad_fn = lambda p, i: jax.grad(lambda p: 0.5 * p["v"] ** 2 * jnp.sum(p["u"] ** 2))(p)

    def width(tx, key):
        state = tx.init(params)
        state = (state[0], state[1]._replace(key_data=jax.random.key_data(key)))
        end, state = runs.scan(tx, params, grad_fn, 20_000, state)
        clean = transforms.denoise_params(end, state[1])
        return jnp.linalg.norm(clean["u"]) / jnp.linalg.norm(u0)

    tx = optax.chain(optax.sgd(0.01), transforms.anticorrelated_noise(0.05, key=jax.random.key(0)))
    ours = jax.jit(jax.vmap(lambda key: width(tx, key)))(jax.random.split(jax.random.key(1), 10))
    plain = runs.scan(optax.sgd(0.01), params, grad_fn, 20_000)[0]
    descent = float(jnp.linalg.norm(plain["u"]) / jnp.linalg.norm(u0))
    assert descent == pytest.approx(0.974, abs=0.002)
    assert np.all(ours < 0.8 * descent)
    assert float(ours.mean()) == pytest.approx(0.587, abs=0.05)


def test_error_texts():
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"`std` must be non-negative, got -1"):
        transforms.perturbed_gradient(-1, key=key)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        transforms.anticorrelated_noise(0.1, key=jax.random.PRNGKey(0))
    tx = transforms.perturbed_gradient(0.1, key=key, groups={"a": 0.5})
    with pytest.raises(TypeError, match=r"`groups` must be a Python integer, got 0.5"):
        tx.init({"a": jnp.ones(2)})
    tx = transforms.perturbed_gradient(0.1, key=key, groups={"b": 0})
    with pytest.raises(ValueError, match="`groups` must have the tree structure"):
        tx.init({"a": jnp.ones(2)})
