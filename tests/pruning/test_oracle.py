"""The loss without each gate and its second derivatives, against plain loops and `jax.hessian`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import pruning
from regjax.pruning import _oracle
from tests.pruning import gated


def test_oracle_and_diagonal_in_chunks_and_against_plain_loops():
    loss, gates, batch = gated.problem()
    ones = np.ones(6, np.float32)
    without = [{"hidden": jnp.asarray(np.where(np.arange(6) == c, 0, ones))} for c in range(6)]
    expected = [float(loss(z, *batch) - loss(gates, *batch)) ** 2 for z in without]
    for chunk_size, block_size in ((None, 16), (10, 4)):
        found = pruning.oracle_importance(
            loss, gates, *batch, chunk_size=chunk_size, block_size=block_size
        )
        np.testing.assert_allclose(found["hidden"], expected, rtol=1e-4)
        found = _oracle.gate_hessian_diagonal(
            loss, gates, *batch, chunk_size=chunk_size, block_size=block_size
        )
        hessian = jax.jit(jax.hessian(loss))(gates, *batch)["hidden"]["hidden"]
        np.testing.assert_allclose(found["hidden"], np.diag(hessian), rtol=1e-4)


def coupled_loss(gates, x):
    return jnp.mean(gates["a"]) * jnp.std(x)


def test_error_texts():
    loss, gates, batch = gated.problem()
    with pytest.raises(ValueError, match="`block_size` must be at least 1, got 0"):
        pruning.oracle_importance(loss, gates, *batch, block_size=0)
    with pytest.raises(ValueError, match="mean over independent examples"):
        pruning.oracle_importance(
            coupled_loss, {"a": jnp.ones(2)}, jnp.arange(7.0) ** 3, chunk_size=3
        )
