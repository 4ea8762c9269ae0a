import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from tests import oracles


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_blocks_are_the_principal_submatrices(chunk_size):
    problem = oracles.problem()
    operator = curvature.hessian(
        oracles.loss_fn, problem.params, *problem.batch, chunk_size=chunk_size
    )
    dense = oracles.dense_hessian(oracles.loss_fn, problem.params, *problem.batch)
    blocks = curvature.by_block(operator)
    assert list(blocks) == ["first", "second"]
    for name, place in {"first": slice(0, 36), "second": slice(36, 57)}.items():
        np.testing.assert_allclose(blocks[name].dense(), dense[place, place], rtol=1e-4, atol=1e-6)


def test_depth_two_separates_kernels_from_biases():
    problem = oracles.problem()
    operator = curvature.gauss_newton(
        oracles.model_fn, oracles.cross_entropy, problem.params, *problem.batch
    )
    blocks = curvature.by_block(operator, depth=2)
    shapes = {name: block.shape[0] for name, block in blocks.items()}
    assert shapes == {"first/bias": 6, "first/kernel": 30, "second/bias": 3, "second/kernel": 18}
    np.testing.assert_allclose(
        blocks["second/bias"].dense(), operator.dense()[36:39, 36:39], rtol=1e-4, atol=1e-6
    )


def test_vectors_have_none_outside_of_the_block():
    problem = oracles.problem()
    operator = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)
    result = curvature.top_eigenpairs(
        curvature.by_block(operator)["second"], 1, key=jax.random.key(0)
    )
    assert result.vectors["first"] == {"kernel": None, "bias": None}
    assert result.vectors["second"]["kernel"].shape == (1, 6, 3)


def test_only_the_block_is_differentiated():
    # The first layer's product needs no more operations than the whole one has: a masked full
    # product counts them all.
    problem = oracles.problem(num_examples=64, num_inputs=40, width=40)
    operator = curvature.hessian(oracles.loss_fn, problem.params, *problem.batch)

    def operations(operator):
        vector = jnp.ones(operator.shape[0])
        compiled = jax.jit(lambda o, v: o.product(v)).lower(operator, vector).compile()
        return compiled.cost_analysis()["flops"]

    blocks = curvature.by_block(operator)
    assert operations(blocks["second"]) < 0.5 * operations(operator)


def test_error_texts():
    operator = curvature.from_matvec(lambda v: v, jnp.zeros(3))
    with pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        curvature.by_block(operator, depth=0)
