import jax
import jax.numpy as jnp
import numpy as np
import pytest

from regjax import curvature
from regjax._space import Space
from regjax.curvature import _krylov
from regjax.curvature._engine import _basis
from tests import oracles


def tridiagonal(result):
    steps = int(result.num_steps)
    alphas, betas = np.asarray(result.alphas)[:steps], np.asarray(result.betas)[: steps - 1]
    return np.diag(alphas) + np.diag(betas, 1) + np.diag(betas, -1)


def operator(matvec, size):
    return curvature.from_matvec(matvec, jnp.zeros(size))


def start(size, seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=size), jnp.float32)


@pytest.mark.parametrize("num_steps", [1, 2, 13, 60])
def test_the_recurrence_holds(num_steps):
    matrix = oracles.symmetric(np.linspace(-1, 4, 60) ** 3 / 16)
    result = curvature.lanczos(operator(oracles.matvec_of(matrix), 60), start(60), num_steps)
    basis = np.asarray(result.basis, np.float64)
    remainder = matrix @ basis.T - basis.T @ tridiagonal(result)
    expected = np.zeros((60, num_steps))
    expected[:, -1] = result.residual
    np.testing.assert_allclose(remainder, expected, atol=5e-6)
    np.testing.assert_allclose(basis @ basis.T, np.eye(num_steps), atol=2e-6)
    np.testing.assert_allclose(basis[0], start(60) / np.linalg.norm(start(60)), atol=1e-6)


@pytest.mark.parametrize("key", [None, jax.random.key(5)], ids=["stops", "goes on"])
def test_rank_deficient_matrix_has_no_spurious_eigenvalues(key):
    # One pass of Gram-Schmidt, or none, gives 21 to 37 eigenvalues above one half.
    random = np.random.default_rng(0)
    range_basis = np.linalg.qr(random.normal(size=(2000, 20)))[0]
    matrix = (range_basis * np.arange(1, 21)) @ range_basis.T
    result = curvature.lanczos(operator(oracles.matvec_of(matrix), 2000), start(2000), 40, key=key)
    values = np.linalg.eigvalsh(tridiagonal(result))
    assert np.sum(values > 0.5) == 20
    np.testing.assert_allclose(values[values > 0.5], np.arange(1, 21), rtol=1e-5)
    steps = int(result.num_steps)
    assert steps == 40 if key is not None else 20 <= steps < 40
    basis = np.asarray(result.basis)[:steps]
    np.testing.assert_allclose(basis @ basis.T, np.eye(steps), atol=2e-6)


def test_breakdown_at_once_is_not_divided_by():
    result = curvature.lanczos(operator(lambda v: 3 * v, 50), start(50), 10)
    assert int(result.num_steps) == 1
    assert float(result.alphas[0]) == pytest.approx(3, rel=1e-6)
    assert np.all(np.isfinite(result.basis))
    zero = curvature.lanczos(operator(lambda v: 0 * v, 50), start(50), 10, key=jax.random.key(0))
    np.testing.assert_array_equal(zero.alphas, np.zeros(10))
    np.testing.assert_allclose(zero.basis @ zero.basis.T, np.eye(10), atol=2e-6)


def test_compiled_loop_gives_the_host_driven_result():
    matrix = oracles.symmetric(np.linspace(0, 1, 40))
    of_matrix = operator(oracles.matvec_of(matrix), 40)
    solve = jax.jit(lambda operator, start: curvature.lanczos(operator, start, 15))
    for ours, theirs in zip(
        curvature.lanczos(of_matrix, start(40), 15), solve(of_matrix, start(40)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_starts_and_states_are_trees_and_the_callers_arrays_survive():
    like = {"a": start(3), "b": start(4, seed=2).reshape(2, 2).astype(jnp.bfloat16)}
    key = jax.random.key(0)
    result = curvature.lanczos(
        curvature.from_matvec(lambda t: jax.tree.map(lambda x: 2 * x, t), like), like, 3, key=key
    )
    # As wide as vectors are: half a mantissa would leave the rows nowhere near orthonormal.
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), (result.basis, result.residual))
    wide = jnp.dtype(jnp.float32)
    assert shapes == (
        {"a": ((3, 3), wide), "b": ((3, 2, 2), wide)}, {"a": ((3,), wide), "b": ((2, 2), wide)}
    )  # fmt: skip
    rows = jnp.concatenate([leaf.reshape(3, -1) for leaf in result.basis.values()], 1)
    np.testing.assert_allclose(rows @ rows.T, np.eye(3), atol=2e-6)
    assert not like["a"].is_deleted()
    assert not jax.random.key_data(key).is_deleted()


def test_callback_counts_steps():
    calls = []
    curvature.lanczos(
        operator(lambda v: v * jnp.arange(9.0), 9),
        start(9),
        4,
        callback=lambda *c: calls.append(c[:2]),
    )
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_compile_time_does_not_grow_with_the_steps(monkeypatch):
    # The program of a step is the same text from ten blocks of rows on, but for the sizes.
    def lines(num_steps):
        space = Space.of(jnp.zeros(5_000))
        krylov = _krylov.empty(space, start(5_000), num_steps, jax.random.key(0))
        return len(jax.jit(_krylov.expand).lower(krylov, start(5_000)).as_text().splitlines())

    monkeypatch.setattr(_basis, "_SMALL", 0)
    monkeypatch.setattr(_basis, "_MIDDLE", 0)
    in_ten = lines(160)
    assert lines(128) < in_ten == lines(1280) == lines(2560)
    # Of small ones there are fewer blocks.
    monkeypatch.setattr(_basis, "_MIDDLE", 2**23)
    in_four = lines(127)
    monkeypatch.setattr(_basis, "_SMALL", 2**21)
    assert lines(129) < in_four < in_ten


def test_error_texts():
    with pytest.raises(ValueError, match=r"`num_steps` must be between 1 and 4 \(.*\), got 5"):
        curvature.lanczos(operator(lambda v: v, 4), start(4), 5)
    with pytest.raises(ValueError, match=r"`start` must have shape \(4,\), got \(5,\)"):
        curvature.lanczos(operator(lambda v: v, 4), start(5), 2)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        curvature.lanczos(operator(lambda v: v, 4), start(4), 2, key=0)


@pytest.mark.parametrize("num_steps", [3, 6])
def test_ritz_pairs_are_those_of_the_tridiagonal_matrix(num_steps):
    eigenvalues = jnp.asarray([5.0, -2.0, 1.0, 0.5, 0.0, 0.0])
    start = jnp.asarray([1.0, 2.0, 1.0, 0.0, 0.0, 0.0])
    run = curvature.lanczos(operator(lambda v: eigenvalues * v, 6), start, num_steps)
    pairs = curvature.ritz_pairs(run)
    # The start has three eigenvectors in it: beyond, there is no step.
    values = np.asarray(pairs.values)[-3:]
    np.testing.assert_allclose(values, [-2, 1, 5], atol=1e-5)
    # What stands for the other steps is a value too, of no weight.
    np.testing.assert_array_equal(pairs.values[: num_steps - 2], pairs.values[num_steps - 3])
    np.testing.assert_array_equal(
        pairs.residual_norms[: num_steps - 2], pairs.residual_norms[num_steps - 3]
    )
    np.testing.assert_allclose(pairs.weights[-3:], np.asarray([4, 1, 1]) / 6, atol=1e-6)
    assert not np.any(pairs.weights[:-3])
    np.testing.assert_allclose(np.abs(run.basis.T @ pairs.vectors[:, -1]), np.eye(6)[0], atol=1e-5)


def test_ritz_residuals_are_those_of_the_matrix():
    matrix = np.diag(np.arange(1.0, 9.0)).astype(np.float32)
    run = curvature.lanczos(operator(lambda v: jnp.asarray(matrix) @ v, 8), jnp.ones(8), 4)
    pairs = curvature.ritz_pairs(run)
    vectors = np.asarray(run.basis.T @ pairs.vectors)
    residuals = matrix @ vectors - vectors * np.asarray(pairs.values)[None]
    found = np.linalg.norm(residuals, axis=0)
    # Bounds, with 8 units of rounding of a product and 2.5 sqrt(4) of the rows, of a matrix of 8.
    assert np.all(found <= pairs.residual_norms)
    np.testing.assert_allclose(pairs.residual_norms, found, atol=14 * 8 * 1.2e-7)
    assert np.all(np.asarray(pairs.residual_norms) > 1e-2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "must not be zero"), (np.nan, "finite, got NaN"), (np.inf, "infinity")],
)
def test_a_start_that_is_no_direction(value, text):
    matrix, first = operator(lambda v: 2 * v, 6), jnp.full(6, value)
    with pytest.raises(ValueError, match=f"`start`.*{text}"):
        curvature.lanczos(matrix, first, 3)
    traced = jax.jit(lambda first: curvature.lanczos(matrix, first, 3))(first)
    assert np.isnan(traced.alphas[0])
