"""Noise before the gradient without a closure: the numbers of `perturbed_gradient`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from regjax import transforms
from tests import oracles
from tests.transforms import modules
from tests.transforms.modules import assert_same

pytestmark = pytest.mark.usefixtures("default_promotion")
KEY = jax.random.key(3)
GROUPS = {"first": 0, "second": {"kernel": 1, "bias": 1}}
OPTIONS = (
    {},
    {"layerwise": False},
    {"cyclic": False, "groups": GROUPS},
    {"groups": GROUPS, "mask": {"first": True, "second": False}},
)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_numbers_are_those_of_the_transformation_to_the_bit(options, dtype):
    problem = oracles.problem()
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), problem.params)
    evaluate = jax.jit(jax.value_and_grad(oracles.loss_fn))
    grad_fn = lambda p, i: evaluate(p, *problem.batch)
    for std in (0.1, 0.0, lambda count: 0.1 * (1 + count)):
        tx = transforms.perturbed_gradient(std, key=KEY, **options)
        noisy = transforms.noisy_gradient(evaluate, std, key=KEY, **options)
        state, seen = tx.init(params), []
        clean = grad_fn(params, 0)[1]
        for step in range(4):
            expected, state = tx.update(clean, state, params, grad_fn=grad_fn)
            value, grads = noisy(params, *problem.batch, num_updates=step)
            assert_same(grads, expected)
            assert value == evaluate(params, *problem.batch)[0]
            seen.append(np.asarray(jax.tree.leaves(grads)[-1], np.float32))
        if std == 0.1:
            assert all(np.any(seen[0] != other) for other in seen[1:])


def test_noise_is_there_and_is_gaussian():
    evaluate = jax.value_and_grad(lambda w: jnp.sum(w**2) / 2)
    noisy = transforms.noisy_gradient(evaluate, 0.5, key=KEY)
    w = jnp.full(10_000, 3.0)
    drawn = jnp.concatenate([noisy(w, num_updates=jnp.int32(i))[1] - w for i in range(2)])
    # Five standard errors of a standard deviation, of a mean and of a correlation.
    assert float(drawn.std()) == pytest.approx(0.5, rel=5 / np.sqrt(40_000))
    assert abs(float(drawn.mean())) < 5 * 0.5 / np.sqrt(20_000)
    assert abs(float(jnp.corrcoef(drawn.reshape(2, -1))[0, 1])) < 5 / np.sqrt(10_000)


def test_nnx_modules_tick_once():
    x, y = modules.data()
    evaluate = nnx.value_and_grad(modules.nnx_loss, has_aux=True)
    noisy = transforms.noisy_gradient(evaluate, 0.1, key=KEY, layerwise=False)
    model, other = modules.Net(nnx.Rngs(0)), modules.Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    ours = noisy(model, x, y, num_updates=optimizer.step)
    clean = evaluate(other, x, y)
    assert_same(nnx.as_pure(nnx.state(model)), nnx.as_pure(nnx.state(other)))
    assert_same(ours[0], clean[0])
    assert jax.tree.structure(ours[1]) == jax.tree.structure(clean[1])
    assert jnp.any(ours[1]["first"]["kernel"][...] != clean[1]["first"]["kernel"][...])


def test_noise_below_the_spacing_of_bfloat16_is_seen():
    random = np.random.default_rng(0)
    w = {"w": jnp.asarray(0.02 * (1 + 0.1 * random.normal(size=4000)), jnp.bfloat16)}
    scale = jnp.asarray(1e6 * random.normal(size=4000), jnp.float32)
    loss = lambda p: jnp.sum(jnp.sin(scale * p["w"].astype(jnp.float32)) / scale)
    evaluate = jax.value_and_grad(loss)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), w)
    noisy = transforms.noisy_gradient(evaluate, 1e-6, key=KEY)
    low, high = (noisy(params, num_updates=0)[1]["w"] for params in (w, wide))
    assert low.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low, high.astype(jnp.bfloat16))
    assert np.mean(np.asarray(low != evaluate(w)[1]["w"])) > 0.5


def test_what_is_missing_is_named():
    evaluate = jax.value_and_grad(lambda w: jnp.sum(w**2))
    with pytest.raises(
        ValueError, match="`num_updates` must be given, got None: the noise depends"
    ):
        transforms.noisy_gradient(evaluate, 0.1, key=KEY)(jnp.ones(2))
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        transforms.noisy_gradient(evaluate, 0.1, key=jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="`layerwise` must be True or False"):
        transforms.noisy_gradient(evaluate, 0.1, key=KEY, layerwise=1)
    with pytest.raises(ValueError, match="`std` must be non-negative"):
        transforms.noisy_gradient(evaluate, -0.1, key=KEY)
    with pytest.raises(ValueError, match="`groups` must"):
        transforms.noisy_gradient(evaluate, 0.1, key=KEY, groups={"a": 1})(
            jnp.ones(2), num_updates=0
        )
