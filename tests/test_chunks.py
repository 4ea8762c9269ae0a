"""Chunks of a batch give what the whole batch gives, ragged ends and all."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from regjax import _chunks
from tests import oracles

PROBLEM = oracles.problem()


def moments(params, inputs, targets):
    """Means of two different types and shapes."""
    outputs = oracles.model_fn(params, inputs)
    return {"outputs": jnp.mean(outputs, 0), "targets": jnp.mean(targets.astype(jnp.bfloat16))}


def rows(params, inputs, targets):
    return oracles.model_fn(params, inputs), targets


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["host", "jit"])
@pytest.mark.parametrize("chunk_size", [1, 4, 22, 23, None])
def test_means_and_rows_are_those_of_the_whole_batch(chunk_size, wrap):
    whole = moments(PROBLEM.params, *PROBLEM.batch)
    mean = wrap(lambda params, batch: _chunks.mean(moments, params, batch, chunk_size))
    found = mean(PROBLEM.params, PROBLEM.batch)
    np.testing.assert_allclose(found["outputs"], whole["outputs"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        np.float32(found["targets"]), np.float32(whole["targets"]), rtol=0.02
    )
    each = wrap(lambda params, batch: _chunks.each(rows, params, batch, chunk_size))
    outputs, targets = each(PROBLEM.params, PROBLEM.batch)
    expected = oracles.model_fn(PROBLEM.params, PROBLEM.inputs)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(targets, PROBLEM.targets)


def test_a_second_call_compiles_nothing_and_gradients_pass_through():
    mean = functools.partial(_chunks.mean, Partial(oracles.loss_fn))
    mean(PROBLEM.params, PROBLEM.batch, 5)
    size = _chunks._with_ragged._cache_size()
    mean(jax.tree.map(jnp.negative, PROBLEM.params), PROBLEM.batch, 5)
    assert _chunks._with_ragged._cache_size() == size
    gradient = jax.grad(lambda params: mean(params, PROBLEM.batch, 5))(PROBLEM.params)
    expected = jax.grad(oracles.loss_fn)(PROBLEM.params, *PROBLEM.batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, expected
    )


def test_what_cannot_be_split_is_refused():
    prepared = functools.partial(_chunks.prepared, params=PROBLEM.params, batch=PROBLEM.batch)
    check = lambda loss_fn, chunk_size: prepared(loss_fn, chunk_size=chunk_size)[1]
    assert check(oracles.loss_fn, chunk_size=None) is None
    assert check(oracles.loss_fn, chunk_size=23) is None
    assert check(oracles.loss_fn, chunk_size=22) == 22

    def summed(params, inputs, targets):
        return oracles.loss_fn(params, inputs, targets) * len(targets)

    with pytest.raises(ValueError, match="`loss_fn` must be the mean over independent examples"):
        check(summed, chunk_size=22)
    assert check(summed, chunk_size=None) is None
    summed.couples_examples = True
    with pytest.raises(ValueError, match=r"`chunk_size` must not split.*got 22"):
        check(summed, chunk_size=22)
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        check(oracles.loss_fn, chunk_size=0)
