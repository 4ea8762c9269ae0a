import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate

import regjax
from regjax import curvature
from tests import oracles


def random_matrix(size=9):
    return oracles.symmetric(np.linspace(-1, 2, size))


LIKE = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(5)}
PLACES = {"a": slice(0, 4), "b": slice(4, 9)}


def operator_of(matrix):
    flat, unravel = jax.flatten_util.ravel_pytree(LIKE)
    multiply = lambda matrix, tree: unravel(matrix @ jax.flatten_util.ravel_pytree(tree)[0])
    product = jax.tree_util.Partial(multiply, jnp.asarray(matrix, flat.dtype))
    return curvature.from_matvec(product, LIKE)


def test_the_share_outside_of_the_blocks_is_that_of_the_dense_matrix():
    matrix = random_matrix()
    blocks = np.zeros_like(matrix)
    for place in PLACES.values():
        blocks[place, place] = matrix[place, place]
    key = jax.random.key(0)
    result = jax.jit(
        lambda operator: curvature.off_diagonal_share(operator, key=key, num_probes=6)
    )(operator_of(matrix))
    vectors = np.asarray(operator_of(matrix).space.normal(key, 6), np.float64)
    shares = np.linalg.norm(vectors @ (matrix - blocks), axis=1)
    shares = shares / np.linalg.norm(vectors @ matrix, axis=1)
    assert float(result.value) == pytest.approx(shares.mean(), rel=1e-5)
    assert float(result.standard_error) == pytest.approx(shares.std(ddof=1) / np.sqrt(6), rel=1e-4)
    assert int(result.num_matvecs) == 6


def test_a_block_diagonal_matrix_and_a_single_block_have_nothing_outside():
    matrix = random_matrix()
    matrix[:4, 4:], matrix[4:, :4] = 0, 0
    result = curvature.off_diagonal_share(operator_of(matrix), key=jax.random.key(0))
    assert float(result.value) < 1e-6
    alone = curvature.from_matvec(oracles.matvec_of(random_matrix()), jnp.zeros(9))
    result = curvature.off_diagonal_share(alone, key=jax.random.key(0), num_probes=1)
    assert float(result.value) < 1e-6
    assert np.isnan(result.standard_error)
    zero = curvature.off_diagonal_share(0 * operator_of(matrix), key=jax.random.key(0))
    assert float(zero.value) == 0


def test_blocks_of_stacked_layers_are_taken_apart():
    matrix = oracles.symmetric(np.linspace(-1, 2, 6))
    like = {"layers": jnp.zeros((3, 2))}
    multiply = oracles.matvec_of(matrix)
    operator = curvature.from_matvec(
        lambda tree: {"layers": multiply(tree["layers"].reshape(6)).reshape(3, 2)}, like
    )
    key, blocks = jax.random.key(0), np.kron(np.eye(3), np.ones((2, 2))) * matrix
    vectors = np.asarray(operator.space.normal(key, 4), np.float64)
    shares = np.linalg.norm(vectors @ (matrix - blocks), axis=1)
    shares = shares / np.linalg.norm(vectors @ matrix, axis=1)
    result = curvature.off_diagonal_share(
        operator, key=key, num_probes=4, depth=2, layout=regjax.Layout(stack=0)
    )
    assert float(result.value) == pytest.approx(shares.mean(), rel=1e-5)


@functools.cache
def any_density():
    operator = curvature.from_matvec(lambda v: v, jnp.zeros(1))
    return curvature.spectral_density(operator, key=jax.random.key(0), num_steps=1, num_probes=1)


def point(*values):
    """A density of which all eigenvalues are known."""
    count = len(values)
    return any_density()._replace(
        eigenvalues=jnp.asarray(values, jnp.float32),
        eigenvalue_weights=jnp.full(count, 1 / count),
        residual_norms=jnp.zeros(count),
        num_eigenvalues=jnp.int32(count),
        size=jnp.int32(count),
    )


@pytest.fixture(scope="module")
def points():
    return {"0": point(0.0), "1": point(1.0), "both": point(0.0, 1.0)}


def gaussian_distance(apart, width):
    """The distance of two Gaussians by quadrature."""
    top = 1 / (width * np.sqrt(2 * np.pi))
    p = lambda x: top * np.exp(-0.5 * (x / width) ** 2)
    q = lambda x: p(x - apart)

    def integrand(x):
        middle = (p(x) + q(x)) / 2
        return 0.5 * sum(f(x) * np.log2(f(x) / middle) for f in (p, q) if f(x) > 0)

    value = integrate.quad(integrand, -8 * width, apart + 8 * width, limit=200)[0]
    return np.sqrt(value)


@pytest.mark.parametrize("width", [0.2, 0.5, 2.0])
def test_two_gaussians_by_quadrature(points, width):
    pair = {name: points[name] for name in ("0", "1")}
    result = curvature.density_distances(pair, kernel_width=width)
    right = gaussian_distance(1.0, width)
    np.testing.assert_allclose(result.value, [[0, right], [right, 0]], rtol=2e-3, atol=1e-7)
    assert float(result.mean) == pytest.approx(right, rel=2e-3)
    np.testing.assert_array_equal(result.standard_error, 0)
    step = np.diff(np.asarray(result.grid))
    masses = np.sum(np.asarray(result.density)[:, 1:] * step, 1)
    np.testing.assert_allclose(masses, 1, rtol=1e-3)


def test_densities_without_a_common_place_are_at_distance_one(points):
    result = curvature.density_distances(points)
    assert float(result.value[0, 1]) == pytest.approx(1, abs=1e-6)
    # Of p and (p + q) / 2 the divergence is known in closed form.
    divergence = 0.5 * (np.log2(4 / 3) + 0.5 * np.log2(2 / 3) + 0.5)
    assert float(result.value[0, 2]) == pytest.approx(np.sqrt(divergence), rel=1e-4)
    np.testing.assert_array_equal(result.value, result.value.T)


def test_the_error_of_a_distance_is_that_of_the_draw():
    ones, others = (oracles.symmetric(values, seed) for seed, values in
                    enumerate((np.linspace(-1, 1, 60), np.linspace(-0.5, 2, 60))))  # fmt: skip
    options = {"num_steps": 8, "num_probes": 3, "deflate": 0}
    solve = jax.jit(
        lambda matrix, key: curvature.spectral_density(
            curvature.from_matvec(oracles.matvec_of(matrix), matrix[0]), key=key, **options
        )
    )
    matrices = [jnp.asarray(matrix, jnp.float32) for matrix in (ones, others)]
    found = []
    for seed in range(12):
        keys = jax.random.split(jax.random.key(seed))
        pair = {str(i): solve(matrices[i], keys[i]) for i in range(2)}
        found.append(curvature.density_distances(pair, kernel_width=0.3))
    values = np.array([result.value[0, 1] for result in found])
    errors = np.array([result.standard_error[0, 1] for result in found])
    assert 0.5 < np.sqrt(np.mean(errors**2)) / values.std(ddof=1) < 2


def test_on_a_symlog_axis_scales_near_zero_are_told_apart():
    pair = {"small": point(1e-3), "smaller": point(1e-2), "large": point(1.0)}
    linear = curvature.density_distances(pair)
    symlog = curvature.density_distances(pair, axis_scale="symlog", linear_threshold=1e-4)
    assert float(linear.value[0, 1]) < 0.6
    assert float(symlog.value[0, 1]) > 0.99


def test_error_texts(points):
    operator = curvature.from_matvec(lambda v: v, jnp.zeros(3))
    with pytest.raises(ValueError, match="`num_probes` must be at least 1, got 0"):
        curvature.off_diagonal_share(operator, key=jax.random.key(0), num_probes=0)
    with pytest.raises(ValueError, match="`depth` must be at least 1, got 0"):
        curvature.off_diagonal_share(operator, key=jax.random.key(0), depth=0)
    with pytest.raises(ValueError, match="`densities` must have at least one density, got none"):
        curvature.density_distances({})
    with pytest.raises(ValueError, match="`kernel_width` must be positive, got 0"):
        curvature.density_distances(points, kernel_width=0.0)
    with pytest.raises(ValueError, match=r"`num_points` must be at least \d+ for this `kernel_wi"):
        curvature.density_distances(points, kernel_width=1e-4)
    with pytest.raises(ValueError, match="`axis_scale` must be one of linear, symlog"):
        curvature.density_distances(points, axis_scale="log")
