"""Cosines of matrices and shares of gradients against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature, diagnostics
from tests import oracles

RANDOM = np.random.default_rng(0)


def operator_of(matrix):
    matrix = jnp.asarray(matrix, jnp.float32)
    return curvature.from_matvec(lambda v: matrix @ v, jnp.zeros(len(matrix)))


def test_of_diagonal_matrices_each_probe_is_exact():
    one, other = RANDOM.uniform(-1, 2, size=(2, 7))
    found = diagnostics.operator_alignment(
        operator_of(np.diag(one)), operator_of(np.diag(other)), key=jax.random.key(0), num_probes=3
    )
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    np.testing.assert_allclose(found.alignment, one @ other / norms, rtol=1e-5)
    np.testing.assert_allclose(
        found.null_alignment, one.sum() * other.sum() / (7 * norms), rtol=1e-5
    )
    np.testing.assert_allclose(found.product_trace, one @ other, rtol=1e-5)
    assert found.alignment_standard_error < 1e-6


def test_hessian_and_covariance_of_a_network():
    problem = oracles.problem()
    hessian = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)
    covariance = curvature.gradient_covariance(
        oracles.model_fn, oracles.cross_entropy, problem.params, *problem.batch
    )
    h, c = (np.asarray(matrix.dense(), np.float64) for matrix in (hessian, covariance))
    expected = np.sum(h * c) / (np.linalg.norm(h) * np.linalg.norm(c))
    null = np.trace(h) * np.trace(c) / (len(h) * np.linalg.norm(h) * np.linalg.norm(c))
    measure = lambda key: diagnostics.operator_alignment(
        hessian, covariance, key=key, num_probes=64
    )
    found = jax.lax.map(measure, jax.random.split(jax.random.key(0), 50))
    # The error is that of the spread over runs, and the mean is right to the bias of order 1 / 64.
    spread = np.std(found.alignment)
    np.testing.assert_allclose(np.mean(found.alignment_standard_error), spread, rtol=0.3)
    assert abs(np.mean(found.alignment) - expected) < 5 * spread / np.sqrt(50) + 0.02
    assert abs(np.mean(found.null_alignment) - null) < 5 * np.std(found.null_alignment) / 7 + 0.02
    assert expected > null + 5 * spread


def test_the_share_of_a_gradient():
    vectors = np.linalg.qr(RANDOM.normal(size=(6, 6)))[0][:3].astype("f4")
    gradient = 2.0 * vectors[0] - vectors[2]
    outside = np.linalg.qr(np.concatenate([vectors, np.eye(6)[:1]]).T)[0][:, 3]
    grads = {"a": jnp.asarray((gradient + 3 * outside)[:4].reshape(2, 2), jnp.float32)}
    grads["b"] = jnp.asarray((gradient + 3 * outside)[4:], jnp.float32)
    tree = lambda rows: {
        "a": jnp.asarray(rows[:, :4].reshape(-1, 2, 2)),
        "b": jnp.asarray(rows[:, 4:]),
    }
    found = diagnostics.gradient_share(grads, tree(vectors))
    np.testing.assert_allclose(found.share, 5 / 14, rtol=1e-5)
    np.testing.assert_allclose(found.shares, np.asarray([4, 0, 1]) / 14, atol=1e-6)
    np.testing.assert_allclose(found.null_share, 0.5)
    # Of any size, and for any basis of the same subspace.
    mixed = np.float32([[1, 1, 0], [0, 2, 1], [1, 0, 3]]) @ vectors
    tiny = jax.tree.map(lambda leaf: 1e-30 * leaf, grads)
    for other in (
        diagnostics.gradient_share(grads, tree(mixed)),
        diagnostics.gradient_share(tiny, tree(vectors)),
    ):
        np.testing.assert_allclose(other.share, 5 / 14, rtol=1e-4)
    zero = diagnostics.gradient_share(jax.tree.map(jnp.zeros_like, grads), tree(vectors))
    assert jnp.isnan(zero.share)


def test_bad_arguments():
    one, other = operator_of(np.eye(3)), operator_of(np.eye(4))
    align = lambda *operators: diagnostics.operator_alignment(*operators, key=jax.random.key(0))
    with pytest.raises(
        ValueError, match="`other_operator` must be of the parameters of `operator`"
    ):
        align(one, other)
    with pytest.raises(TypeError, match="`other_operator` must be an operator, got"):
        align(one, jnp.eye(3))
    grads = {"w": jnp.ones(3)}
    for vectors in ({"w": jnp.ones(3)}, {"w": jnp.ones((2, 4))}, {"w": jnp.ones((0, 3))}, {}):
        with pytest.raises(ValueError, match="`vectors"):
            diagnostics.gradient_share(grads, vectors)
