"""The covariance of dropout's gradient against dense covariances, sampled and exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import regjax
from regjax import curvature, regularizers
from tests import oracles

KEY = jax.random.key(0)
KEEP = 0.7


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def loss_of_mask(params, mask, inputs, targets):
    """Under a mask (1, width) of the whole batch, or (N, width) of one for each example."""
    hidden = jnp.tanh(inputs @ params["first"]["kernel"] + params["first"]["bias"][None]) * mask
    outputs = hidden @ params["second"]["kernel"] + params["second"]["bias"][None]
    return oracles.squared_error(outputs, targets)


def dropout_loss(params, key, inputs, targets, keep):
    mask = jax.random.bernoulli(key, keep, (1, 6)).astype(inputs.dtype) / keep
    return loss_of_mask(params, mask, inputs, targets)


def bound(problem, keep=KEEP):
    keep = jnp.asarray(keep, problem.inputs.dtype)
    return Partial(dropout_loss, inputs=problem.inputs, targets=problem.targets, keep=keep)


def small(num_examples=5, width=6, dtype=np.float64):
    return oracles.problem(num_examples, 3, width, 2, dtype)


def rows_of(gradients):
    """Trees of (K, ...) as (K, n), in NumPy."""
    leaves = jax.tree.leaves(gradients)
    return np.concatenate([np.asarray(g).reshape(len(g), -1) for g in leaves], 1)


def sampled_gradients(problem, num_samples):
    loss = bound(problem)
    of_key = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    return rows_of(of_key(problem.params, jax.random.split(KEY, num_samples)))


def all_gradients(problem, shape):
    """The gradients under the 64 masks of six numbers, and their probabilities."""
    kept = (np.arange(64)[:, None] >> np.arange(6)) & 1
    probabilities = KEEP ** kept.sum(1) * (1 - KEEP) ** (6 - kept.sum(1))
    of_mask = jax.jit(jax.vmap(jax.grad(loss_of_mask), (None, 0, None, None)))
    masks = jnp.asarray(kept.reshape(64, *shape) / KEEP)
    return rows_of(of_mask(problem.params, masks, *problem.batch)), probabilities


def moments(rows, probabilities):
    mean = probabilities @ rows
    return mean, np.einsum("k,ki,kj->ij", probabilities, rows - mean, rows - mean)


def test_products_are_those_of_the_dense_covariance_of_500_masks():
    problem = small(dtype=np.float32)
    operator = curvature.dropout_covariance(
        bound(problem), problem.params, key=KEY, num_samples=500
    )
    expected = np.cov(sampled_gradients(problem, 500).T.astype(np.float64), bias=True)
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-5)
    vector = jax.tree.map(lambda leaf: jnp.cos(leaf), problem.params)
    image = ravel_pytree(operator.matvec(vector))[0]
    np.testing.assert_allclose(
        image, expected @ np.asarray(ravel_pytree(vector)[0]), rtol=1e-4, atol=1e-5
    )
    largest = curvature.top_eigenpairs(operator, 2, key=KEY)
    np.testing.assert_allclose(largest.values, np.linalg.eigvalsh(expected)[:-3:-1], rtol=1e-3)
    assert bool(largest.complete)
    total = curvature.trace(operator, key=KEY, num_matvecs=200)
    assert abs(float(total.value) - np.trace(expected)) < 5 * float(total.standard_error)


def test_the_factor_has_the_covariance_and_its_spectrum(double):
    problem = small()
    options = {"key": KEY, "num_samples": 9}
    factor = curvature.dropout_covariance_factor(bound(problem), problem.params, **options)
    assert factor.shape == (9, 38)
    rows = sampled_gradients(problem, 9)
    np.testing.assert_allclose(factor, (rows - rows.mean(0)) / 3, rtol=1e-10, atol=1e-12)
    operator = curvature.dropout_covariance(bound(problem), problem.params, **options)
    np.testing.assert_allclose(operator.dense(), factor.T @ factor, rtol=1e-10, atol=1e-12)


def test_gradient_penalty_of_the_same_masks_is_mean_and_trace(double):
    problem = small()
    compiled = jax.jit(
        lambda params: (
            curvature.dropout_covariance(bound(problem), params, key=KEY, num_samples=9),
            regularizers.dropout_gradient_penalty(
                bound(problem), params, key=KEY, learning_rate=4.0, num_samples=9
            ).value,
        )
    )
    operator, penalty = compiled(problem.params)
    mean = sampled_gradients(problem, 9).mean(0)
    total = np.sum(mean**2) + np.trace(operator.dense())
    assert float(penalty) == pytest.approx(total, rel=1e-12)


def test_masks_of_the_batch_and_of_each_example_differ_in_covariance_alone(double):
    # Two examples with three units each: six numbers that are masked or not, either way.
    problem = small(2, 3)
    each, probabilities = all_gradients(problem, (2, 3))
    kept = (np.arange(64)[:, None] >> np.arange(6)) & 1
    shared = np.all(kept[:, :3] == kept[:, 3:], 1)  # the same mask for both examples
    of_batch = probabilities[shared] / KEEP ** kept[shared, :3].sum(1)
    of_batch /= (1 - KEEP) ** (3 - kept[shared, :3].sum(1))
    mean, covariance = moments(each, probabilities)
    mean_of_batch, covariance_of_batch = moments(each[shared], of_batch)
    np.testing.assert_allclose(mean_of_batch, mean, rtol=1e-12, atol=1e-12)
    assert np.linalg.norm(covariance_of_batch - covariance) > 0.1 * np.linalg.norm(covariance)


def test_its_mean_over_draws_is_smaller_than_the_covariance_by_one_in_k(double):
    problem = small()
    exact = np.trace(moments(*all_gradients(problem, (1, 6)))[1])
    factor = lambda key: curvature.dropout_covariance_factor(
        bound(problem), problem.params, key=key, num_samples=3
    )
    keys = jax.random.split(jax.random.key(1), 4000)
    traces = np.asarray(jax.jit(jax.vmap(lambda key: jnp.sum(factor(key) ** 2)))(keys))
    error = traces.std(ddof=1) / np.sqrt(len(traces))
    assert traces.mean() == pytest.approx(2 / 3 * exact, abs=5 * error)
    assert 10 * error < exact / 3


@pytest.mark.parametrize("num_samples", [2, 7])
def test_without_dropout_the_covariance_is_exactly_zero(num_samples):
    problem = small(dtype=np.float32)
    factor = curvature.dropout_covariance_factor(
        bound(problem, keep=1.0), problem.params, key=KEY, num_samples=num_samples
    )
    assert not np.any(factor)


class Net(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.relu(linen.Dense(4, name="first", param_dtype=jnp.bfloat16)(x))
        return linen.Dense(2, name="last")(linen.Dropout(0.5, deterministic=not train)(x))


@pytest.mark.usefixtures("default_promotion")
def test_a_flax_model_with_parameters_of_two_types():
    problem = small(dtype=np.float32)
    model = regjax.from_linen(Net(), Net().init(KEY, problem.inputs, train=False))

    def loss(params, key):
        outputs, _ = model.apply(params, model.state, problem.inputs, train=True, key=key)
        return oracles.squared_error(outputs, problem.targets)

    operator = curvature.dropout_covariance(loss, model.params, key=KEY, num_samples=5)
    assert operator.dtype == jnp.float32
    image = operator.matvec(model.params)
    assert image["first"]["kernel"].dtype == jnp.bfloat16
    form = np.asarray(ravel_pytree(image)[0]) @ np.asarray(ravel_pytree(model.params)[0])
    of_key = jax.jit(jax.vmap(jax.grad(loss), (None, 0)))
    flat = rows_of(of_key(model.params, jax.random.split(KEY, 5))).astype(np.float64)
    along = (flat - flat.mean(0)) @ np.asarray(ravel_pytree(model.params)[0], np.float64)
    assert form == pytest.approx(np.mean(along**2), rel=2e-2)  # images in bfloat16


def test_error_texts():
    problem = small(dtype=np.float32)
    with pytest.raises(ValueError, match="`num_samples` must be at least 2, got 1"):
        curvature.dropout_covariance(bound(problem), problem.params, key=KEY, num_samples=1)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        curvature.dropout_covariance(bound(problem), problem.params, key=0, num_samples=2)
    with pytest.raises(ValueError, match=r"must return a scalar, the mean loss, got shape \(3,\)"):
        curvature.dropout_covariance(lambda w, key: w, jnp.ones(3), key=KEY, num_samples=2)
    with pytest.raises(TypeError, match="must be real floating point, got int32"):
        curvature.dropout_covariance(
            lambda w, key: jnp.sum(w), jnp.arange(3), key=KEY, num_samples=2
        )
