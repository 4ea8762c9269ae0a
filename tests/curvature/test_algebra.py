"""Sums, multiples, D A D, the identity and submatrices against dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg
from jax.flatten_util import ravel_pytree

from regjax import curvature
from tests import oracles
from tests.curvature.streams import Source

PROBLEM = oracles.problem()
PARAMS = PROBLEM.params
SIZE = 57
# Of the first layer's kernel and the second layer's bias, in the order of the leaves.
MASK = {"first": {"bias": False, "kernel": True}, "second": {"bias": True, "kernel": False}}
PLACES = np.r_[6:36, 36:39]
DIAGONAL = jax.tree.map(
    lambda leaf: 1 + jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape) / SIZE, PARAMS
)
WEIGHTS = np.asarray(ravel_pytree(DIAGONAL)[0])


def in_memory(chunk_size=None):
    hessian = curvature.hessian(oracles.loss_fn, PARAMS, *PROBLEM.batch, chunk_size=chunk_size)
    gauss_newton = curvature.gauss_newton(
        oracles.model_fn, oracles.cross_entropy, PARAMS, *PROBLEM.batch, chunk_size=chunk_size
    )
    return hessian, gauss_newton


def chunked():
    return in_memory(chunk_size=7)


def streamed():
    arguments = (oracles.model_fn, oracles.cross_entropy, PARAMS, Source(PROBLEM.batch))
    hessian = curvature.stream(curvature.hessian, oracles.loss_fn, PARAMS, Source(PROBLEM.batch))
    return hessian, curvature.stream(curvature.gauss_newton, *arguments)


def given():
    flat, unravel = ravel_pytree(PARAMS)
    matrices = [jnp.asarray(operator.dense()) for operator in in_memory()]

    def product_of(matrix, tree):
        return unravel(matrix @ ravel_pytree(tree)[0])

    assert flat.size == SIZE
    return [
        curvature.from_matvec(jax.tree_util.Partial(product_of, matrix), PARAMS)
        for matrix in matrices
    ]


KINDS = {"in memory": in_memory, "in chunks": chunked, "streamed": streamed, "given": given}
A, B = (np.asarray(operator.dense(), np.float64) for operator in in_memory())
EXPRESSIONS = {
    "sum": (lambda a, b: a + b, A + B),
    "difference": (lambda a, b: a - b, A - B),
    "multiple": (lambda a, b: 2.5 * a, 2.5 * A),
    "multiple from the right": (lambda a, b: a * np.float32(2.5), 2.5 * A),
    "negative": (lambda a, b: -a, -A),
    "damped": (lambda a, b: a + 0.5 * curvature.identity(a.space), A + 0.5 * np.eye(SIZE)),
    "scaled": (lambda a, b: a.scaled(DIAGONAL), np.outer(WEIGHTS, WEIGHTS) * A),
    "submatrix": (lambda a, b: a.restricted(MASK), A[np.ix_(PLACES, PLACES)]),
    "nested": (
        lambda a, b: (3 * (a - b).scaled(DIAGONAL) + curvature.identity(a.space)).restricted(MASK),
        (3 * np.outer(WEIGHTS, WEIGHTS) * (A - B) + np.eye(SIZE))[np.ix_(PLACES, PLACES)],
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_expressions_are_those_of_dense_matrices(kind, name):
    make, expected = EXPRESSIONS[name]
    operator = make(*KINDS[kind]())
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-5)
    assert operator.shape == expected.shape
    assert operator.eps == float(jnp.finfo(jnp.float32).eps)


@pytest.mark.parametrize("kind", KINDS)
def test_solvers_take_them_and_vectors_keep_their_tree(kind):
    make, expected = EXPRESSIONS["nested"]
    operator = make(*KINDS[kind]())
    result = curvature.top_eigenpairs(operator, 2, key=jax.random.key(0), tol=1e-5)
    np.testing.assert_allclose(result.values, np.linalg.eigvalsh(expected)[:-3:-1], rtol=1e-4)
    assert result.vectors["first"]["bias"] is None
    assert result.vectors["first"]["kernel"].shape == (2, 5, 6)


def test_inside_of_jit_and_with_a_traced_factor():
    hessian, gauss_newton = in_memory()

    @jax.jit
    def largest(one, other, damping):
        operator = one + damping * other + damping * curvature.identity(one.space)
        return curvature.top_eigenpairs(operator, 1, key=jax.random.key(0), tol=1e-5).values[0]

    for damping in (0.1, 2.0):
        expected = np.linalg.eigvalsh(A + damping * B + damping * np.eye(SIZE))[-1]
        found = largest(hessian, gauss_newton, jnp.float32(damping))
        assert float(found) == pytest.approx(expected, rel=1e-4)


def test_a_sum_of_streams_reads_each_once_a_product():
    operators = streamed()
    total = operators[0] + operators[1]
    before = [operator.source.num_passes for operator in operators]
    assert total.takes_blocks
    curvature.trace(total, key=jax.random.key(0), num_matvecs=5)
    assert [operator.source.num_passes for operator in operators] == [n + 1 for n in before]


def test_at_is_the_product_with_a_tree_or_a_block():
    hessian, _ = in_memory()
    image = hessian @ DIAGONAL
    np.testing.assert_allclose(ravel_pytree(image)[0], A @ WEIGHTS, rtol=1e-4, atol=1e-5)
    block = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), DIAGONAL)
    images = hessian @ block
    for i in range(2):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], images)
        expected = (i + 1) * A @ WEIGHTS
        np.testing.assert_allclose(ravel_pytree(row)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_submatrix_of_a_submatrix(kind):
    operator = KINDS[kind]()[0].restricted(MASK)
    mask = {"first": {"bias": None, "kernel": False}, "second": {"bias": True, "kernel": None}}
    smaller = operator.restricted(mask)
    np.testing.assert_allclose(smaller.dense(), A[36:39, 36:39], rtol=1e-4, atol=1e-5)
    blocks = curvature.by_block(KINDS[kind]()[0], depth=2)
    np.testing.assert_allclose(blocks["second/bias"].dense(), smaller.dense(), rtol=1e-5)


def test_scipy_sees_the_same_matrix():
    hessian, _ = in_memory()
    matrix = (hessian + curvature.identity(hessian.space)).to_scipy()
    assert matrix.dtype == np.float32
    np.testing.assert_allclose(matrix @ np.eye(SIZE), A + np.eye(SIZE), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(matrix @ WEIGHTS, (A + np.eye(SIZE)) @ WEIGHTS, rtol=1e-4)
    values = scipy.sparse.linalg.eigsh(matrix, k=2, which="LA", return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(A)[-2:] + 1, rtol=1e-4)


def test_a_checkpoint_knows_the_parts(tmp_path):
    hessian, gauss_newton = in_memory()
    checkpoint = curvature.Checkpoint(tmp_path, every=2)
    solve = lambda operator: curvature.top_eigenpairs(
        operator, 2, key=jax.random.key(0), checkpoint=checkpoint
    )
    first = solve(hessian + 2 * gauss_newton)
    np.testing.assert_array_equal(solve(hessian + 2 * gauss_newton).values, first.values)
    with pytest.raises(ValueError, match=r"`checkpoint` must be of the same problem: `1.factor`"):
        solve(hessian + 3 * gauss_newton)


def test_memory_of_a_sum_holds_both():
    hessian, gauss_newton = in_memory()
    estimate = lambda operator: curvature.memory_estimate(
        curvature.top_eigenpairs_solver(operator, 2, key=jax.random.key(0))
    )
    one, both = estimate(hessian), estimate(hessian + gauss_newton)
    assert both.operator_bytes == one.operator_bytes + estimate(gauss_newton).operator_bytes
    assert both.state_bytes == one.state_bytes
    assert both.product_bytes >= one.product_bytes
    of_source = estimate(streamed()[0])
    assert of_source.operator_bytes < one.operator_bytes
    assert estimate(hessian + streamed()[0]).product_bytes >= of_source.product_bytes


def test_low_precision_of_a_part_is_that_of_the_whole():
    narrow = curvature.from_matvec(
        lambda v: (v.astype(jnp.bfloat16) * 2).astype(jnp.float32), jnp.zeros(5)
    )
    wide = curvature.from_matvec(lambda v: 2 * v, jnp.zeros(5))
    unit = float(jnp.finfo(jnp.bfloat16).eps)
    assert (wide + narrow).eps == narrow.scaled(jnp.ones(5)).eps == unit
    assert (wide + wide).eps == float(jnp.finfo(jnp.float32).eps)


def test_error_texts():
    hessian, _ = in_memory()
    other = curvature.identity(curvature.Space.of(jnp.zeros(SIZE)))
    with pytest.raises(ValueError, match="`other` must be an operator of the same space"):
        hessian + other
    with pytest.raises(TypeError, match=r"got a number; .*curvature\.identity"):
        hessian + 1.0
    with pytest.raises(ValueError, match=r"`factor` must be one number, got shape \(2,\)"):
        hessian * jnp.ones(2)
    with pytest.raises(TypeError, match="`factor` must be a real number, got complex64"):
        1j * hessian
    with pytest.raises(TypeError, match="unsupported operand"):
        hessian * hessian
    with pytest.raises(ValueError, match="`mask` must keep at least one leaf, got none"):
        hessian.restricted(jax.tree.map(lambda _: False, PARAMS))
    with pytest.raises(ValueError, match="`mask` must have the tree structure"):
        hessian.restricted({"first": True})
    with pytest.raises(ValueError, match="`diagonal` must have the tree structure"):
        hessian.scaled(jnp.ones(SIZE))
