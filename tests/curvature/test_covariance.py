"""The covariance of the examples' gradients against the dense one in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from regjax import curvature
from tests import oracles
from tests.curvature.streams import Source


def gradients(problem):
    """(N, n), each example's gradient."""
    flat, unravel = ravel_pytree(problem.params)
    of = lambda w, x, y: oracles.loss_fn(unravel(w), x[None], y[None])
    return np.asarray(jax.vmap(jax.grad(of), (None, 0, 0))(flat, *problem.batch), np.float64)


def covariance(rows, weights=None):
    weights = np.ones(len(rows)) if weights is None else np.asarray(weights, np.float64)
    centered = rows - np.average(rows, axis=0, weights=weights)
    return np.einsum("in,im,i->nm", centered, centered, weights) / weights.sum()


def build(problem, *rest, **options):
    functions = (oracles.model_fn, oracles.cross_entropy)
    return curvature.gradient_covariance(
        *functions, problem.params, *problem.batch, *rest, **options
    )


def mask_like(params, make):
    """A tree of `make(keep, leaf)`, that keeps the first layer."""
    return {name: jax.tree.map(lambda leaf: make(name == "first", leaf), layer)  # noqa: B023
            for name, layer in params.items()}  # fmt: skip


PROBLEM = oracles.problem()
ROWS = gradients(PROBLEM)


@pytest.mark.parametrize("chunk_size", [None, 5])
def test_it_is_the_covariance_of_the_gradients(chunk_size):
    operator = build(PROBLEM, chunk_size=chunk_size)
    expected = covariance(ROWS)
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-6)
    second = ROWS.T @ ROWS / len(ROWS)
    assert np.abs(second - expected).max() > 1e-3  # that about zero is another one


def test_streams_weigh_batches_by_their_sizes():
    functions = (oracles.model_fn, oracles.cross_entropy, PROBLEM.params)
    source = Source(PROBLEM.batch, (9, 12, 2))
    operator = curvature.stream(curvature.gradient_covariance, *functions, source)
    np.testing.assert_allclose(operator.dense(), covariance(ROWS), rtol=1e-4, atol=1e-6)


def test_examples_count_by_their_weights():
    weights = jnp.asarray(np.random.default_rng(0).integers(0, 4, len(ROWS)), jnp.float32)
    losses = lambda outputs, targets: (
        -jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[:, None], 1)[:, 0]
    )
    operator = curvature.gradient_covariance(
        oracles.model_fn, losses, PROBLEM.params, *PROBLEM.batch, weights, chunk_size=6
    )
    np.testing.assert_allclose(operator.dense(), covariance(ROWS, weights), rtol=1e-4, atol=1e-6)


def test_parts_are_parts_of_the_matrix():
    operator, expected = build(PROBLEM), covariance(ROWS)
    inside, _ = ravel_pytree(
        mask_like(PROBLEM.params, lambda keep, leaf: jnp.full(leaf.shape, keep))
    )
    mask = mask_like(PROBLEM.params, lambda keep, leaf: keep)
    block = expected[np.ix_(np.asarray(inside), np.asarray(inside))]
    for part in (operator.restricted(mask), build(PROBLEM, wrt=mask)):
        np.testing.assert_allclose(part.dense(), block, rtol=1e-4, atol=1e-6)


def test_its_trace_by_an_estimator_and_inside_of_jit():
    trace = lambda problem: curvature.trace(build(problem), key=jax.random.key(0), num_matvecs=60)
    expected = np.trace(covariance(ROWS))
    for found in (trace(PROBLEM), jax.jit(trace)(PROBLEM)):
        assert abs(found.value - expected) < 5 * found.standard_error + 1e-4 * expected
