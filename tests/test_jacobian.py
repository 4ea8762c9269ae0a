"""Jacobians of single examples against plain autodiff of each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import regjax
from regjax import _jacobian

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(4, 3, 2))  # four examples of size 6
KERNEL = RANDOM.normal(size=(6, 5))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def few(x):
    """Two outputs: fewer than inputs."""
    return jnp.tanh(x.reshape(x.shape[0], -1) @ KERNEL)[:, :2]


def many(x):
    """Ten outputs in two axes: more than inputs."""
    hidden = jnp.tanh(x.reshape(x.shape[0], -1) @ KERNEL)
    return jnp.stack([hidden, hidden**2], 1)


def dense(function):
    """(N, k, d), example by example."""
    single = jax.jit(jax.jacrev(lambda row: function(row[None])[0].ravel()))
    return np.stack([single(row).reshape(-1, 6) for row in X])


@pytest.mark.parametrize("function", [few, many])
def test_rows_columns_and_norms(function, double):
    exact, x = dense(function), jnp.asarray(X)
    outputs, rows = _jacobian.rows(function, x)
    np.testing.assert_allclose(outputs, function(x).reshape(4, -1), rtol=1e-12)
    np.testing.assert_allclose(rows, exact.swapaxes(0, 1), rtol=1e-10, atol=1e-12)
    directions = jnp.asarray([[1.0, 0, 0, 0, 0, 0], [0, 2.0, 0, 0, 1.0, 0]])
    np.testing.assert_allclose(
        _jacobian.columns(function, x, directions),
        np.einsum("nkd,rd->rnk", exact, directions),
        rtol=1e-10,
        atol=1e-12,
    )
    np.testing.assert_allclose(
        _jacobian.squared_norms(function, x), np.sum(exact**2, (1, 2)), rtol=1e-10
    )
    basis = jnp.asarray(np.linalg.qr(RANDOM.normal(size=(6, 2)))[0])
    off = exact @ (np.eye(6) - basis @ basis.T)
    np.testing.assert_allclose(
        _jacobian.squared_norms(function, x, without=basis), np.sum(off**2, (1, 2)), rtol=1e-10
    )


@pytest.mark.parametrize("num_outputs", [2, 9])
def test_narrow_jacobians_are_projected_wide(num_outputs):
    """In bfloat16 the part in the subspace would leak into the rest."""
    kernel = jnp.asarray(RANDOM.normal(size=(6, num_outputs)), jnp.bfloat16)
    basis = jnp.asarray(np.linalg.qr(RANDOM.normal(size=(6, 5)))[0], jnp.float32)
    x = jnp.asarray(X, jnp.bfloat16)
    found = _jacobian.squared_norms(lambda x: x.reshape(4, -1) @ kernel, x, without=basis)
    exact, basis = np.asarray(kernel, np.float64), np.asarray(basis, np.float64)
    exact = np.sum((exact - basis @ (basis.T @ exact)) ** 2)
    # Directions of forward passes are inputs, and as narrow; the rows of reverse passes are not.
    np.testing.assert_allclose(found, exact, rtol=1e-3 if num_outputs == 2 else 0.05)


def test_bad_input():
    def coupled(params, x):
        return x

    coupled.couples_examples = True
    with pytest.raises(ValueError, match="`model_fn` must not couple the examples"):
        _jacobian.check_model("model_fn", coupled, X)
    with pytest.raises(TypeError, match="`inputs` must be one array of real floating point"):
        _jacobian.check_model("model_fn", few, jnp.ones((3, 2), jnp.int32))
    with pytest.raises(TypeError, match=r"`inputs` must be one array .* got dict"):
        _jacobian.check_model("model_fn", few, {"x": X})
    with pytest.raises(ValueError, match=r"leading axis of its inputs, 4, got shape \(6,\)"):
        _jacobian.squared_norms(lambda x: x[0].ravel(), X)
    assert regjax.couples_examples(coupled)
