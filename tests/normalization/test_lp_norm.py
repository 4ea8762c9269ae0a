import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.normalization import BatchNorm, LpNorm

RANDOM = np.random.default_rng(0)
ORDERS = [1, 2, math.inf]


def normal(*shape, mean=0.0):
    return jnp.asarray(RANDOM.normal(mean, 1, size=shape), jnp.float32)


def apply(layer, x, train=True, state=None, mask=None):
    state = layer.init_state(x.shape[-1]) if state is None else state
    return layer.apply(layer.init_params(x.shape[-1]), state, x, train=train, mask=mask)


@pytest.mark.parametrize("order", ORDERS)
def test_formula(order):
    x = normal(7, 5, 3, mean=2)
    flat = np.asarray(x, np.float64).reshape(-1, 3)
    norm = {
        1: np.abs(flat).mean(0),
        2: np.sqrt((flat**2).mean(0)),
        math.inf: np.abs(flat).max(0),
    }[order]
    y, state = apply(LpNorm(order=order, momentum=0.0), x)
    np.testing.assert_allclose(y, (np.asarray(x) - flat.mean(0)) / (norm + 1e-5), atol=1e-5)
    np.testing.assert_allclose(state["norm"], norm, rtol=1e-5)
    evaluated, _ = apply(LpNorm(order=order), x, train=False, state=state)
    np.testing.assert_allclose(evaluated, y, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_invariance_to_a_positive_factor(order):
    x = normal(9, 3, mean=1)
    np.testing.assert_allclose(
        *(apply(LpNorm(order=order), c * x)[0] for c in (1.0, 40.0)), atol=1e-4
    )


def test_second_order_of_centred_data_is_batch_norm():
    x = normal(9, 3)
    x = x - x.mean(0, keepdims=True)
    ours = apply(LpNorm(order=2, epsilon=0.0), x)[0]
    np.testing.assert_allclose(ours, apply(BatchNorm(epsilon=0.0), x)[0], atol=1e-5)
    far = x + 3
    ours = apply(LpNorm(order=2, epsilon=0.0), far)[0]
    assert jnp.abs(ours - apply(BatchNorm(epsilon=0.0), far)[0]).max() > 0.1


@pytest.mark.parametrize("order", ORDERS)
def test_zeros_are_finite(order):
    forward = lambda x: jnp.sum(apply(LpNorm(order=order), x)[0] ** 2)
    value, slope = jax.value_and_grad(forward)(jnp.zeros((4, 2)))
    assert value == 0
    assert jnp.all(jnp.isfinite(slope))


@pytest.mark.parametrize("order", ORDERS)
def test_a_mapped_axis_gives_the_statistics_of_the_whole_batch(order):
    x = normal(4, 6, 3) + jnp.arange(4.0).reshape(4, 1, 1)
    layer = LpNorm(order=order, axis_name="d")
    whole, state = apply(LpNorm(order=order), x.reshape(24, 3))
    parted, ticked = jax.vmap(lambda x: apply(layer, x), axis_name="d")(x)
    np.testing.assert_allclose(parted.reshape(24, 3), whole, atol=1e-5)
    np.testing.assert_allclose(ticked["norm"][3], state["norm"], rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_devices_count_by_what_their_masks_leave(order):
    x = normal(4, 6, 3) + jnp.arange(4.0).reshape(4, 1, 1)
    mask = jnp.arange(6)[None] < jnp.array([1, 6, 0, 2])[:, None]
    run = lambda layer, x, mask: apply(layer, x, mask=mask)[1]["norm"]
    layer = LpNorm(order=order, axis_name="d")
    found = jax.vmap(functools.partial(run, layer), axis_name="d")(x, mask[..., None])
    counted = x.reshape(24, 3)[np.flatnonzero(mask)]
    expected = apply(LpNorm(order=order), counted)[1]["norm"]
    np.testing.assert_allclose(found, jnp.broadcast_to(expected, (4, 3)), rtol=1e-5)


def test_error_texts():
    with pytest.raises(ValueError, match="`order` must be 1, 2 or inf, got 3"):
        LpNorm(order=3)
