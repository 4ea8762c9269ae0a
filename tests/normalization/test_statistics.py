import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax.normalization import _statistics

RANDOM = np.random.default_rng(0)
DEVICES = _statistics.Devices("d")


@pytest.mark.parametrize("axes", [(0,), (0, 1), (0, -2), (1,)])
def test_moments_are_those_of_numpy(axes):
    x = RANDOM.normal(size=(5, 6, 4))
    found = _statistics.moments(jnp.asarray(x, jnp.float32), axes)
    np.testing.assert_allclose(found.mean, x.mean(axes, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(found.variance, x.var(axes, keepdims=True), atol=1e-6)
    assert found.num_values == x.size // found.mean.size


@pytest.mark.parametrize("offset", [1e3, 1e4])
def test_far_values_do_not_cancel(offset):
    x = jnp.asarray(RANDOM.normal(size=(64, 3)) + offset, jnp.float32)
    exact = np.asarray(x, np.float64).var(0, keepdims=True)
    np.testing.assert_allclose(_statistics.moments(x, (0,)).variance, exact, rtol=1e-4)
    # E[x^2] - E[x]^2 fails here.
    naive = jnp.mean(x**2, 0) - jnp.mean(x, 0) ** 2
    assert jnp.abs(naive / exact[0] - 1).max() > 1e-2


def test_gradient_is_that_of_the_two_pass_form():
    with jax.enable_x64(True):
        x = jnp.asarray(RANDOM.normal(size=(7, 3)) + 2)
        weight = jnp.asarray(RANDOM.normal(size=(2, 3)))

        def one(x):
            found = _statistics.moments(x, (0,))
            return jnp.sum(weight[:1] * found.mean + weight[1:] * found.variance)

        def two(x):
            mean = x.mean(0, keepdims=True)
            variance = ((x - mean) ** 2).mean(0, keepdims=True)
            return jnp.sum(weight[:1] * mean + weight[1:] * variance)

        np.testing.assert_allclose(jax.grad(one)(x), jax.grad(two)(x), atol=1e-12)
        hessians = [jax.jit(jax.hessian(f))(x) for f in (one, two)]
        np.testing.assert_allclose(*hessians, atol=1e-12)


def test_devices_of_a_mapped_axis_share_one_collective():
    x = RANDOM.normal(size=(4, 6, 3)) + 50 * np.arange(4).reshape(4, 1, 1)
    shards = jnp.asarray(x, jnp.float32)
    parted = jax.vmap(lambda x: _statistics.moments(x, (0,), devices=DEVICES), axis_name="d")
    mean, variance = jax.jit(lambda x: parted(x)[:2])(shards)
    whole = x.reshape(24, 3)
    for device in range(4):
        np.testing.assert_allclose(mean[device, 0], whole.mean(0), rtol=1e-6)
        np.testing.assert_allclose(variance[device, 0], whole.var(0), rtol=1e-5)
    seen = []
    jax.vmap(
        lambda x: seen.append(_statistics.moments(x, (0,), devices=DEVICES).num_values) or x,
        axis_name="d",
    )(shards)
    assert seen == [24]
    jaxpr = str(
        jax.make_jaxpr(
            lambda x: _statistics.moments(x, (0,), devices=DEVICES)[:2], axis_env=[("d", 4)]
        )(shards[0])
    )
    assert jaxpr.count("psum[") == 1
    assert "all_gather" not in jaxpr
