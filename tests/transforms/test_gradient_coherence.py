"""Gated penalties on the scalar deep linear chain, whose end points are known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import transforms
from tests.transforms import runs

pytestmark = pytest.mark.usefixtures("default_promotion")
L1, L2 = transforms.l1_gradient, transforms.l2_gradient


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def tolerance(depth):
    """Largest strength with a root of (1 - u^D) u^(D - 2) = strength besides zero."""
    q = (depth - 2) / (2 * depth - 2)
    return (1 - q) * q ** ((depth - 2) / depth)


def chain_end(gate, depth, strength, start, rate=0.01, num_steps=60_000):
    """Weight after training 0.5 (1 - u^D)^2 with equal weights u, and the share of on-steps."""
    grad_fn = lambda w, i: jax.grad(lambda w: 0.5 * (1 - jnp.prod(w)) ** 2)(w)
    tx = optax.chain(transforms.coherent_regularization(strength, gate=gate), optax.sgd(rate))
    end, state = runs.scan(tx, jnp.full(depth, start), grad_fn, num_steps)
    return float(end[0]), float(state[0].num_on) / num_steps


def test_the_tolerance_is_the_maximum_over_the_weight():
    u = np.linspace(0, 1, 200_001)
    for depth, expected in ((3, 0.47247), (4, 0.38490), (10, 0.29039)):
        assert tolerance(depth) == pytest.approx(expected, abs=1e-5)
        assert np.max((1 - u**depth) * u ** (depth - 2)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("gate", "start", "end"),
    [
        (transforms.always_gate(), 0.9, 0.0),
        (transforms.delayed_gate(5_000), 0.9, 0.76151),
        (transforms.cosine_gate(0.5), 0.9, 0.76151),
        (transforms.always_gate(), 1.1, 0.76151),
    ],
    ids=["always", "delayed", "cosine", "always from above"],
)
def test_chain_below_the_tolerance(double, gate, start, end):
    strength = 0.9 * tolerance(3)
    reached, share = chain_end(gate, 3, strength, start * 0.47698)
    assert reached == pytest.approx(end, abs=1e-12 if end == 0 else 1e-3)
    assert share > 0.9


def test_deeper_chain_under_the_cosine_gate(double):
    end, _ = chain_end(transforms.cosine_gate(0.5), 4, 0.9 * tolerance(4), 0.9 * 0.64889)
    assert end == pytest.approx(0.84889, abs=1e-3)


def test_chain_above_the_tolerance(double):
    strength = 1.01 * tolerance(3)
    assert chain_end(transforms.delayed_gate(5_000), 3, strength, 0.43)[0] == pytest.approx(
        0, abs=1e-12
    )
    end, share = chain_end(transforms.cosine_gate(0.5), 3, strength, 0.43)
    assert end == pytest.approx(1, abs=1e-3)
    assert share == 0


def trees(seed=0):
    random = np.random.default_rng(seed)
    shapes = {"kernel": (4, 3), "bias": (3,)}
    return tuple(
        {name: jnp.asarray(random.normal(size=s), jnp.float32) for name, s in shapes.items()}
        for _ in range(2)
    )


def first_update(tx, grads, params, state=None):
    return tx.update(grads, tx.init(params) if state is None else state, params)[0]


def assert_equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_always_and_delayed_are_decayed_weights():
    grads, params = trees()
    always = transforms.coherent_regularization(0.3, gate=transforms.always_gate())
    assert_equal(
        first_update(always, grads, params),
        first_update(optax.add_decayed_weights(0.3), grads, params),
    )
    delayed = transforms.coherent_regularization(0.3, gate=transforms.delayed_gate(2))
    state = delayed.init(params)
    for step in range(4):
        updates, state = delayed.update(grads, state, params)
        decay = optax.add_decayed_weights(0.3 if step >= 2 else 0.0)
        assert_equal(updates, first_update(decay, grads, params))
        assert bool(state.on) == (step >= 2)
    assert int(state.num_on) == 2


@pytest.mark.parametrize("penalty", [L1, L2])
def test_cosine_gate_is_the_cosine_with_the_total_gradient(penalty):
    grads, params = trees()
    mask = {"kernel": True, "bias": False}
    g, r = np.ravel(grads["kernel"]), 0.8 * np.ravel(penalty(params["kernel"]))
    cosine = g @ (g + r) / np.linalg.norm(g) / np.linalg.norm(g + r)
    for threshold, on in ((cosine - 1e-3, True), (cosine + 1e-3, False)):
        tx = transforms.coherent_regularization(
            0.8,
            gate=transforms.cosine_gate(float(threshold)),
            penalty_gradient=penalty,
            mask=mask,
        )
        updates, state = tx.update(grads, tx.init(params), params)
        assert bool(state.on) == on
        expected = np.asarray(grads["kernel"]) + (
            0.8 * np.asarray(penalty(params["kernel"])) if on else 0
        )
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-6)
        np.testing.assert_array_equal(updates["bias"], grads["bias"])
    ratio = np.linalg.norm(g) / np.linalg.norm(r)
    for threshold, on in ((ratio - 1e-3, True), (ratio + 1e-3, False)):
        gate = transforms.ratio_gate(float(threshold))
        tx = transforms.coherent_regularization(0.8, gate=gate, penalty_gradient=penalty, mask=mask)
        assert bool(tx.update(grads, tx.init(params), params)[1].on) == on


def test_zero_gradient_closes_and_zero_penalty_opens():
    grads, params = trees()
    zero = jax.tree.map(jnp.zeros_like, grads)
    tx = transforms.coherent_regularization(0.8, gate=transforms.cosine_gate(0.5))
    updates, state = tx.update(zero, tx.init(params), params)
    assert not bool(state.on)
    assert_equal(updates, zero)
    updates, state = tx.update(grads, tx.init(zero), zero)
    assert bool(state.on)
    assert_equal(updates, grads)


def test_hold_needs_consecutive_steps():
    grads, params = trees()
    against = jax.tree.map(jnp.negative, params)  # cosine -1 with a strength above 1
    tx = transforms.coherent_regularization(2.0, gate=transforms.cosine_gate(0.5, hold=3))
    state, seen = tx.init(params), []
    # Two on-steps, an off-step, one on-step: no latch; then three, and it stays.
    for gradient in (params, params, against, params, against, params, params, params, against):
        _, state = tx.update(gradient, state, params)
        seen.append(bool(state.on))
    assert seen == [True, True, False, True, False, True, True, True, True]
    del grads


def test_nan_of_a_closed_penalty_does_not_leak():
    grads, params = trees()
    tx = transforms.coherent_regularization(
        0.5, gate=transforms.delayed_gate(5), penalty_gradient=lambda w: w * jnp.nan
    )
    assert_equal(first_update(tx, grads, params), grads)


def test_soft_threshold_reaches_zero_exactly():
    params = {"w": jnp.asarray([0.5, -0.33, 0.1, 2.0], jnp.float32)}
    tx = transforms.soft_threshold(0.125)
    state, zero, reached = tx.init(params), {"w": jnp.zeros(4)}, np.zeros(4, int)
    for step in range(1, 7):
        updates, state = tx.update(zero, state, params)
        params = optax.apply_updates(params, updates)
        reached = np.where((np.asarray(params["w"]) == 0) & (reached == 0), step, reached)
        if step == 1:
            np.testing.assert_allclose(params["w"], [0.375, -0.205, 0, 1.875], atol=1e-6)
    np.testing.assert_array_equal(reached, [4, 3, 1, 0])
    assert float(params["w"][3]) == 1.25
    # The subgradient oscillates instead.
    l1 = optax.chain(
        transforms.coherent_regularization(1.0, gate=transforms.always_gate(), penalty_gradient=L1),
        optax.sgd(0.1),
    )
    end, _ = runs.scan(l1, jnp.asarray([0.5, -0.33]), lambda w, i: jnp.zeros_like(w), 50)
    assert 0 < np.abs(end[1]) <= 0.1


def test_error_texts():
    gate = transforms.always_gate()
    with pytest.raises(ValueError, match=r"`strength` must be non-negative, got -1"):
        transforms.coherent_regularization(-1, gate=gate)
    with pytest.raises(ValueError, match=r"`hold` must be at least 1, got 0"):
        transforms.cosine_gate(hold=0)
    with pytest.raises(ValueError, match=r"`delay` must be at least 0, got -1"):
        transforms.delayed_gate(-1)
    with pytest.raises(ValueError, match=r"`threshold` must be non-negative, got -0.1"):
        transforms.soft_threshold(-0.1)
    tx = transforms.coherent_regularization(0.1, gate=gate)
    with pytest.raises(ValueError, match="`params` must be given"):
        tx.update({"a": jnp.ones(2)}, tx.init({"a": jnp.ones(2)}))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e25])
def test_gates_see_no_size(size):
    grads, added = [size * jnp.asarray([1.0, 0.0])], [size * jnp.asarray([0.0, 1.0])]
    for gate, is_on in (
        (transforms.cosine_gate(0.7), True),  # 1 / sqrt(2)
        (transforms.cosine_gate(0.71), False),
        (transforms.ratio_gate(0.99), True),
        (transforms.ratio_gate(1.01), False),
    ):
        assert bool(gate.decide(grads, added, gate.init(), jnp.int32(0))[0]) == is_on
