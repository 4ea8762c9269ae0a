"""Laws against random matrices of the kinds they are about; the noise power against NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree

import regjax
from regjax import curvature, models
from tests import oracles

RANDOM = np.random.default_rng(0)


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def goe(size, random, variance=1.0):
    """A symmetric matrix of normal elements of that variance, twice that on the diagonal."""
    noise = random.normal(size=(size, size)) * np.sqrt(variance / 2)
    return noise + noise.T


def quadratic(params, matrices):
    """Mean over the examples of w' H_i w / 2."""
    w = jnp.concatenate([params["a"], params["b"].ravel()])
    return 0.5 * jnp.mean(jnp.einsum("nij,i,j->n", matrices, w, w, precision="highest"))


def quadratic_problem(num_examples, size, dtype=np.float64):
    matrices = np.stack([goe(size, RANDOM) for _ in range(num_examples)])
    tree = lambda flat: {
        "a": jnp.asarray(flat[:1], dtype),
        "b": jnp.asarray(flat[1:].reshape(-1, 2), dtype),
    }
    return matrices, tree


@pytest.mark.parametrize(("upper", "lower"), [(1.5, 3.0), (3.0, 1.5), (0.5, 0.5)])
def test_wigner_law_of_both_ends(upper, lower):
    size, batch_size, random = 600, 64, np.random.default_rng(1)
    edge = np.sqrt(size / batch_size)
    matrix = goe(size, random, 1 / batch_size)
    matrix[0, 0] += upper * edge
    matrix[1, 1] -= lower * edge
    measured = np.linalg.eigvalsh(matrix)
    law = curvature.batch_extreme_eigenvalues(
        upper * edge, -lower * edge, noise_power=1.0 * size, batch_size=batch_size
    )
    np.testing.assert_allclose(law, (measured[-1], measured[0]), rtol=0.02)
    if upper == 0.5:
        np.testing.assert_allclose(law, (2 * edge, -2 * edge), rtol=1e-6)


def test_wigner_law_of_the_table():
    edge = np.sqrt(1500 / 64)
    law = curvature.batch_extreme_eigenvalues(
        jnp.asarray([1.5, 3.0]) * edge, -edge / 2, noise_power=1500.0, batch_size=64
    )
    np.testing.assert_allclose(law.largest, [10.489, 16.137], rtol=1e-4)
    np.testing.assert_allclose(law.smallest, [-9.682, -9.682], rtol=1e-4)


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_marchenko_pastur_law_of_both_ends(ratio):
    size, random = 600, np.random.default_rng(2)
    rows = random.normal(size=(int(size / ratio), size))
    noise = rows.T @ rows / len(rows)
    law = functools.partial(curvature.marchenko_pastur_outlier, num_params=size)
    predict = functools.partial(
        curvature.batch_extreme_eigenvalues, noise_power=1.0 * size, batch_size=len(rows), law=law
    )
    spiked = noise.copy()
    spiked[0, 0] += 6.0
    spiked[1, 1] -= 3.0
    measured = np.linalg.eigvalsh(spiked)
    np.testing.assert_allclose(predict(6.0, -3.0), (measured[-1], measured[0]), rtol=0.03)
    measured = np.linalg.eigvalsh(noise)
    edges = predict(0.0, 0.0)
    np.testing.assert_allclose(edges.largest, measured[-1], rtol=0.02)
    np.testing.assert_allclose(edges.smallest, measured[0], rtol=0.1, atol=1e-6)


def test_marchenko_pastur_law_of_the_table():
    law = functools.partial(curvature.marchenko_pastur_outlier, num_params=1000)
    found = curvature.batch_extreme_eigenvalues(
        jnp.asarray([1.6, 3.0, 8.0, 1.21, 1.2]), 0.0, noise_power=1e3, batch_size=2000, law=law
    )
    # 1.21 is above the threshold c + sqrt(c) = 1.2071, where the outlier leaves the edge 2.914.
    np.testing.assert_allclose(found.largest[:3], [3.0545, 4.2, 9.0667], rtol=1e-4)
    edge = (1 + np.sqrt(0.5)) ** 2
    np.testing.assert_allclose(found.largest[4], edge, rtol=1e-6)
    np.testing.assert_allclose(found.largest[3], 1.21 + 1 / (1 - 0.5 / 1.21), rtol=1e-6)
    assert found.largest[3] > edge


def test_averages_of_random_hessians_follow_the_measured_noise_power():
    size, num_examples, random = 151, 120, np.random.default_rng(3)
    matrices, tree = quadratic_problem(num_examples, size, np.float32)
    matrices[:, 0, 0] += 9.0
    hessians, whole = jnp.asarray(matrices, jnp.float32), np.linalg.eigvalsh(matrices.mean(0))[-1]
    direction = tree(random.normal(size=size))
    noise = curvature.hessian_noise_power(quadratic, direction, direction, hessians)
    # The variance of an element is 1: the noise power is the number of parameters.
    assert abs(noise.value - size) < 5 * noise.standard_error < 0.1 * size
    sizes = [6, 12, 24, 48]
    law = curvature.batch_extreme_eigenvalues(
        whole,
        0.0,
        noise_power=noise.value,
        batch_size=np.asarray(sizes),
        num_examples=num_examples,
    )
    for batch_size, predicted in zip(sizes, law.largest, strict=True):
        draws = [
            np.linalg.eigvalsh(
                matrices[random.choice(num_examples, batch_size, replace=False)].mean(0)
            )[-1]
            for _ in range(12)
        ]
        assert abs(np.mean(draws) - predicted) < 0.02 * predicted


def test_variance_of_a_batch_by_enumeration(double):
    values, size = RANDOM.normal(size=10), 4
    means = [np.mean(subset) for subset in itertools.combinations(values, size)]
    law = curvature.batch_extreme_eigenvalues(
        2.0,
        -2.0,
        noise_power=values.var(),
        batch_size=size,
        num_examples=10,
        law=curvature.additive_outlier,
    )
    np.testing.assert_allclose((law.largest - 2) * 2, np.var(means), rtol=1e-12)
    np.testing.assert_allclose(law.smallest, -law.largest, rtol=1e-12)


def test_laws_agree_where_they_should_and_say_where_they_hold(double):
    predict = functools.partial(
        curvature.batch_extreme_eigenvalues, batch_size=jnp.asarray([4, 64]), num_examples=64
    )
    wigner = predict(5.0, -0.1, noise_power=40.0)
    additive = predict(5.0, -0.1, noise_power=40.0, law=curvature.additive_outlier)
    np.testing.assert_allclose(additive.largest, wigner.largest, rtol=1e-14)
    # The whole set has no noise.
    np.testing.assert_allclose([wigner.largest[1], wigner.smallest[1]], [5.0, -0.1], rtol=1e-14)
    # Without the regime check the other end, inside of the noise, is far off: by p / (b 0.1).
    factor = 60 / (4 * 63)
    np.testing.assert_allclose(additive.smallest[0], -0.1 - 40 * factor / 0.1, rtol=1e-14)
    np.testing.assert_allclose(wigner.smallest[0], -2 * np.sqrt(40 * factor), rtol=1e-14)
    none = predict(0.0, 0.0, noise_power=40.0, law=curvature.additive_outlier)
    assert np.all(np.isnan(none))


@pytest.mark.parametrize("chunk_size", [None, 3, 100])
def test_noise_power_is_that_of_numpy(chunk_size, double):
    matrices, tree = quadratic_problem(11, 7)
    matrices += 3 * np.eye(7)
    z = RANDOM.normal(size=7)
    noise = jax.jit(
        lambda *arguments: curvature.hessian_noise_power(
            quadratic, *arguments, chunk_size=chunk_size
        )
    )(tree(RANDOM.normal(size=7)), tree(5 * z), jnp.asarray(matrices))
    z /= np.linalg.norm(z)
    images = matrices @ z
    squares = np.sum((images - images.mean(0)) ** 2, 1)
    power = np.mean(np.sum(images**2, 1)) - np.sum(images.mean(0) ** 2)
    np.testing.assert_allclose(noise.value, power, rtol=1e-12)
    np.testing.assert_allclose(noise.value, squares.mean(), rtol=1e-12)
    np.testing.assert_allclose(noise.standard_error, squares.std(ddof=1) / np.sqrt(11), rtol=1e-12)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(jnp.tanh(linen.Dense(4)(x.reshape(len(x), -1))))


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_networks_of_either_kind(kind):
    inputs = jnp.asarray(RANDOM.normal(size=(9, 1, 5, 1)), jnp.float32)
    targets = jnp.asarray(RANDOM.integers(3, size=9), jnp.int32)
    if kind == "nnx":
        model = regjax.from_nnx(models.MLP((1, 5, 1), 3, width=4, depth=1, rngs=nnx.Rngs(0)))
    else:
        module = Linen()
        model = regjax.from_linen(module, module.init(jax.random.key(0), inputs))
    loss_fn = regjax.model_loss(model, oracles.cross_entropy)
    flat, unravel = ravel_pytree(model.params)
    direction = RANDOM.normal(size=flat.size)
    noise = curvature.hessian_noise_power(
        loss_fn, model.params, unravel(jnp.asarray(direction, jnp.float32)), inputs, targets,
        chunk_size=4,
    )  # fmt: skip
    one = jax.jit(lambda w, x, y: loss_fn(unravel(w), x[None], y[None]))
    hessians = jax.jit(jax.vmap(jax.hessian(one), (None, 0, 0)))(flat, inputs, targets)
    images = np.asarray(hessians) @ (direction / np.linalg.norm(direction))
    expected = np.mean(np.sum((images - images.mean(0)) ** 2, 1))
    np.testing.assert_allclose(noise.value, expected, rtol=1e-4)


LAWS = [
    curvature.wigner_outlier,
    curvature.additive_outlier,
    functools.partial(curvature.marchenko_pastur_outlier, num_params=100),
]


@pytest.mark.parametrize("law", LAWS)
def test_an_end_that_is_not_known_stays_so(law):
    predict = jax.jit(functools.partial(curvature.batch_extreme_eigenvalues, batch_size=8, law=law))
    known = predict(3.0, -2.0, noise_power=0.5)
    assert np.isnan(predict(jnp.nan, -2.0, noise_power=0.5).largest)
    assert float(predict(jnp.nan, -2.0, noise_power=0.5).smallest) == float(known.smallest)
    assert np.isnan(predict(3.0, jnp.nan, noise_power=0.5).smallest)
    assert np.isnan(predict(3.0, -2.0, noise_power=jnp.nan)).all()


def test_error_texts():
    matrices, tree = quadratic_problem(5, 3, np.float32)
    matrices, w = jnp.asarray(matrices, jnp.float32), tree(np.ones(3))

    def coupled(params, matrices):
        return quadratic(params, matrices)

    coupled.couples_examples = True
    with pytest.raises(ValueError, match="`loss_fn` must not couple the examples"):
        curvature.hessian_noise_power(coupled, w, w, matrices)
    with pytest.raises(ValueError, match="`loss_fn` must be the mean over independent examples"):
        curvature.hessian_noise_power(lambda p, m: 5 * quadratic(p, m) * len(m), w, w, matrices)
    with pytest.raises(ValueError, match="`direction` must have the tree structure"):
        curvature.hessian_noise_power(quadratic, w, w["a"], matrices)
    predict = functools.partial(curvature.batch_extreme_eigenvalues, 1.0, -1.0)
    with pytest.raises(ValueError, match="`noise_power` must be non-negative, got -1"):
        predict(noise_power=-1, batch_size=4)
    with pytest.raises(ValueError, match="`batch_size` must be positive, got 0"):
        predict(noise_power=1.0, batch_size=0)
    with pytest.raises(ValueError, match="`batch_size` must be at most `num_examples`, 3"):
        predict(noise_power=1.0, batch_size=4, num_examples=3)
    with pytest.raises(ValueError, match="`num_params` must be at least 1, got 0"):
        predict(
            noise_power=1.0,
            batch_size=4,
            law=functools.partial(curvature.marchenko_pastur_outlier, num_params=0),
        )
