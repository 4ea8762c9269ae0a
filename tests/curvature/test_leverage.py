"""Leverages and output covariances against the dense matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import curvature
from tests import oracles

RANDOM = np.random.default_rng(0)
DAMPING = 0.05


@pytest.fixture(scope="module")
def network():
    params, inputs, targets = oracles.problem(num_examples=12)
    return params, inputs, targets


def dense(params, inputs, targets, weights=None):
    """A (n, n), J (N, C, n) and S (N, C, C) in float64, by plain autodiff."""
    with jax.enable_x64(True):
        params, inputs = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, jnp.float64), (params, jnp.asarray(inputs))
        )
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        rows = jax.jacrev(lambda flat: oracles.model_fn(unravel(flat), inputs))(flat)
        shares = jax.nn.softmax(oracles.model_fn(params, inputs))
        curvatures = jnp.einsum("nc,cd->ncd", shares, jnp.eye(3)) - jnp.einsum(
            "nc,nd->ncd", shares, shares
        )
        weights = jnp.ones(len(inputs)) if weights is None else jnp.asarray(weights, jnp.float64)
        curvatures = curvatures * (weights / weights.mean())[:, None, None]
        matrix = jnp.einsum("nci,ncd,ndj->ij", rows, curvatures, rows) / len(inputs)
    return np.asarray(matrix), np.asarray(rows), np.asarray(curvatures)


def forms(matrix, rows):
    inverse = np.linalg.inv(matrix + DAMPING * np.eye(len(matrix)))
    return np.einsum("nci,ij,ndj->ncd", rows, inverse, rows)


def test_ridge_regression_has_the_diagonal_of_its_hat_matrix():
    inputs = jnp.asarray(RANDOM.normal(size=(30, 5)), jnp.float32)
    targets = jnp.zeros((30, 1))
    found = curvature.leverage(
        lambda weights, inputs: inputs @ weights,
        lambda outputs, targets: jnp.mean((outputs - targets) ** 2) / 2,
        jnp.ones((5, 1)), inputs, targets, damping=DAMPING,
    )  # fmt: skip
    wide = np.asarray(inputs, np.float64)
    expected = wide @ np.linalg.inv(wide.T @ wide + 30 * DAMPING * np.eye(5)) @ wide.T
    np.testing.assert_allclose(found.value, np.diag(expected), rtol=1e-5)
    off = np.abs(np.asarray(found.value, np.float64) - np.diag(expected))
    assert np.all(off <= np.asarray(found.error_bound))
    assert np.all(np.asarray(found.error_bound) < 1e-4)


@pytest.mark.parametrize("tol", [1e-4, 0.2])
def test_a_softmax_network_against_the_dense_matrix(network, tol):
    matrix, rows, curvatures = dense(*network)
    expected = np.einsum("ncd,ncd->n", curvatures, forms(matrix, rows)) / 12
    found = curvature.leverage(
        oracles.model_fn, oracles.cross_entropy, *network, damping=DAMPING, tol=tol
    )
    off = np.abs(np.asarray(found.value, np.float64) - expected)
    assert np.all(off <= np.asarray(found.error_bound))
    # Second order in the residuals: to tol^2 over the damping, far below tol.
    assert np.all(np.asarray(found.error_bound) <= 40 * tol**2 + 1e-4)
    assert np.all(np.asarray(found.converged))
    # All of them add up to the effective dimension.
    eigenvalues = np.linalg.eigvalsh(matrix)
    dimension = np.sum(eigenvalues / (eigenvalues + DAMPING))
    assert abs(float(found.value.sum()) - dimension) <= float(found.error_bound.sum())


def test_chosen_examples_of_a_weighted_mean_compiled(network):
    params, inputs, targets = network
    counts = np.asarray([1, 2, 3, 0] * 3, np.float32)

    def loss(outputs, targets_and_counts):
        labels, counts = targets_and_counts
        shares = jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], 1)[:, 0]
        return regjax.WeightedMean(-jnp.sum(counts * shares), jnp.sum(counts))

    matrix, rows, curvatures = dense(params, inputs, targets, counts)
    expected = np.einsum("ncd,ncd->n", curvatures, forms(matrix, rows)) / 12
    examples = np.asarray([5, 2, 3])
    run = jax.jit(
        lambda params, inputs, targets, examples: curvature.leverage(
            oracles.model_fn, loss, params, inputs, targets, damping=DAMPING, examples=examples
        )
    )
    found = run(params, inputs, (targets, counts), examples)
    np.testing.assert_allclose(found.value, expected[examples], rtol=1e-3, atol=1e-7)
    assert found.value[2] == 0


def test_the_covariance_of_outputs_and_what_is_not_known_of_it(network):
    params, _, targets = network
    operator = curvature.gauss_newton(oracles.model_fn, oracles.cross_entropy, *network)
    matrix, _, _ = dense(*network)
    others = jnp.asarray(RANDOM.normal(size=(4, 5)), jnp.float32)
    _, rows, _ = dense(params, others, targets)
    run = lambda **options: curvature.output_covariance(
        oracles.model_fn, params, others, operator, damping=DAMPING, num_examples=12, **options
    )
    expected = forms(matrix, rows) / 12
    found = run(lower_bound=0.0, tol=1e-2)
    assert found.value.shape == (4, 3, 3)
    off = np.abs(np.asarray(found.value, np.float64) - expected)
    assert np.all(off <= np.asarray(found.error_bound))
    assert np.all(np.asarray(found.error_bound) <= 1e-2 * np.abs(expected).max())
    np.testing.assert_array_equal(found.value, found.value.mT)
    # Whether the loss is convex its program does not say.
    unknown = run(tol=1e-2)
    np.testing.assert_allclose(unknown.value, found.value, rtol=1e-6)
    assert np.all(np.isinf(np.asarray(unknown.error_bound)))
    # A system that has not converged is flagged, and its bound still holds.
    short = run(lower_bound=0.0, max_matvecs=3)
    assert not np.any(np.asarray(short.converged))
    assert np.all(np.abs(np.asarray(short.value) - expected) <= np.asarray(short.error_bound))


def test_a_loss_that_is_not_convex_in_the_outputs_is_refused():
    run = lambda targets: curvature.leverage(
        lambda weights, inputs: inputs @ weights,
        lambda outputs, targets: jnp.mean(jnp.cos(outputs - targets)),
        jnp.zeros((2, 1)), jnp.ones((3, 2)), targets, damping=9.0,
    )  # fmt: skip
    targets = jnp.asarray([[3.0], [0.0], [3.0]])
    with pytest.raises(ValueError, match=r"`output_loss_fn` must be convex .* example 1"):
        run(targets)
    is_unknown = np.isnan(np.asarray(jax.jit(run)(targets).value))
    np.testing.assert_array_equal(is_unknown, [False, True, False])


def test_bad_input_is_refused_by_name(network):
    run = lambda **options: curvature.leverage(
        oracles.model_fn, oracles.cross_entropy, *network, **{"damping": DAMPING, **options}
    )
    with pytest.raises(ValueError, match="`damping` must be positive, got 0"):
        run(damping=0.0)
    with pytest.raises(ValueError, match="`examples` must be from 0 to 11, got 3 to 12"):
        run(examples=[3, 12])
    with pytest.raises(TypeError, match="`examples` must be integers, got float32"):
        run(examples=np.ones(2, np.float32))
    with pytest.raises(ValueError, match=r"`examples` must have the shape \(M,\)"):
        run(examples=np.ones((0,), np.int32))
    with pytest.raises(ValueError, match="`output_loss_fn` must be the mean over"):
        curvature.leverage(
            oracles.model_fn, lambda o, t: oracles.cross_entropy(o, t) * len(o), *network,
            damping=DAMPING,
        )  # fmt: skip
