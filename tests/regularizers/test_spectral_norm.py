"""Half the squared spectral norms against NumPy's singular values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import regjax
from regjax import regularizers

RANDOM = np.random.default_rng(0)
TALL, SQUARE, CONV = (RANDOM.normal(size=s) for s in ((7, 4), (4, 4), (3, 3, 2, 5)))
PARAMS = {"conv": {"kernel": CONV, "bias": np.ones(5)}, "tall": TALL, "wide": TALL.T, "one": SQUARE}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def params(dtype=jnp.float64):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), PARAMS)


def top(matrix):
    """sigma, u and v of the largest singular value."""
    left, values, right = np.linalg.svd(matrix)
    return values[0], left[:, 0], right[0]


def half_squares(*kernels):
    return sum(top(kernel.reshape(-1, kernel.shape[-1]))[0] ** 2 / 2 for kernel in kernels)


def test_value_and_gradient_are_those_of_numpy(double):
    penalty = jax.jit(jax.value_and_grad(regularizers.spectral_norm_penalty))
    value, grads = penalty(params())
    np.testing.assert_allclose(value, half_squares(CONV, TALL, TALL, SQUARE), rtol=1e-12)
    expected = {
        name: sigma * np.outer(u, v)
        for name, kernel in (("tall", TALL), ("wide", TALL.T), ("conv", CONV.reshape(18, 5)))
        for sigma, u, v in [top(kernel)]
    }
    np.testing.assert_allclose(grads["tall"], expected["tall"], atol=1e-12)
    np.testing.assert_allclose(grads["wide"], expected["wide"], atol=1e-12)
    np.testing.assert_allclose(grads["conv"]["kernel"].reshape(18, 5), expected["conv"], atol=1e-12)
    assert not np.any(grads["conv"]["bias"])


def test_gradient_agrees_with_finite_differences(double):
    step, at = 1e-5, params()
    direction = jax.tree.map(lambda leaf: RANDOM.normal(size=leaf.shape), at)
    along = lambda t: regularizers.spectral_norm_penalty(
        jax.tree.map(lambda a, b: a + t * b, at, direction)
    )
    slope = (along(step) - along(-step)) / (2 * step)
    grads = jax.grad(regularizers.spectral_norm_penalty)(at)
    inner = sum(
        np.sum(a * b) for a, b in zip(*map(jax.tree.leaves, (grads, direction)), strict=True)
    )
    np.testing.assert_allclose(inner, slope, rtol=1e-7)


def test_zeros_are_finite_and_equal_values_give_a_subgradient(double):
    for options in ({}, {"num_iterations": 3, "key": jax.random.key(0)}):
        penalty = functools.partial(regularizers.spectral_norm_penalty, **options)
        value, grads = jax.value_and_grad(penalty)([jnp.zeros((3, 2)), jnp.zeros((2, 2, 3, 4))])
        assert float(value) == 0
        assert all(np.all(np.asarray(leaf) == 0) for leaf in grads)
    # Half the squared norm is convex: no point lies below a supporting plane.
    grad = jax.grad(regularizers.spectral_norm_penalty)([2 * jnp.eye(3)])[0]
    np.testing.assert_allclose(np.linalg.svd(grad, compute_uv=False), [2, 0, 0], atol=1e-12)
    for _ in range(20):
        other = RANDOM.normal(size=(3, 3))
        plane = 2 + np.sum(np.asarray(grad) * (other - 2 * np.eye(3)))
        assert half_squares(other) >= plane - 1e-12


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)])
def test_power_iteration_is_a_lower_bound_that_converges(shape, double):
    kernel, key = RANDOM.normal(size=shape), jax.random.key(1)
    exact = half_squares(kernel)
    values = [
        float(
            regularizers.spectral_norm_penalty(
                [jnp.asarray(kernel)], num_iterations=number, key=key
            )
        )
        for number in (1, 3, 10, 300)
    ]
    assert all(np.diff(values) > 0)
    assert values[0] < 0.98 * exact  # far from converged, and not above
    assert values[-1] == pytest.approx(exact, rel=1e-10)
    # One iteration by hand, from any start: never above, and the gradient is sigma u v' of its v.
    many = jax.vmap(
        lambda key: regularizers.spectral_norm_penalty(
            [jnp.asarray(kernel)], num_iterations=1, key=key
        )
    )(jax.random.split(key, 100))
    assert np.max(many) <= exact * (1 + 1e-12)
    assert np.std(many) > 0.01 * exact


def test_power_iteration_gradient_holds_its_vector_fixed(double):
    penalty = functools.partial(
        regularizers.spectral_norm_penalty, num_iterations=2, key=jax.random.key(1)
    )
    value, grads = jax.jit(jax.value_and_grad(penalty))([jnp.asarray(TALL)])
    # W v v' for a unit v: of rank one, and <W, W v v'> = ||W v||^2.
    assert np.linalg.matrix_rank(grads[0], tol=1e-10) == 1
    np.testing.assert_allclose(np.sum(TALL * np.asarray(grads[0])), 2 * value, rtol=1e-12)
    np.testing.assert_allclose(np.sum(np.asarray(grads[0]) ** 2), 2 * value, rtol=1e-12)


def test_equal_kernels_start_from_different_vectors():
    same = [jnp.asarray(TALL, jnp.float32)] * 2
    penalty = functools.partial(
        regularizers.spectral_norm_penalty, num_iterations=1, key=jax.random.key(0)
    )
    assert abs(float(penalty(same)) - 2 * float(penalty(same[:1]))) > 1e-3


def test_mask_chooses_kernels(double):
    tree = params()
    mask = jax.tree.map(lambda leaf: leaf.shape == (4, 4), tree)
    value, grads = jax.value_and_grad(
        functools.partial(regularizers.spectral_norm_penalty, mask=mask)
    )(tree)
    np.testing.assert_allclose(value, half_squares(SQUARE), rtol=1e-12)
    assert not np.any(grads["tall"])
    nothing = jax.tree.map(lambda leaf: False, tree)
    assert float(regularizers.spectral_norm_penalty(tree, mask=nothing)) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_narrow_types_sum_in_float32(dtype):
    value, grads = jax.value_and_grad(regularizers.spectral_norm_penalty)(params(dtype))
    exact = half_squares(*(np.asarray(jnp.asarray(k, dtype), np.float64)
                           for k in (CONV, TALL, TALL, SQUARE)))  # fmt: skip
    assert value.dtype == jnp.float32
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(grads))
    np.testing.assert_allclose(value, exact, rtol=1e-5)


def test_flax_models():
    class Linen(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.Conv(4, (3, 3))(x).reshape(len(x), -1))

    class Nnx(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(1, 4, (3, 3), rngs=nnx.Rngs(0))
            self.dense = nnx.Linear(16, 3, rngs=nnx.Rngs(1))

        def __call__(self, x):
            return self.dense(self.conv(x).reshape(len(x), -1))

    module, x = Linen(), jnp.ones((2, 2, 2, 1))
    models = regjax.from_linen(module, module.init(jax.random.key(0), x)), regjax.from_nnx(Nnx())
    for model in models:
        kernels = [np.asarray(leaf) for leaf in jax.tree.leaves(model.params) if leaf.ndim > 1]
        value = regularizers.spectral_norm_penalty(model.params)
        np.testing.assert_allclose(value, half_squares(*kernels), rtol=1e-5)


def test_bad_arguments_are_named():
    tree = params(jnp.float32)
    penalty = regularizers.spectral_norm_penalty
    for options, error, message in (
        ({"num_iterations": 0, "key": jax.random.key(0)}, ValueError, "must be at least 1, got 0"),
        ({"num_iterations": 2}, TypeError, "`key` must be a typed key .* got None"),
        ({"mask": {"tall": True}}, ValueError, "`mask` must have the tree structure"),
        (
            {"mask": jax.tree.map(lambda leaf: True, tree)},
            ValueError,
            r"`mask` must leave out .* got \['conv'\]\['bias'\] of shape \(5,\)",
        ),
        ({"mask": jax.tree.map(lambda leaf: 1, tree)}, TypeError, "`mask` must hold Python bools"),
    ):
        with pytest.raises(error, match=message):
            penalty(tree, **options)
    with pytest.raises(TypeError, match="must be real floating point, got int32"):
        penalty([jnp.ones((2, 2), jnp.int32)])
    with pytest.raises(ValueError, match="`params` must have at least one array leaf"):
        penalty([])


@pytest.mark.parametrize("options", [{}, {"num_iterations": 30, "key": jax.random.key(0)}])
@pytest.mark.parametrize("size", [1e-33, 1e-25, 1e22])
def test_gradients_of_kernels_of_any_size(size, options):
    """The square has no number in float32, its gradient has: sigma u v'."""
    kernel = jnp.asarray(TALL * size, jnp.float32)
    slope = jax.grad(lambda k: regularizers.spectral_norm_penalty(k, **options))(kernel)
    sigma, u, v = top(TALL)
    np.testing.assert_allclose(np.asarray(slope, float) / size, sigma * np.outer(u, v), atol=2e-2)


def test_empty_kernels_are_refused():
    with pytest.raises(ValueError, match=r"`params` must have no empty kernel, got shape \(0, 3\)"):
        regularizers.spectral_norm_penalty({"k": jnp.ones((0, 3))})


@pytest.mark.parametrize("num_iterations", [None, 30])
def test_the_direction_is_found_at_any_size(num_iterations):
    # The norm of the products of large ones would be infinite in float32: no direction at all.
    rng = np.random.default_rng(0)
    matrix = (np.linalg.qr(rng.normal(size=(5, 3)))[0] * [3.0, 1.0, 0.5]).astype(np.float32)
    for size in (1e-16, 1.0, 1e18):
        penalty = regularizers.spectral_norm_penalty(
            {"w": jnp.asarray(matrix) * size}, num_iterations=num_iterations, key=jax.random.key(0)
        )
        np.testing.assert_allclose(penalty, 4.5 * size**2, rtol=1e-4)
