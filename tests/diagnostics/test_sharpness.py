"""Dense Hessians, closed forms, and the identities of weights without a scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax.flatten_util import ravel_pytree
from jax.tree_util import Partial

import regjax
from regjax import curvature, diagnostics
from regjax.diagnostics._spherical_sharpness import displaced
from tests import oracles

KEY = jax.random.key(0)
RANDOM = np.random.default_rng(0)
MASK = {"head": False, "layers": {"first": True, "second": True}}


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


def quadratic(params, matrix):
    return 0.5 * params @ matrix @ params


def quartic(params):
    return jnp.sum(params**4)


def normalized(params, inputs, targets):
    """Squared error of a network with batch norm behind two kernels, epsilon 0."""
    hidden = inputs
    for kernel in params["layers"].values():
        hidden = hidden @ kernel
        hidden = hidden - hidden.mean(0, keepdims=True)
        hidden = jnp.tanh(hidden / jnp.sqrt(jnp.mean(hidden**2, 0, keepdims=True)))
    return jnp.mean((hidden @ params["head"] - targets) ** 2)


def network():
    random = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(random.normal(size=shape))
    params = {"head": draw(3), "layers": {"first": draw(3, 3), "second": draw(3, 3)}}
    return params, (draw(11, 3), draw(11))


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


def dense_hessian(loss, params, *batch):
    vector, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda v: loss(unravel(v), *batch)))(vector))


def largest(loss, params, *batch, chunk_size=None, **options):
    hessian = curvature.hessian(loss, params, *batch, chunk_size=chunk_size)
    return curvature.top_eigenpairs(hessian, 1, key=KEY, search=False, **options)


# The largest eigenvalue


def test_largest_eigenvalue_of_a_network(double):
    problem = oracles.in_double(oracles.problem())
    eigenvalues = np.linalg.eigvalsh(dense_hessian(oracles.loss_fn, problem.params, *problem.batch))
    (few, many, chunked), (low_few, low_many, low_chunked) = (
        [
            largest(
                oracles.loss_fn, problem.params, *problem.batch,
                which=which, tol=0, max_matvecs=m, chunk_size=size,
            )
            for m, size in ((8, None), (35, None), (35, 7))
        ]
        for which in ("LA", "SA")
    )  # fmt: skip
    np.testing.assert_allclose(many.values[0], eigenvalues[-1], rtol=1e-9)
    np.testing.assert_allclose(chunked.values[0], many.values[0], rtol=1e-9)
    np.testing.assert_allclose(low_chunked.values[0], low_many.values[0], rtol=1e-6)
    assert bool(many.converged[0])
    # With few products both ends are approached from inside, and the bound is one and no idle one.
    # Up to rounding: converged, an end is as far inside as its last bits say.
    assert eigenvalues[0] - 1e-14 <= low_many.values[0] <= low_few.values[0] < 0
    assert few.values[0] <= eigenvalues[-1]
    distance = np.abs(eigenvalues - few.values[0]).min()
    assert distance <= few.residual_norms[0] < 0.2 * few.values[0]
    assert not bool(few.converged[0])


def test_on_a_saddle_the_sign_decides_or_the_magnitude(double):
    matrix = jnp.asarray(oracles.symmetric([-3.0, -1.0, 0.0, 0.5, 2.0]))
    measure = functools.partial(largest, quadratic, jnp.ones(5), matrix)
    signed, farthest, smallest = measure(), measure(which="LM"), measure(which="SA")
    values = [result.values[0] for result in (signed, farthest, smallest)]
    np.testing.assert_allclose(values, [2, -3, -3], rtol=1e-9)
    assert bool(signed.converged[0])
    assert bool(farthest.converged[0])


@pytest.mark.parametrize("eigenvalue", [0.0, -1.0])
def test_a_single_eigenvalue_is_found_in_the_first_step(eigenvalue, double):
    matrix = eigenvalue * jnp.eye(5)
    for which in ("LA", "SA"):
        result = largest(quadratic, jnp.ones(5), matrix, which=which)
        np.testing.assert_allclose(result.values[0], eigenvalue, rtol=1e-12)
        assert bool(result.converged[0])
        assert result.num_matvecs == 1


@pytest.mark.parametrize(("rate", "sharpness"), [(0.2, 9.50), (0.35, 3.21)])
def test_descent_ends_where_it_is_stable(rate, sharpness, double):
    loss = lambda w: 0.5 * (w[0] * w[1] - 1) ** 2
    w = jnp.asarray([3.2, 0.4])
    w = jax.lax.fori_loop(0, 3000, lambda _, w: w - rate * jax.grad(loss)(w), w)
    value = largest(loss, w).values[0]
    np.testing.assert_allclose(value, jnp.sum(w**2), rtol=1e-8)  # at the minima x y = 1
    np.testing.assert_allclose(value, sharpness, rtol=0.01)
    assert value < 2 / rate


def test_bound_on_the_loss_in_a_ball(double):
    # max over |e| <= rho of L(w + e) is at most L + rho |g| + rho^2 lambda_max / 2.
    matrix = jnp.asarray(oracles.symmetric([-1.0, 0.5, 0.7, 1.0, 4.0]))
    leading, rho = jnp.linalg.eigh(matrix)[1][:, -1], 0.3
    for w in (jnp.zeros(5), 0.7 * leading):
        gradient = jax.grad(quadratic)(w, matrix)
        value = largest(quadratic, w, matrix).values[0]
        bound = quadratic(w, matrix) + rho * jnp.linalg.norm(gradient) + rho**2 * value / 2
        ball = RANDOM.normal(size=(2000, 5))
        ball *= rho / np.linalg.norm(ball, axis=1, keepdims=True)
        there = jax.vmap(quadratic, (0, None))(w[None] + ball, matrix)
        assert jnp.max(there) <= bound
        np.testing.assert_allclose(quadratic(w + rho * leading, matrix), bound, rtol=1e-6)


ENDS = np.array([1.0, -0.5, 0.2, 0.1, 0.3]), np.array([2.0, 0.3, 0.1, -0.1, 0.0])


def test_between_two_points(double):
    ends, matrix = jax.tree.map(jnp.asarray, (ENDS, oracles.symmetric([-1.0, 0.5, 1.0, 2.0, 4.0])))
    same = diagnostics.lambda_max_between(quadratic, *ends, matrix, key=KEY)
    np.testing.assert_allclose(same.values, np.full(8, 4.0), rtol=1e-9)
    measure = functools.partial(
        diagnostics.lambda_max_between, quartic, key=KEY, num_points=5, tol=1e-9
    )
    for first, last, at in ((*ends, -1), (*ends[::-1], 0)):
        report = measure(first, last)
        np.testing.assert_allclose(report.values, 12 * np.linspace(first[0], last[0], 5) ** 2)
        assert report.value == report.values[at]
        assert report.residual_norm == report.residual_norms[at]
        assert bool(report.converged)
    compiled = jax.jit(measure)(first, last)
    np.testing.assert_allclose(compiled.values, report.values, rtol=1e-9)


def test_between_has_converged_only_if_every_point_has(double):
    # At the first end the Hessian is 12 I and a single step is exact; at the other one it is not.
    ends = jnp.ones(5), jnp.asarray([1.0, 0.9, 0.8, 0.7, 0.6])
    report = diagnostics.lambda_max_between(quartic, *ends, key=KEY, num_points=2, max_matvecs=1)
    small = report.residual_norms <= 1e-3 * report.values
    np.testing.assert_array_equal(small, [True, False])
    assert report.value == report.values[0]
    assert not bool(report.converged)


def test_no_residual_norm_is_claimed_below_the_rounding_of_low_precision():
    def loss(w):
        return jnp.sum(jnp.arange(1, 5, dtype=w.dtype) * w**2)

    for dtype in (jnp.float32, jnp.bfloat16):
        ends, floor = (jnp.ones(4, dtype), jnp.zeros(4, dtype)), 8 * float(jnp.finfo(dtype).eps)
        between = diagnostics.lambda_max_between(loss, *ends, key=KEY, num_points=2)
        sphere = diagnostics.spherical_sharpness(loss, ends[0], key=KEY, tol=0)
        for result, value in ((between, 8.0), (sphere, 4 * 8.0)):
            np.testing.assert_allclose(result.value, value, rtol=2 * floor)
            assert floor * value * 0.9 <= result.residual_norm <= max(floor, 1e-3) * value * 1.1


# Weights without a scale


def test_spherical_sharpness_of_two_kernels(double):
    params, batch = network()
    whole = dense_hessian(normalized, params, *batch)
    dense, weights = whole[3:, 3:], flat(params["layers"])
    square = weights @ weights
    measure = functools.partial(diagnostics.spherical_sharpness, normalized, key=KEY, tol=1e-9)
    report = measure(params, *batch, mask=MASK)
    np.testing.assert_allclose(report.value, square * np.linalg.eigvalsh(dense)[-1], rtol=1e-9)
    scaled = {**params, "layers": jax.tree.map(lambda leaf: 7 * leaf, params["layers"])}
    again = measure(scaled, *batch, mask=MASK)
    np.testing.assert_allclose(again.value, report.value, rtol=1e-9)

    # Off the minimum the radial direction matters: H w = -g.
    gradient = flat(jax.grad(normalized)(params, *batch)["layers"])
    np.testing.assert_allclose(dense @ weights, -gradient, atol=1e-12)
    assert abs(gradient @ weights) < 1e-12
    tangent = measure(params, *batch, mask=MASK, tangent=True)
    projection = np.eye(weights.size) - np.outer(weights, weights) / square
    expected = np.linalg.eigvalsh(projection @ dense @ projection)
    np.testing.assert_allclose(tangent.value, square * expected[-1], rtol=1e-9)
    on_sphere, origin = displaced(normalized, params, MASK, tangent=True)
    smallest = largest(on_sphere, origin, *batch, which="SA", tol=1e-9).values[0]
    np.testing.assert_allclose(smallest, square * expected[0], rtol=1e-6)
    assert abs(tangent.value / report.value - 1) > 1e-3

    groups = diagnostics.spherical_sharpness_by_group(
        normalized, params, *batch, key=KEY, mask=MASK, tol=1e-9
    )
    assert list(groups) == ["layers/first", "layers/second"]
    for group, place in zip(groups.values(), (slice(0, 9), slice(9, 18)), strict=True):
        expected = weights[place] @ weights[place] * np.linalg.eigvalsh(dense[place, place])[-1]
        np.testing.assert_allclose(group.value, expected, rtol=1e-9)


class Linen(linen.Module):
    @linen.compact
    def __call__(self, inputs, train: bool):
        hidden = linen.Dense(3, use_bias=False, name="first")(inputs)
        hidden = linen.BatchNorm(
            use_running_average=not train, use_scale=False, use_bias=False, epsilon=0.0
        )(hidden)
        return linen.Dense(2, name="head")(linen.tanh(hidden))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 3, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(3, use_scale=False, use_bias=False, epsilon=0.0, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, inputs):
        return self.head(nnx.tanh(self.norm(self.first(inputs))))


@pytest.mark.usefixtures("default_promotion")
def test_flax_models_under_jit():
    inputs = jnp.asarray(RANDOM.normal(size=(12, 4)), jnp.float32)
    targets = jnp.asarray(RANDOM.integers(2, size=12), jnp.int32)
    model = regjax.from_nnx(Nnx(nnx.Rngs(0)))
    module, statistics = Linen(), {"BatchNorm_0": {"mean": jnp.zeros(3), "var": jnp.ones(3)}}
    variables = {"params": model.params, "batch_stats": statistics}
    found = diagnostics.scale_invariant_mask(
        regjax.model_function(model, mode="train"), model.params, inputs, key=KEY, per_filter=False
    )
    assert found.mask == {"first": {"kernel": True}, "head": {"bias": False, "kernel": False}}
    measure = functools.partial(diagnostics.spherical_sharpness, key=KEY, mask=found.mask)
    values = []
    for same in (model, regjax.from_linen(module, variables)):
        loss = regjax.model_loss(same, oracles.squared_error, mode="train")
        values.append(jax.jit(measure)(loss, model.params, inputs, targets).value)
        with pytest.raises(ValueError, match="`chunk_size` must not split a batch whose examples"):
            measure(loss, model.params, inputs, targets, chunk_size=4)
    np.testing.assert_allclose(*values, rtol=1e-5)

    def of_kernel(kernel):
        return loss({**model.params, "first": {"kernel": kernel}}, inputs, targets)

    kernel = model.params["first"]["kernel"]
    expected = jnp.sum(kernel**2) * np.linalg.eigvalsh(dense_hessian(of_kernel, kernel))[-1]
    np.testing.assert_allclose(values[0], expected, rtol=1e-4)


def test_bad_inputs(double):
    params, batch = network()
    measure = functools.partial(
        diagnostics.spherical_sharpness, normalized, params, *batch, key=KEY
    )
    with pytest.raises(ValueError, match="`tol` must be non-negative, got -1"):
        measure(tol=-1)
    with pytest.raises(ValueError, match="`max_matvecs` must be at least 1, got 0"):
        measure(max_matvecs=0)
    with pytest.raises(TypeError, match="`key` must be a typed key"):
        measure(key=0)
    with pytest.raises(ValueError, match="`loss_fn` must be the mean over independent examples"):
        measure(chunk_size=4)
    between = functools.partial(diagnostics.lambda_max_between, normalized, params, key=KEY)
    with pytest.raises(ValueError, match="`num_points` must be at least 2, got 1"):
        between(params, *batch, num_points=1)
    with pytest.raises(ValueError, match="`other_params` must have the tree structure"):
        between(params["head"], *batch)
    with pytest.raises(ValueError, match="`mask` must choose at least one leaf, got none"):
        measure(mask=jax.tree.map(lambda _: False, MASK))
    with pytest.raises(TypeError, match=r"`mask` must hold Python bools, .* got 0"):
        measure(mask=jax.tree.map(int, MASK))
    with pytest.raises(ValueError, match="`mask` must have the tree structure"):
        measure(mask=MASK["layers"])


def _quadratic(scale, curvatures, w, x):
    return jnp.mean(x) * 0.5 * jnp.sum(curvatures * (scale * w) ** 2)


@pytest.mark.parametrize("size", [1e-18, 1e-9, 1.0, 1e9, 1e17])
def test_spherical_sharpness_of_weights_of_any_norm(size):
    """||w||^2 times the curvature: squares of norms under- or overflowed in float32."""
    weights = np.asarray([3.0, 4.0, 0.0]) * size
    loss = Partial(_quadratic, jnp.float32(1 / size), jnp.asarray([5.0, 3.0, 1.0]))
    where = jnp.asarray(weights, jnp.float32)
    found = diagnostics.spherical_sharpness(loss, where, jnp.ones((4, 1)), key=jax.random.key(0))
    assert float(found.value) == pytest.approx(25 * 5, rel=1e-3)
    assert bool(found.converged)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_no_curvature_of_weights_beyond_their_type(size):
    loss = Partial(_quadratic, jnp.float32(1 / size), jnp.asarray([5.0, 3.0, 1.0]))
    measure = lambda where: diagnostics.spherical_sharpness(
        loss, where, jnp.ones((4, 1)), key=jax.random.key(0)
    )
    where = jnp.full(3, size, jnp.float32)
    with pytest.raises(ValueError, match=r"`params` must have a norm between"):
        measure(where)
    assert np.isnan(jax.jit(measure)(where).value)
