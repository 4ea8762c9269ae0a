import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests import oracles

CHUNKS = [None, 7]


def jacobian_and_probabilities(problem):
    jacobian = oracles.dense_jacobian(oracles.model_fn, problem.params, problem.inputs)
    outputs = oracles.model_fn(problem.params, problem.inputs)
    return jacobian, np.asarray(jax.nn.softmax(outputs))


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gauss_newton_of_cross_entropy(chunk_size):
    problem = oracles.problem()
    operator = curvature.gauss_newton(
        oracles.model_fn,
        oracles.cross_entropy,
        problem.params,
        *problem.batch,
        chunk_size=chunk_size,
    )  # fmt: skip
    jacobian, p = jacobian_and_probabilities(problem)
    middle = np.einsum("ic,cd->icd", p, np.eye(3)) - np.einsum("ic,id->icd", p, p)
    expected = np.einsum("icn,icd,idm->nm", jacobian, middle, jacobian) / 23
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_gauss_newton_of_squared_error_is_the_gram_matrix(chunk_size):
    problem = oracles.problem()
    operator = curvature.gauss_newton(
        oracles.model_fn,
        oracles.squared_error,
        problem.params,
        *problem.batch,
        chunk_size=chunk_size,
    )  # fmt: skip
    jacobian, _ = jacobian_and_probabilities(problem)
    expected = np.einsum("icn,icm->nm", jacobian, jacobian) / 23
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_empirical_fisher_is_the_mean_outer_product_of_example_gradients(chunk_size):
    problem = oracles.problem()
    operator = curvature.empirical_fisher(
        oracles.model_fn,
        oracles.cross_entropy,
        problem.params,
        *problem.batch,
        chunk_size=chunk_size,
    )  # fmt: skip
    jacobian, p = jacobian_and_probabilities(problem)
    scores = np.einsum("ic,icn->in", p - np.eye(3)[np.asarray(problem.targets)], jacobian)
    np.testing.assert_allclose(operator.dense(), scores.T @ scores / 23, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
def test_exact_fisher_is_gauss_newton_of_its_loss(likelihood):
    problem = oracles.problem()
    loss = {"categorical": oracles.cross_entropy, "normal": oracles.squared_error}[likelihood]
    fisher = curvature.fisher(
        oracles.model_fn, problem.params, problem.inputs, key=None, num_samples=None,
        likelihood=likelihood,
    )  # fmt: skip
    gauss_newton = curvature.gauss_newton(oracles.model_fn, loss, problem.params, *problem.batch)
    np.testing.assert_allclose(fisher.dense(), gauss_newton.dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("likelihood", ["categorical", "normal"])
def test_sampled_fisher_is_unbiased(likelihood):
    problem = oracles.problem()
    vector = jax.tree.map(jnp.ones_like, problem.params)

    def quadratic_form(key, num_samples):
        operator = curvature.fisher(
            oracles.model_fn, problem.params, problem.inputs, key=key, num_samples=num_samples,
            likelihood=likelihood,
        )  # fmt: skip
        image = operator.matvec(vector)
        return sum(float(jnp.sum(leaf)) for leaf in jax.tree.leaves(image))

    exact = quadratic_form(None, None)
    samples = [quadratic_form(jax.random.key(seed), 20) for seed in range(40)]
    error = np.std(samples, ddof=1) / np.sqrt(len(samples))
    # Labels taken from the arg-max instead of drawn miss this by tens of standard errors.
    assert abs(np.mean(samples) - exact) < 5 * error
    assert error < 0.05 * exact


def test_sampled_fisher_has_the_same_draws_for_every_chunk_size_and_product():
    problem = oracles.problem()
    operators = [
        curvature.fisher(
            oracles.model_fn, problem.params, problem.inputs, key=jax.random.key(0), chunk_size=c
        )
        for c in (None, 7, 1)
    ]
    first, *others = [np.asarray(operator.dense()) for operator in operators]
    np.testing.assert_array_equal(first, np.asarray(operators[0].dense()))
    for other in others:
        np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-6)
    different = curvature.fisher(
        oracles.model_fn, problem.params, problem.inputs, key=jax.random.key(1)
    )
    assert np.abs(different.dense() - first).max() > 1e-3


def test_error_texts():
    problem = oracles.problem()
    with pytest.raises(ValueError, match="`likelihood` must be one of categorical, normal"):
        curvature.fisher(
            oracles.model_fn, problem.params, problem.inputs, key=None, likelihood="poisson"
        )
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        curvature.fisher(oracles.model_fn, problem.params, problem.inputs, key=None)
    with pytest.raises(ValueError, match=r"`output_loss_fn` must return a scalar.*\(23, 3\)"):
        curvature.gauss_newton(oracles.model_fn, lambda o, y: o, problem.params, *problem.batch)
