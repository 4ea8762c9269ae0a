"""Influence against leaving out and retraining, which for ridge regression is a closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature, diagnostics
from tests import oracles

RANDOM = np.random.default_rng(0)
NUM_TRAIN, NUM_TEST, SIZE, RIDGE = 30, 4, 5, 0.1


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def squared_loss(weights, inputs, targets):
    return jnp.mean((inputs @ weights - targets) ** 2) / 2


def ridge_problem():
    train, test = (
        (RANDOM.normal(size=(n, SIZE)), RANDOM.normal(size=n)) for n in (NUM_TRAIN, NUM_TEST)
    )
    weights = fitted(*train, NUM_TRAIN)
    return weights, train, test


def fitted(inputs, targets, num_examples):
    """The minimum of sum_i (x_i w - y_i)^2 / 2 + num_examples * ridge |w|^2 / 2."""
    matrix = inputs.T @ inputs + num_examples * RIDGE * np.eye(SIZE)
    return np.linalg.solve(matrix, inputs.T @ targets)


def test_ridge_regression_is_exact_after_the_leverage(float64):
    weights, (inputs, targets), (test_inputs, test_targets) = ridge_problem()
    found = diagnostics.influence(
        squared_loss, jnp.asarray(weights), (inputs, targets), (test_inputs, test_targets),
        damping=RIDGE, tol=1e-12,
    )  # fmt: skip
    assert found.value.shape == (NUM_TEST, NUM_TRAIN)
    assert np.all(np.asarray(found.converged))
    matrix = inputs.T @ inputs + NUM_TRAIN * RIDGE * np.eye(SIZE)
    leverages = np.einsum("ni,ij,nj->n", inputs, np.linalg.inv(matrix), inputs)
    residuals = test_inputs @ weights - test_targets
    for i in range(NUM_TRAIN):
        rest = np.arange(NUM_TRAIN) != i
        left_out = fitted(inputs[rest], targets[rest], NUM_TRAIN)
        # Of the test loss, the part that is linear in the change of the weights.
        expected = residuals * (test_inputs @ (left_out - weights))
        foreseen = -np.asarray(found.value)[:, i] / NUM_TRAIN / (1 - leverages[i])
        np.testing.assert_allclose(foreseen, expected, rtol=1e-9, atol=1e-14)


@pytest.fixture(scope="module")
def network():
    params, *batch = oracles.problem()
    train = jax.tree.map(lambda a: a[:16], tuple(batch))
    test = jax.tree.map(lambda a: a[16:20], tuple(batch))
    return params, train, test


def dense(params, train, test, damping):
    space = curvature.Space.of(params)
    one = lambda *example: space.ravel(
        jax.grad(oracles.loss_fn)(params, *(leaf[None] for leaf in example))
    )
    grads = [np.stack([one(*rows) for rows in zip(*data, strict=True)]) for data in (train, test)]
    matrix = np.asarray(curvature.gauss_newton(
        oracles.model_fn, oracles.cross_entropy, params, *train
    ).dense(), np.float64)  # fmt: skip
    return -grads[1] @ np.linalg.solve(matrix + damping * np.eye(len(matrix)), grads[0].T)


def test_a_network_against_the_dense_matrix_in_chunks_and_compiled(network):
    params, train, test = network
    expected = dense(params, train, test, 0.1)

    def run(params, train, test, **options):
        matrix = curvature.gauss_newton(oracles.model_fn, oracles.cross_entropy, params, *train)
        return diagnostics.influence(
            oracles.loss_fn, params, train, test, damping=0.1, operator=matrix, **options
        )

    scale = np.abs(expected).max()
    for found in (run(params, train, test, chunk_size=5), jax.jit(run)(params, train, test)):
        np.testing.assert_allclose(found.value, expected, rtol=0, atol=1e-3 * scale)
        assert np.all(np.asarray(found.converged))
        assert np.all(np.asarray(found.residual_norms) <= 1e-4)


def test_weighted_means_count_by_their_weights(network):
    """With integer weights an example stands for so many of its copies."""
    params, (inputs, targets), test = network
    counts = np.asarray([1, 2, 3, 0] * 4, np.float32)

    def weighted(params, inputs, targets, counts):
        losses = jax.vmap(lambda x, y: oracles.loss_fn(params, x[None], y[None]))(inputs, targets)
        return regjax.WeightedMean(jnp.sum(counts * losses), jnp.sum(counts))

    ones = np.ones(len(test[0]), np.float32)
    found = diagnostics.influence(
        weighted, params, (inputs, targets, counts), (*test, ones), damping=0.3, method="minres"
    )
    copies = jax.tree.map(lambda a: jnp.repeat(a, counts.astype(int), 0), (inputs, targets))
    plain = diagnostics.influence(
        oracles.loss_fn, params, copies, test, damping=0.3, method="minres"
    )
    first = np.append(0, np.cumsum(counts.astype(int)))[:-1][counts > 0]
    # Of a mean over other numbers of examples: N w_i / W times an example's own.
    factors = len(counts) * counts / counts.sum()
    expected = np.asarray(plain.value)[:, first] * factors[counts > 0]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(
        np.asarray(found.value)[:, counts > 0], expected, rtol=0, atol=1e-3 * scale
    )
    assert not np.any(np.asarray(found.value)[:, counts == 0])


def test_bad_input_is_refused_by_name(network):
    params, train, test = network
    run = lambda *data, **options: diagnostics.influence(
        oracles.loss_fn, params, *data, **{"damping": 0.1, **options}
    )
    with pytest.raises(ValueError, match="`damping` must be non-negative, got -1"):
        run(train, test, damping=-1.0)
    with pytest.raises(TypeError, match="`test` must be a tuple of arrays"):
        run(train, test[0])
    with pytest.raises(ValueError, match="`operator` must be of the parameters that move"):
        run(train, test, operator=curvature.identity(curvature.Space.of(jnp.ones(3))))
    broken = (test[0].at[1].set(jnp.nan), test[1])
    with pytest.raises(ValueError, match=r"`test` must have examples .* example 1"):
        run(train, broken)
