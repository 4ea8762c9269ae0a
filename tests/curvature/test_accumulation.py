"""Inner products that are summed exactly enough, and products that are not exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from regjax import _jaxprs, curvature
from regjax._space import Space
from regjax.curvature._engine import _accumulation
from tests import oracles

RANDOM = np.random.default_rng(0)


def sums(rows, vector, accumulation):
    return _accumulation.inner_products(Space.of(vector), rows, vector, accumulation)


@pytest.mark.parametrize("size", [5, 2047, 2048, 3001, 70_000, 300_001])
def test_inner_products_are_those_of_numpy(size):
    rows, vector = RANDOM.normal(size=(3, size)), RANDOM.normal(size=size)
    rows, vector = rows.astype(np.float32), vector.astype(np.float32)
    exact = rows.astype(np.float64) @ vector.astype(np.float64)
    largest = np.linalg.norm(rows, axis=1).max() * np.linalg.norm(vector)
    for accumulation in (None, "compensated"):
        found = sums(jnp.asarray(rows), jnp.asarray(vector), accumulation)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, exact, atol=2e-7 * largest)
    with jax.enable_x64(True):
        found = sums(jnp.asarray(rows), jnp.asarray(vector), "float64")
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, exact, atol=1e-13 * largest)


@pytest.mark.parametrize("size", [1_000, 300_000])
def test_compensation_keeps_what_float32_loses(size):
    """Next to one, terms of 2e-8 vanish; one and minus one leave them alone."""
    terms = np.full(size, 2e-8, np.float32)
    terms[: size // 3], terms[size // 3 : 2 * (size // 3)] = 1, -1
    exact = terms.astype(np.float64).sum()
    found = sums(jnp.asarray(terms)[None], jnp.ones(size), "compensated")
    np.testing.assert_allclose(found, [exact], rtol=1e-5)


def spiked(size):
    """Eigenvalues of a diagonal matrix whose leading eigenvectors live on ten parameters."""
    values = np.minimum(np.abs(RANDOM.standard_cauchy(size)) * 1e-3, 0.5)
    values[:10] = np.linspace(1, 10, 10)
    return values.astype(np.float32)


@pytest.mark.parametrize("accumulation", [None, "compensated", "float64"])
def test_among_many_parameters_rows_stay_orthogonal_and_bounds_hold(accumulation):
    # With a matrix product for each block of rows: 1e-4, and values off by 3e-6 of the largest.
    size = 300_000
    values = spiked(size)
    exact = np.sort(values)[::-1][:5].astype(np.float64)
    diagonal = jnp.asarray(values)
    operator = curvature.from_matvec(lambda v: diagonal * v, jnp.zeros(size))
    start = jnp.asarray(RANDOM.normal(size=size), jnp.float32)
    with jax.enable_x64(accumulation == "float64"):
        run = curvature.lanczos(operator, start, 20, accumulation=accumulation)
        found = curvature.top_eigenpairs(
            operator, 5, key=jax.random.key(0), tol=1e-6, accumulation=accumulation
        )
    basis = np.asarray(run.basis, np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(20), atol=1e-6)
    assert run.basis.dtype == found.vectors.dtype == jnp.float32
    wide = jnp.float64 if accumulation == "float64" else jnp.float32
    assert run.alphas.dtype == found.values.dtype == found.residual_norms.dtype == wide
    assert np.all(found.converged)
    error = np.abs(np.asarray(found.values, np.float64) - exact)
    assert np.all(error <= np.asarray(found.residual_norms))


def test_float64_sums_give_float64_pairs():
    """Of products that are exact; what is left is the rounding of the rows' elements."""
    size = 5_000
    integers = np.concatenate([[64.0, 32, 16], np.zeros(size - 3)])
    diagonal = jnp.asarray(integers, jnp.float32)
    start = jnp.asarray(np.concatenate([[1.0, 1, 1], np.zeros(size - 3)]), jnp.float32)
    with jax.enable_x64(True):
        operator = curvature.from_matvec(lambda v: diagonal * v, diagonal)
        run = curvature.lanczos(operator, start, 3, accumulation="float64")
        pairs = curvature.ritz_pairs(run)
    assert pairs.values.dtype == jnp.float64
    np.testing.assert_allclose(np.asarray(pairs.values), [16, 32, 64], rtol=1e-7)


@pytest.mark.parametrize("accumulation", ["compensated", "float64"])
def test_density_with_it_is_the_same_density(accumulation):
    matrix = oracles.symmetric(np.concatenate([[50.0, 40, -30], np.linspace(0, 1, 97)]))
    operator = curvature.from_matvec(oracles.matvec_of(matrix), jnp.zeros(100))
    options = {"key": jax.random.key(0), "num_steps": 12, "deflate": 10}
    plain = curvature.spectral_density(operator, **options)
    with jax.enable_x64(accumulation == "float64"):
        found = curvature.spectral_density(operator, accumulation=accumulation, **options)
    assert found.nodes.dtype == (jnp.float64 if accumulation == "float64" else jnp.float32)
    np.testing.assert_allclose(found.eigenvalues[:2], [50, 40], rtol=1e-5)
    np.testing.assert_allclose(found.trace, plain.trace, rtol=1e-4)


def test_errors_of_accumulation():
    operator = curvature.from_matvec(lambda v: v, jnp.zeros(4))
    with pytest.raises(ValueError, match=r"`accumulation` must be one of .*, got 'kahan'"):
        curvature.top_eigenpairs(operator, 1, key=jax.random.key(0), accumulation="kahan")
    with pytest.raises(ValueError, match=r"unless JAX may use float64 .*, got 'float64'"):
        curvature.lanczos(operator, jnp.ones(4), 2, accumulation="float64")


def loss_fn(params, x, y):
    """In the type of the parameters, the loss in that of the targets."""
    hidden = jnp.tanh(x.astype(params["a"].dtype) @ params["a"])
    residual = (hidden @ params["b"]).astype(y.dtype) - y
    return jnp.mean(jnp.sum(residual**2, 1))


def narrow_inside(params, x, y):
    """float32 parameters, bfloat16 arithmetic."""
    return loss_fn(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params), x, y)


def network():
    """Parameters that bfloat16 has, and a batch."""
    shapes = {"a": (12, 16), "b": (16, 4)}
    params = {
        name: jnp.asarray(RANDOM.normal(size=shape) / 3, jnp.bfloat16).astype(jnp.float32)
        for name, shape in shapes.items()
    }
    x = jnp.asarray(RANDOM.normal(size=(64, 12)), jnp.bfloat16).astype(jnp.float32)
    y = jnp.asarray(RANDOM.normal(size=(64, 4)), jnp.float32)
    return params, x, y


@pytest.mark.parametrize("loss", [loss_fn, narrow_inside])
@pytest.mark.parametrize("streamed", [False, True])
def test_bfloat16_gives_the_leading_eigenvalues_within_its_bounds(loss, streamed):
    params, x, y = network()
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x, y))
        exact = curvature.exact_spectrum(curvature.hessian(loss_fn, *wide))[::-1][:4]
    if loss is loss_fn:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    if streamed:
        batches = [(x[:32], y[:32]), (x[32:], y[32:])]
        operator = curvature.stream(curvature.hessian, loss, params, batches)
    else:
        operator = curvature.hessian(loss, params, x, y)
    found = curvature.top_eigenpairs(operator, 4, key=jax.random.key(0))
    scale, unit = float(exact[0]), float(jnp.finfo(jnp.bfloat16).eps)
    assert np.all(found.converged)
    np.testing.assert_allclose(found.values, exact, atol=unit * scale)
    # Each lies within its bound, of the matrix of exact products too.
    np.testing.assert_allclose(found.residual_norms, 8 * unit * scale, rtol=0.05)
    if not streamed:
        density = curvature.spectral_density(operator, key=jax.random.key(1), num_steps=10)
        assert np.min(density.residual_norms[: int(density.num_eigenvalues)]) > 7 * unit * scale


@pytest.mark.parametrize("loss", [loss_fn, narrow_inside])
def test_ritz_pairs_have_the_floor_of_low_precision(loss):
    params, x, y = network()
    if loss is loss_fn:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    operator = curvature.hessian(loss, params, x, y)
    run = curvature.lanczos(operator, params, 20)
    unit = float(jnp.finfo(jnp.bfloat16).eps)
    assert float(run.eps) == unit
    pairs = curvature.ritz_pairs(run)
    # Of a converged pair; the residual alone is at the rounding of the vectors.
    largest = float(jnp.max(jnp.abs(pairs.values)))
    outside = float(optax.tree.norm(run.residual) * jnp.abs(pairs.vectors[-1, -1]))
    assert outside < unit * largest
    rows = 2.5 * np.sqrt(20) * float(jnp.finfo(jnp.float32).eps)
    expected = outside + (8 * unit + rows) * largest
    np.testing.assert_allclose(pairs.residual_norms[-1], expected, rtol=1e-6)


def test_the_narrowest_type_of_a_product():
    params, x, y = network()
    eps = lambda dtype: float(jnp.finfo(dtype).eps)
    find = lambda loss, **options: curvature.hessian(loss, params, x, y, **options).eps
    assert find(loss_fn) == eps(jnp.float32)
    assert find(narrow_inside) == eps(jnp.bfloat16)
    assert find(narrow_inside, chunk_size=16) == eps(jnp.bfloat16)
    half = lambda p, x, y: loss_fn(jax.tree.map(lambda leaf: leaf.astype(jnp.float16), p), x, y)
    assert find(half) == eps(jnp.float16)
    # Inside of jit as outside.
    operator = curvature.hessian(narrow_inside, params, x, y)
    inside = jax.jit(lambda o: curvature.top_eigenpairs(o, 2, key=jax.random.key(0)))(operator)
    assert np.all(inside.residual_norms > 7 * eps(jnp.bfloat16) * inside.values[0])


def test_matrix_products_beside_those_with_the_matrix_are_full_float32():
    """On accelerators the default is TF32 or bfloat16."""
    operator = curvature.from_matvec(lambda v: v * jnp.arange(30.0), jnp.zeros(30))
    key, highest = jax.random.key(0), jax.lax.Precision.HIGHEST
    solvers = {
        "eigenpairs": lambda o: curvature.top_eigenpairs(o, 3, key=key, max_basis=8),
        "density": lambda o: curvature.spectral_density(o, key=key, num_steps=5),
        "ritz": lambda o: curvature.ritz_pairs(curvature.lanczos(o, jnp.ones(30), 5)),
        "trace": lambda o: curvature.trace(o, key=key, num_matvecs=6, method="hutch++"),
    }
    for name, solve in solvers.items():
        traced = jax.make_jaxpr(solve)(operator)
        found = [
            equation.params["precision"]
            for equation in _jaxprs.equations(traced.jaxpr)
            if equation.primitive.name == "dot_general"
        ]
        assert found, name
        assert all(precision == (highest, highest) for precision in found), name


def test_looking_for_the_type_warns_of_nothing():
    """In chunks, convolutions in a compiled loop would."""
    kernel = {"k": jnp.ones((3, 3, 1, 1))}

    def loss(params, x):
        return jnp.mean(jax.lax.conv(x, params["k"].transpose(2, 3, 0, 1), (1, 1), "SAME") ** 2)

    operator = curvature.hessian(loss, kernel, jnp.ones((20, 1, 4, 4)), chunk_size=1)
    assert operator.eps == float(jnp.finfo(jnp.float32).eps)
