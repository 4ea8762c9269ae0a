import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

from regjax import curvature
from regjax.curvature._operators import _curvature
from tests import oracles
from tests.compilations import programs


def random_like(params, seed=1):
    flat, unravel = ravel_pytree(params)
    return unravel(jnp.asarray(np.random.default_rng(seed).normal(size=flat.size), flat.dtype))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_hvp_is_the_dense_hessian_times_the_vector(wrap):
    problem = oracles.problem()
    vector = random_like(problem.params)
    product = wrap(partial(curvature.hvp, oracles.loss_fn))(problem.params, vector, *problem.batch)
    expected = oracles.dense_hessian(oracles.loss_fn, *problem_args(problem)) @ flat(vector)
    np.testing.assert_allclose(flat(product), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [None, 1, 7, 23, 100])
def test_hessian_is_the_dense_one_for_every_chunk_size(chunk_size):
    # 23 = 3 * 7 + 2: a mean of chunk means that forgot the sizes is wrong by a factor.
    problem = oracles.problem()
    operator = curvature.hessian(oracles.loss_fn, *problem_args(problem), chunk_size=chunk_size)
    expected = oracles.dense_hessian(oracles.loss_fn, *problem_args(problem))
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-6)
    assert operator.shape == (57, 57)
    assert operator.dtype == jnp.float32


def test_recomputed_and_kept_linearisations_agree():
    problem = oracles.problem()
    kept = curvature.hessian(oracles.loss_fn, *problem_args(problem))
    recomputed = dataclasses.replace(kept, linear_map=None)
    assert kept.linear_map is not None
    np.testing.assert_allclose(kept.dense(), recomputed.dense(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("keeps", "chunk_size"), [(True, None), (False, None), (False, 5)])
def test_the_same_matrix_at_other_parameters(keeps, chunk_size, monkeypatch):
    """What was kept of the old ones must not stay."""
    monkeypatch.setattr(_curvature, "CACHE_BYTES", 2**30 if keeps else 0)
    problem = oracles.problem()
    make = lambda p: curvature.hessian(oracles.loss_fn, p, *problem.batch, chunk_size=chunk_size)
    here, there = problem.params, jax.tree.map(lambda leaf: leaf + 0.5, problem.params)
    vector = random_like(there)
    expected = flat(make(there).matvec(vector))
    assert not np.allclose(flat(make(here).matvec(vector)), expected, atol=1e-3)
    moved = jax.jit(lambda operator, p: operator.at(p))(make(here), there)
    for operator in (make(here).at(there), moved):
        assert (operator.linear_map is not None) == keeps
        np.testing.assert_allclose(flat(operator.matvec(vector)), expected, rtol=2e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`params"):
        make(here).at([vector])


def test_residuals_over_the_budget_are_not_kept(monkeypatch):
    monkeypatch.setattr(_curvature, "CACHE_BYTES", 100)
    operator = curvature.hessian(oracles.loss_fn, *problem_args(oracles.problem()))
    assert operator.linear_map is None


def test_float64_stays_float64():
    with jax.enable_x64(True):
        problem = oracles.problem(dtype=np.float64)
        operator = curvature.hessian(oracles.loss_fn, *problem_args(problem), chunk_size=5)
        expected = oracles.dense_hessian(oracles.loss_fn, *problem_args(problem))
        assert operator.dense().dtype == jnp.float64
        np.testing.assert_allclose(operator.dense(), expected, rtol=1e-11, atol=1e-13)


SOLVERS = {
    "lanczos": lambda o, key: curvature.lanczos(o, o.params, 8, key=key).alphas,
    "density": lambda o, key: curvature.spectral_density(o, key=key, num_steps=8).trace,
    **{
        which: lambda o, key, which=which: (
            curvature.top_eigenpairs(
                o, 3, key=key, which=which, max_basis=9, max_matvecs=200
            ).values
        )
        for which in ("LA", "SA", "LM", "BE")
    },
    **{
        f"{name} {method}": lambda o, key, name=name, method=method: (
            getattr(curvature, name)(o, key=key, num_matvecs=9, method=method).value
        )
        for name in ("trace", "diagonal")
        for method in ("hutchinson", "hutch++")
    },
}


# Inside of a jit dtypes are told by the trace.
@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize(
    "wrap", [lambda f: f, lambda f: partial(jax.eval_shape, f)], ids=["eager", "traced"]
)
def test_solvers_stay_in_float64_under_strict_promotion(name, wrap):
    with jax.enable_x64(True):
        problem = oracles.problem(dtype=np.float64)
        operator = curvature.hessian(oracles.loss_fn, *problem_args(problem))
        found = wrap(SOLVERS[name])(operator, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype(jnp.float64)}


def test_bfloat16_parameters_get_float32_vectors_and_their_own_dtype_back():
    params = {"w": jnp.arange(3.0, dtype=jnp.bfloat16)}
    inputs = jnp.ones(4, jnp.bfloat16)
    operator = curvature.hessian(lambda p, x: jnp.mean(x * jnp.sum(p["w"] ** 2)), params, inputs)
    assert operator.dtype == jnp.float32
    assert operator.matvec(params)["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(operator.dense(), 2 * np.eye(3))


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_matmat_rows_are_matvecs(chunk_size):
    problem = oracles.problem()
    operator = curvature.hessian(oracles.loss_fn, *problem_args(problem), chunk_size=chunk_size)
    vectors = [random_like(problem.params, seed) for seed in range(3)]
    block = operator.matmat(jax.tree.map(lambda *leaves: jnp.stack(leaves), *vectors))
    for i, vector in enumerate(vectors):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], block)
        np.testing.assert_allclose(flat(row), flat(operator.matvec(vector)), rtol=1e-5, atol=1e-6)


def test_a_second_operator_at_new_parameters_compiles_nothing():
    problem = oracles.problem()

    def solve(params):
        operator = curvature.hessian(oracles.loss_fn, params, *problem.batch)
        return curvature.top_eigenpairs(operator, 2, key=jax.random.key(0)).values

    shifted = jax.tree.map(lambda leaf: leaf + 0.1, problem.params)
    with programs() as compiled:
        first = solve(problem.params)
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
    assert compiled  # the listener hears, at least the new lambda
    with programs() as compiled:
        second = solve(shifted)
    assert compiled == []
    assert np.all(np.asarray(first) != np.asarray(second))


def test_operator_passes_through_jit_as_an_argument():
    problem = oracles.problem()
    operator = curvature.hessian(oracles.loss_fn, *problem_args(problem), chunk_size=7)
    vector = random_like(problem.params)
    product = jax.jit(lambda operator, vector: operator.matvec(vector))(operator, vector)
    np.testing.assert_allclose(flat(product), flat(operator.matvec(vector)), rtol=1e-5, atol=1e-6)


def test_state_bound_to_the_loss_is_not_split_into_chunks():
    def loss(state, params, x):
        return jnp.mean((x @ params["w"]) ** 2) * jnp.sum(state)

    params, x = {"w": jnp.ones(3)}, jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)))
    bound = Partial(loss, jnp.ones(4))
    operator = curvature.hessian(bound, params, x.astype(jnp.float32), chunk_size=3)
    np.testing.assert_allclose(operator.dense(), 8 * x.T @ x / 10, rtol=1e-5)


def test_from_matvec_takes_trees_and_arrays():
    matrix = oracles.symmetric([1.0, 2.0, 3.0])
    operator = curvature.from_matvec(oracles.matvec_of(matrix), jnp.zeros(3))
    np.testing.assert_allclose(operator.dense(), matrix, atol=1e-6)
    doubled = curvature.from_matvec(
        lambda tree: jax.tree.map(lambda leaf: 2 * leaf, tree),
        {"a": jnp.zeros(2), "b": jnp.zeros(())},
    )
    np.testing.assert_array_equal(doubled.dense(), 2 * np.eye(3))


@pytest.mark.parametrize("kept", [True, False])
def test_from_gradient_is_the_hessian(kept, monkeypatch):
    monkeypatch.setattr(_curvature, "CACHE_BYTES", 2**30 if kept else 0)
    problem = oracles.problem()
    gradient = Partial(gradient_of_the_loss, problem.batch)
    operator = curvature.from_gradient(gradient, problem.params)
    assert (operator.linear_map is not None) == kept
    expected = oracles.dense_hessian(oracles.loss_fn, *problem_args(problem))
    np.testing.assert_allclose(operator.dense(), expected, rtol=1e-4, atol=1e-5)


def gradient_of_the_loss(batch, params):
    return jax.grad(oracles.loss_fn)(params, *batch)


def test_error_texts():
    problem = oracles.problem()
    params, batch = problem.params, problem.batch
    with pytest.raises(ValueError, match=r"`loss_fn` must return a scalar.*shape \(23, 3\)"):
        curvature.hessian(lambda p, x, y: oracles.model_fn(p, x), params, *batch)
    with pytest.raises(TypeError, match=r"`params\['w'\]` must be real floating point, got int32"):
        curvature.hessian(lambda p: jnp.sum(p["w"]), {"w": jnp.arange(3)})
    with pytest.raises(ValueError, match="`chunk_size` must be at least 1, got 0"):
        curvature.hessian(oracles.loss_fn, params, *batch, chunk_size=0)
    with pytest.raises(TypeError, match=r"`chunk_size` must be a Python integer, got 2.5"):
        curvature.hessian(oracles.loss_fn, params, *batch, chunk_size=2.5)
    operator = curvature.hessian(oracles.loss_fn, params, *batch)
    with pytest.raises(ValueError, match="`vector` must have the tree structure"):
        operator.matvec({"first": params["first"]})
    with pytest.raises(ValueError, match=r"must have shape \(5, 6\), got \(6, 5\)"):
        operator.matvec({**params, "first": {**params["first"], "kernel": jnp.zeros((6, 5))}})
    with pytest.raises(ValueError, match="`batch` must have one leading axis"):
        curvature.hessian(
            lambda p, x, s: oracles.loss_fn(p, x, batch[1]) + s, params, batch[0], 1.0, chunk_size=4
        )
    with pytest.raises(ValueError, match="`dense` must have at most"):
        curvature.from_matvec(lambda v: v, jnp.zeros(40_000)).dense()


def problem_args(problem):
    return problem.params, *problem.batch


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


RANDOM_MATRIX = jnp.asarray(np.random.default_rng(5).normal(size=(30, 30)), jnp.float32)


@pytest.mark.parametrize(
    ("matvec", "text"),
    [
        (lambda v: RANDOM_MATRIX @ v, "symmetric"),
        (lambda v: (RANDOM_MATRIX + RANDOM_MATRIX.T) @ v + 0.1 * RANDOM_MATRIX @ v, "symmetric"),
        (lambda v: jnp.roll(v, 1), "symmetric"),
        (lambda v: v * jnp.linalg.norm(v), "linear"),
        (lambda v: v + 1, "linear"),
        (jnp.abs, "linear"),
    ],
)
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_a_product_that_is_no_symmetric_matrix_is_refused(matvec, text, size):
    with pytest.raises(ValueError, match=f"`matvec` must be {text}, got"):
        curvature.from_matvec(lambda v: size * matvec(v), jnp.zeros(30))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1e-25, 1.0, 1e25])
def test_rounding_makes_no_product_unsymmetric(dtype, size):
    matrix = (size * (RANDOM_MATRIX + RANDOM_MATRIX.T)).astype(dtype)
    for example in (jnp.zeros(30, dtype), jnp.zeros(30)):
        curvature.from_matvec(lambda v: matrix @ v.astype(dtype), example)
    curvature.from_matvec(lambda v: 0 * v, jnp.zeros(3))
    curvature.from_matvec(lambda v: jnp.nan * v, jnp.zeros(3))
